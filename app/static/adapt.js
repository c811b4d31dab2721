/* Adapt: the drawing of one layer is the control; beside it what the choice costs, before anything is trained. */
import "./layer_map.js";
import {Away, Refused, emit, fmt, h, layersOf, on, post, show, state} from "./core.js";
import {budgetOf, loadOf, timeOf} from "./budget.js";
import {dataRow} from "./data.js";
import {presets} from "./presets.js";
import {hits, missed} from "./hits.js";
import {beyond, methods, uncounted} from "./methods.js";
import {choose, chosen} from "./formula.js";
import {mark as what} from "./help.js";
import {exports} from "./plot.js";

const RANKS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];

export function adapt(root) {
  dataRow(root);
  for (const name of ["model", "task"]) root.querySelector(`#${name}-picker`).after(what(name, `the ${name}`));
  const title = h("h2", {class: "ll-h"}), holder = h("div"), fault = h("p", {class: "ll-fault", role: "alert"});
  const big = h("p", {class: "ll-big"}), sub = h("p", {class: "ll-note"}), rows = {};
  const row = (k, text, base) => {
    const val = h("dd", {}), bar = h("i");
    rows[k] = {val, bar};
    return h("div", {class: `bg-row${base ? " base" : ""}`}, h("dt", {}, text), val, h("dd", {class: "bg-bar", "aria-hidden": "true"}, bar));
  };
  const stepLabel = h("dt"), step = h("dd");
  const fill = ({spec, config}) => {
    state.config = {...state.config, ...config};
    take({...state.spec, ...spec}, true);
    map.set(shown());
    emit("config", true);
  };
  const ready = presets(({spec, config}) => fill({spec: {full: [], bottleneck: 0, prefix: 0, ...spec}, config}));
  const go = h("button", {class: "ll-button go", type: "button", onclick: () => { show("train"); document.getElementById("train-button").focus(); }});
  root.append(h("div", {class: "ll-grid"},
    h("section", {class: "ll-card ad-card", style: {"--span": 8}}, h("div", {class: "ll-head"}, title, h("p", {class: "ll-note"}, "Click a matrix to adapt it. Matrices are to scale.", what("targets", "a matrix here")),
      exports("the drawing", {name: () => `layer-of-${state.facts?.name.split("/").at(-1)}`, svg: () => holder.querySelector("svg"), rows: table})), holder, hits(), methods(state.boot.methods, fill), fault),
    h("section", {class: "ll-card bg", id: "budget", "aria-label": "What it costs", style: {"--span": 4}}, h("h2", {}, "What it costs"), big, sub,
      h("dl", {class: "bg-rows"}, row("file", "adapter file"), row("full", "full copy", true), row("mem", "training memory"), row("fullmem", "full fine-tuning", true),
        h("div", {class: "bg-row"}, stepLabel, step)),
      h("div", {class: "bg-pre"}, ready.nodes), go)));

  let map = null, seq = 0, timer = 0, last = null;

  /* The drawing as rows, for CSV. */
  function table() {
    const {facts, spec} = state, layers = layersOf(spec).length;
    return facts && [["matrix", "out", "in", "adapted layers", "rank", "numbers of B and A a layer"],
      ...facts.matrices.map((m) => { const on = spec.targets.includes(m.name); return [m.name, m.out, m.in, on ? layers : 0, on ? spec.rank : 0, on ? spec.rank * (m.out + m.in) : 0]; })];
  }
  /* The map knows layers as a list; a spec says "all" where it is all of them. */
  const shown = () => ({...state.spec, layers: layersOf(state.spec)});
  function take(s, settled) {
    state.spec = {...state.spec, ...s, layers: Array.isArray(s.layers) && s.layers.length === state.facts.layers ? "all" : s.layers};
    draw();
    emit("spec", settled);
    confirm(settled ? 0 : 150);
  }
  function build() {
    const {facts} = state;
    root.classList.toggle("no-model", !facts);
    if (!facts) {
      title.textContent = "No model yet";
      holder.replaceChildren(h("p", {class: "ll-note"}, "Pick a model above; its matrices will be drawn here."));
      go.textContent = "Go to training";
      go.disabled = true;
      return;
    }
    const names = facts.matrices.map((m) => m.name), kept = state.spec.targets.filter((t) => names.includes(t));
    if (!beyond(state.spec)) state.spec.targets = kept.length ? kept : names.filter((t) => ["q", "v"].includes(t)).slice(0, 2);
    if (state.spec.layers !== "all") {
      const layers = state.spec.layers.filter((l) => l < facts.layers);
      state.spec.layers = layers.length === facts.layers || !layers.length ? "all" : layers;
    }
    title.textContent = `One of ${facts.layers} layers of ${facts.name.split("/").at(-1)}`;
    map?.destroy();
    map = LayerMap(holder, {matrices: facts.matrices, layers: facts.layers, ranks: RANKS, state: shown(), height: 256,
      ids: {targets: "targets", rank: "rank", alpha: "alpha"}, 
      help: {layers: what("layers", "a layer"), rank: what("rank", "the rank"), alpha: what("alpha"), scaling: what("scaling", "the scaling")}, onChange: take, onPick: (name) => choose(chosen().layer, name)});
    mark();
    draw();
    confirm(0);
  }

  function draw(budget = null, time = null) {
    const {facts, spec, config, about} = state;
    if (!facts) return;
    const load = loadOf(about, config), more = uncounted(spec), ok = more || !spec.targets.length || !layersOf(spec).length ? null : budgetOf(facts.coefficients, spec, load);
    if (more && !budget && !last) return ready.refresh();    // only Python knows what that costs
    const b = budget ?? ok ?? budgetOf(facts.coefficients, {...spec, targets: []}, load), t = time ?? (ok && timeOf(facts, b, about, config));
    const total = facts.matrices.reduce((n, m) => n + m.modules, 0);
    big.textContent = fmt.int(b.trainable);
    sub.textContent = b.trainable ? `trainable parameters, ${fmt.pct(b.fraction)} of the model${more ? "" : `, in ${fmt.int(b.matrices)} of ${fmt.int(total)} matrices`}` : "trainable parameters";
    const put = (k, text, share) => { rows[k].val.textContent = text; rows[k].bar.style.width = `${Math.min(100, 100 * share)}%`; };
    put("file", fmt.bytes(b.file_bytes) + (b.file_bytes ? `, ${ratio(b.full_bytes / b.file_bytes)}` : ""), b.file_bytes / b.full_bytes);
    put("full", fmt.bytes(b.full_bytes), 1);
    put("mem", fmt.bytes(b.train_bytes), b.train_bytes / b.full_train_bytes);
    put("fullmem", fmt.bytes(b.full_train_bytes), 1);
    stepLabel.textContent = `one step of ${load.rows} row${load.rows === 1 ? "" : "s"}`;
    step.textContent = t ? `≈ ${fmt.step(t.step_s)}` : "–";
    state.time = t;
    say(more ? last?.message ?? "" : !spec.targets.length ? "Choose at least one matrix: click q or v." : !layersOf(spec).length ? "Choose at least one layer: drag over the strip." : (missed(spec, facts) || last?.message) ?? "");
    go.textContent = `Go to training ${`(${fmt.int(config.steps)} step${config.steps === 1 ? "" : "s"}${t ? ` ≈ ${fmt.time(t.total_s)}` : ""})`.replaceAll(" ", "\u00a0")}`;
    ready.refresh();
    emit("time", t);
  }
  function say(text) {
    const field = !state.spec.targets.length && !beyond(state.spec) ? "targets" : last?.field;
    fault.textContent = text;
    go.disabled = Boolean(text);
    state.fault = text || null;
    for (const [name, id] of [["rank", "rank"], ["alpha", "alpha"]]) {
      const input = document.querySelector(`#${id} input`);
      input && (text && field === name ? input.setAttribute("aria-invalid", "true") : input.removeAttribute("aria-invalid"));
    }
    emit("fault");
  }

  /* Python's word: at most one question per 150 ms while dragging, and always the last; older answers are dropped. */
  function confirm(wait) {
    clearTimeout(timer);
    const mine = ++seq;
    timer = setTimeout(async () => {
      const {facts, spec, config, data, about} = state;
      if (!facts || !beyond(spec) && (!spec.targets.length || !layersOf(spec).length)) { last = null; return; }
      try {
        const a = await post("budget", {seq: mine, model: facts.name, spec, config, data, tokens: about?.tokens, labelled: about?.labelled});
        if (mine !== seq) return;
        last = null;
        if (a.s_per_flop) state.facts.s_per_flop = a.s_per_flop;
        draw(a.budget ?? null, a.time ?? null);
      } catch (error) {
        if (error instanceof Away || mine !== seq) return;
        if (!(error instanceof Refused)) throw error;
        last = error;
        draw();
      }
    }, wait);
  }
  function mark() { if (map && state.facts) { const {layer, name} = chosen(); map.mark(name, layer); } }
  on("matrix start", mark);
  on("facts", build);
  on("about config data", () => { draw(); confirm(100); });
  on("refill", ({facts}) => { if (!facts) build(); });
  on("back ended", () => confirm(0));
  build();
}
const ratio = (x) => x >= 1.5 ? `${x < 10 ? x.toFixed(1) : fmt.int(x)}× smaller` : `${x.toFixed(1)}× the size`;
