/* Train: the loss as it falls, what is going on in words, and where the update grows. */
import {Away, Refused, address, asked, fmt, h, layersOf, on, post, show, state} from "./core.js";
import {cellmap} from "./cellmap.js";
import {live} from "./live.js";
import {differs, pareto} from "./pareto.js";
import {draw, drawn, exports, mapFigure, mapRows} from "./plot.js";
import {past} from "./past.js";
import {openRun, poll} from "./run.js";
import {settings} from "./settings.js";
import {walk} from "./walk.js";

export function train(root, {value}) {
  const fault = h("p", {class: "ll-fault", role: "alert"}), form = settings(value.more);
  const go = h("button", {class: "ll-button go", type: "button", id: "train-button", onclick: start});
  const stop = h("button", {class: "ll-button", type: "button", id: "stop-button", hidden: true, onclick: () => act("stop")}, "Stop, keep the adapter");
  const resume = h("button", {class: "ll-button small", type: "button", hidden: true, onclick: () => act("resume")});
  const plot = h("div", {class: "tr-plot", id: "loss-plot"}), say = h("p", {class: "tr-say"}), badge = h("span", {class: "ll-badge", hidden: true}, "recorded");
  const status = h("p", {class: "tr-status", id: "run-status", role: "status", "data-status": "none"});
  const num = (label) => { const b = h("span", {class: "tr-n"}), t = h("span", {class: "ll-muted"}, label); return {b, t, box: h("div", {class: "tr-num"}, b, t)}; };
  const nStep = num("step"), nLeft = num("left"), nTok = num("tokens/s");
  const beside = h("p", {class: "ll-note tr-beside"}), grown = h("p", {class: "ll-note tr-grown"});
  const runs = past(), stripBox = h("div", {class: "tr-strip"}), legend = h("p", {class: "ll-note"});
  const note = h("p", {class: "ll-note"}, "small: each step; line: smoothed; large: held out"), table = h("div"), size = pareto((id) => openRun(id, {refill: true, push: true}));
  const which = h("div", {class: "ll-tabs", role: "group", "aria-label": "What the loss is drawn against"}, [["step", "by step"], ["size", "by size"]].map(([id, text]) => h("button", {type: "button", "data-by": id, onclick: () => against(id)}, text)));
  function against(id) {
    which.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.by === id)));
    plot.hidden = note.hidden = id === "size";
    size.show(id === "size");
    address({by: id === "size" ? id : null});
  }
  const next = h("button", {class: "ll-link", type: "button", hidden: true, onclick: () => show("compare")}, "compare its texts");
  root.append(h("div", {class: "ll-row tr-row"}, form.nodes, walk().nodes, go, stop), fault, say, h("div", {class: "ll-grid"},
    h("section", {class: "ll-card tr-main", style: {"--span": 5}},
      h("div", {class: "ll-head"}, h("h2", {class: "ll-h"}, "Loss ", badge), which,
        exports("the loss", {name: () => `${size.node.hidden ? `loss-run${state.run}` : "loss-by-size"}`, figure: () => size.node.hidden ? drawn(plot) : size.figure(), rows: () => size.node.hidden ? state.view?.rows : size.rows()})), plot,
      note, size.node),
    live(),
    h("section", {class: "ll-card tr-side", style: {"--span": 3}}, status, h("div", {class: "tr-acts"}, resume, next), h("div", {class: "tr-nums"}, nStep.box, nLeft.box, nTok.box), beside,
      runs.nodes),
    h("section", {class: "ll-card tr-grows", style: {"--span": 12}}, h("div", {}, h("div", {class: "ll-head"}, h("h2", {class: "ll-h"}, "Where the update grows"), grown, legend,
      exports("the map", {name: () => `update-run${state.run}`, figure: () => mapFigure(state.view?.warm?.values, "‖ΔW‖", state.view?.figure?.layout.template), rows: () => mapRows(state.view?.warm?.values)})), stripBox), table)));
  against(asked("by") === "size" ? "size" : "step");

  /* ---- acts */
  async function start() {
    go.disabled = true;
    tell("");
    try {
      const {facts, spec, config, data} = state;
      const {run} = await post("train", {model: facts?.name, spec, config, data});
      await openRun(run, {push: true});
      runs.load();
    } catch (error) { refused(error); } finally { ready(); }
  }
  async function act(what) {
    stop.disabled = resume.disabled = true;
    try { await post(what, {run: state.run}); } catch (error) { refused(error); }
    stop.disabled = resume.disabled = false;
    poll();
  }
  function refused(error) {
    if (!(error instanceof Refused || error instanceof Away)) throw error;
    if (error instanceof Away) return;                       // the frame says so
    tell(error.message);
    form.blame(error.field);
  }
  const tell = (text) => { fault.textContent = text; };
  function ready() {
    const {config, time, view, fault: wrong} = state;
    const n = config?.steps ?? 0, word = `${fmt.int(n)} step${n === 1 ? "" : "s"}`;
    go.textContent = `Train ${word}${time && !wrong ? ` (≈ ${fmt.time(time.total_s)})` : ""}`;
    go.disabled = !state.facts || Boolean(wrong);
    const live = Boolean(view?.live);
    go.hidden = live;
    stop.hidden = !live;
  }
  on("time fault facts config spec", ready);
  on("fault", () => { tell(state.fault ?? ""); form.blame(state.fault ? /^(\w+) is /.exec(state.fault)?.[1] : ""); });

  /* ---- the open run */
  let strip = null, figure = null;
  on("view", (v) => {
    ready();
    status.dataset.status = v ? (v.recorded ? "recorded" : v.status) : "none";
    status.toggleAttribute("data-beat", Boolean(v?.live) && !status.hasAttribute("data-beat"));   // the dot beats with the server's answers: an animation would wake the processors sixty times a second
    status.replaceChildren(v ? v.says : "Nothing is trained yet", ...(v?.error ? [h("span", {class: "ll-fault"}, v.error)] : []));
    badge.hidden = !v?.recorded;
    resume.hidden = !v?.can_resume;
    if (v) resume.textContent = `Go on (${fmt.int(v.steps - v.step)} step${v.steps - v.step === 1 ? "" : "s"} left)`;
    next.hidden = !v || v.live || !v.adapter;
    nStep.b.textContent = v ? `${fmt.int(v.step)} / ${fmt.int(v.steps)}` : `0 / ${fmt.int(state.config?.steps ?? 0)}`;
    nTok.b.textContent = v?.tokens_per_s ? fmt.int(v.tokens_per_s) : "–";
    nLeft.b.textContent = v?.live ? (v.left_s != null ? fmt.time(v.left_s) : "…") : v?.took ?? "–";
    nLeft.t.textContent = v && !v.live ? "took" : "left";
    if (!v) return before();
    if (v.figure && v.figure !== figure) {
      figure = v.figure;
      draw(plot, figure);
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `Loss of ${v.name} by step. ${v.sentence}`);
    }
    beside.textContent = beside.title = v.beside ?? "";
    beside.hidden = Boolean(v.differs);                          // the table says it
    table.replaceChildren(...differs(v.differs));
    say.textContent = v.sentence || (v.live && v.step ? "" : v.live ? "The base model is scored on held-out rows first; then the curve begins." : "");
    warm(v);
    runs.marks();
  });
  /* Nothing open: what will be here. */
  function before() {
    say.textContent = "The loss of a run will be drawn here while it trains, with the base model's as a line across.";
    figure = null;
    if (!state.facts) return;
    build(state.spec.targets, state.facts.layers, "cold");
    beside.textContent = "";
    legend.textContent = "";
    grown.textContent = "Cells warm up as ‖ΔW‖ grows.";
  }
  on("ended run", () => runs.load());
  on("spec facts", () => { if (!state.view) before(); });

  function build(targets, layers, key) {
    const id = `${key}|${targets.join()}|${layers}`;
    if (strip?.id === id) return;
    strip = cellmap(targets, layers, {label: "‖ΔW‖ by layer and matrix; arrow keys move, and the spectrum follows", onPick: choose, height: targets.length > 4 ? 12 : targets.length > 2 ? 18 : 26});
    strip.id = id;
    root.style.setProperty("--strip", `${targets.length * ((targets.length > 4 ? 12 : targets.length > 2 ? 18 : 26) + 2)}px`);
    stripBox.replaceChildren(strip.node);
    strip.mark(filmed);
  }
  function choose(m) { state.matrix = m; address({m}); }
  let filmed = null;
  on("matrix film", (m) => { filmed = m; strip?.mark(m); });
  function warm(v) {
    const {values, top, most} = v.warm ?? {values: {}};
    const names = Object.keys(values);
    if (!names.length) {
      const facts = state.facts?.name === v.model ? state.facts : null, on = facts ? layersOf(v.spec, facts) : v.spec.layers === "all" ? [] : v.spec.layers;
      const layers = facts?.layers ?? Math.max(0, ...on) + 1;
      build(v.spec.targets, layers, "run");
      strip.paint(Object.fromEntries(v.spec.targets.map((t) => [t, Array.from({length: layers}, (_, l) => on.includes(l) ? 0 : null)])), 0, 1, (l, t, x) => x == null ? `layer ${l} ${t} is frozen` : `layer ${l} ${t}: ΔW = 0`);
      legend.textContent = "";
      grown.textContent = v.spec.targets.some((t) => t !== "bias") ? v.warm?.say ?? "" : "This run trains without B·A, so no ΔW grows here.";
      return;
    }
    build(names, values[names[0]].length, "run");
    strip.paint(values, 0, top, (l, t, x) => x == null ? `layer ${l} ${t} is frozen` : `layer ${l} ${t}: ‖ΔW‖ = ${x.toPrecision(3)}`);
    strip.grid.setAttribute("aria-label", `‖ΔW‖ by layer and matrix, up to ${most.toPrecision(2)}; arrow keys move, and the spectrum follows`);
    grown.textContent = v.warm.say;
    legend.replaceChildren("‖ΔW‖", h("span", {class: "ll-ramp"}, "0", h("i"), top.toPrecision(2)));
  }
}
