/* How much of ΔW: the rank dial in its three ways (k, energy, megabytes) and the strength dial, with the held-out loss
 * along them; and saving what stands there as an adapter of its own. */
import {Away, Refused, fmt, get, h, post, state} from "./core.js";
import {mark} from "./help.js";
import {draw, exports} from "./plot.js";
import {openRun} from "./run.js";

const DIALS = [["k", "directions k", "of each matrix, the strongest first"], ["energy", "kept energy", "of each matrix's Σσ²; ranks differ"], ["mb", "megabytes", "of the file, spent where most is kept"]];
const mb = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;

export function cutView(ctx) {
  const rows = Object.fromEntries(DIALS.map(([by, text, about]) => {
    const input = h("input", {type: "range", min: 0, step: 1, id: `cp-${by}`, "aria-describedby": `cp-${by}-about`, oninput: () => ctx.turn({by, at: +input.value === +input.max ? null : +input.value})});
    const out = h("output", {for: `cp-${by}`}), node = h("div", {class: "ct-row"}, h("label", {for: `cp-${by}`, title: about}, text), mark(`cut_${by}`, text), input, out, h("span", {class: "ll-hidden", id: `cp-${by}-about`}, about));
    return [by, {input, out, node}];
  }));
  const strength = h("input", {type: "range", min: 0, step: 1, id: "cp-strength", oninput: () => ctx.turn({strength: ctx.dials.strengths[+strength.value]})});
  const times = h("output", {for: "cp-strength"}), strengthRow = h("div", {class: "ct-row"}, h("label", {for: "cp-strength", title: "ΔW is multiplied by this; 0 is the base model"}, "strength of ΔW"), mark("strength", "the strength of ΔW"), strength, times);
  const dora = h("p", {class: "ll-note", hidden: true}, "A DoRA adapter: its magnitudes neither scale nor go with a matrix, so its rank can be cut, but there is no strength to turn.");
  const save = h("button", {class: "ll-button small", type: "button", id: "cp-save", onclick: keep}, "Save this cut"), saved = h("p", {class: "ll-note ct-saved", role: "status"});
  const all = h("button", {class: "ll-link", type: "button", onclick: () => ctx.turn({at: null, strength: 1, off: new Set()}, 0)}, "all of ΔW again");
  const plot = h("div", {class: "ct-plot", id: "cut-plot", role: "img"}), title = h("h2", {class: "ll-h"}), say = h("p", {class: "ct-say"}), note = h("span", {class: "ll-note ct-note"});
  const left = h("div", {class: "ct-left"}, Object.values(rows).map((r) => r.node), strengthRow, dora, h("div", {class: "ct-acts"}, save, all), saved);
  const right = h("div", {class: "ct-right"}, h("div", {class: "ll-head"}, title, note, exports("the curve", {name: () => `held-out-loss-run${state.run}`, figure: () => figure(), rows: () => table()})), plot, say);
  let busy = false;

  const onStrength = () => ctx.dial.strength !== 1;
  const figure = () => ctx.held?.figures[onStrength() ? "strength" : "cut"] ?? ctx.held?.figures.cut;
  const table = () => ctx.held && [["dial", "place", "directions, mean", "energy kept", "bytes", "held-out loss", "rows"],
    ...Object.entries(ctx.dials.ticks).flatMap(([by, ts]) => ts.map((t, i) => [by, t.x, t.mean, t.kept, t.bytes, ctx.held.families[by]?.loss[i], ctx.held.families[by]?.rows])),
    ...ctx.dials.strengths.map((t, i) => ["strength", t, "", "", "", ctx.held.families.strength?.loss[i], ctx.held.families.strength?.rows])];

  /* The other dials follow to where they keep the same energy, or make a file of the same size. */
  function near(by, t) {
    const ts = ctx.ticks(by), far = (x) => by === "mb" ? Math.abs(x.bytes - t.bytes) : Math.abs(x.mean - t.mean);
    return ts.reduce((a, x, i) => far(x) < far(ts[a]) ? i : a, 0);
  }
  function paint() {
    const {dial, dials} = ctx;
    if (!dials) return;
    const began = performance.now(), t = ctx.ticks()[ctx.at()];
    for (const [by, r] of Object.entries(rows)) {
      r.node.hidden = !ctx.ticks(by).length;
      r.input.max = ctx.ticks(by).length - 1;
      r.node.classList.toggle("in-hand", by === dial.by);
      const i = by === dial.by ? ctx.at() : near(by, t);
      if (+r.input.value !== i) r.input.value = i;
      r.out.textContent = by === "k" ? t.least === t.most ? String(t.most) : `${t.least}–${t.most}` : by === "energy" ? fmt.pct(t.kept) : mb(t.bytes);
      r.input.setAttribute("aria-valuetext", r.out.textContent);
    }
    strengthRow.hidden = !dials.strengths.length;
    dora.hidden = !dials.dora;
    strength.max = dials.strengths.length - 1;
    strength.value = Math.max(0, dials.strengths.indexOf(dial.strength));
    times.textContent = `× ${dial.strength.toFixed(2)}`.replace("-", "−");
    strength.setAttribute("aria-valuetext", times.textContent);
    save.disabled = busy || ctx.nothing();
    all.hidden = ctx.whole();
    say.textContent = sentence(t);
    curve();
    globalThis.LoraLab.turns = [...(globalThis.LoraLab.turns ?? []), performance.now() - began].slice(-100);
  }
  function sentence(t) {
    const now = ctx.lossNow(), base = ctx.info.loss?.base, best = ctx.info.loss?.adapted, {dial, dials} = ctx;
    if (ctx.nothing()) return "Nothing of ΔW is left: this is the base model.";
    const holds = `${t.least === t.most ? `${t.most} ${t.most === 1 ? "direction" : "directions"}` : `${t.least} to ${t.most} directions`} of each matrix hold ${fmt.pct(t.kept)} of the energy in ${mb(t.bytes)}`;
    if (!now || base == null || !(base > best)) return `${holds}.`;
    const gain = (base - now.loss) / (base - best);
    const kept = gain < 0 ? `worse than the base's ${base.toFixed(2)}` : `${gain > 0.995 ? "all" : fmt.pct(gain)} of what was learnt`;
    if (dial.strength !== 1) return `With ΔW × ${dial.strength.toString().replace("-", "−")} the loss is ${now.loss.toFixed(2)}, ${kept}; as it was learnt, it is ${best.toFixed(2)}.`;
    if (ctx.whole()) { const k = enough(base, best); return k == null ? `${holds}; how few would do is being measured.` : `${k} of ${dials.rank} ${k === 1 ? "direction" : "directions"} would have been enough: with ${k === 1 ? "it" : "them"} 99 % of what was learnt is there.`; }
    return gain < 0 ? `${holds}; the loss is ${now.loss.toFixed(2)}, ${kept}.` : `${holds}, and ${kept}.`;
  }
  /* The least k that keeps 99 % of the gain, once all of the curve is measured. */
  function enough() {
    const k = ctx.held?.families.k;
    if (!k || k.rows < ctx.held.of) return null;
    const base = k.loss[0], gain = base - k.loss.at(-1), i = k.loss.findIndex((x) => base - x >= 0.99 * gain);
    return gain > 0 && i >= 0 ? ctx.dials.ticks.k[i].x : null;
  }
  function curve() {
    const {held, dials, dial} = ctx, f = figure();
    if (!dials) return;
    const rows = held?.families[onStrength() ? "strength" : dial.by]?.rows;
    title.textContent = onStrength() && held?.figures.strength ? "Held-out loss over the strength of ΔW" : "Held-out loss over the rank, and the energy";
    note.textContent = !held ? "" : held.says && rows !== held.of ? `${held.says}${rows ? `, ${rows} of ${held.of} rows` : ""}` : held.of ? `${held.of} held-out rows` : "";
    plot.hidden = !f;
    if (!f) return;
    const now = ctx.lossNow(), t = ctx.ticks()[ctx.at()], onIt = f === held.figures.strength, x = onIt ? dial.strength : t.mean;
    const line = {type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: {color: "#0f172a", width: 1.5, dash: "dot"}};
    const here = now ? [{x: [x], y: [now.loss], type: "scatter", mode: "markers", marker: {size: 13, color: "#b4400c", line: {color: "#ffffff", width: 2}}, hoverinfo: "skip", name: "here"}] : [];
    plot.setAttribute("aria-label", `${title.textContent}. ${say.textContent}`);
    draw(plot, {data: [...f.data, ...here], layout: {...f.layout, shapes: [...f.layout.shapes, line]}});
  }
  async function keep() {
    const run = state.run;
    busy = true;
    paint();
    saved.replaceChildren("Writing it, reading it back and measuring both…");
    try {
      const r = await post("cut", {run, setting: ctx.setting()});
      const apart = Math.abs(r.shown - r.saved);
      saved.replaceChildren(h("b", {}, `Saved as run ${r.run}`), `, ${mb(r.bytes)} of ${mb(r.before_bytes)}. Read back, its loss is ${r.saved.toFixed(4)}; shown was ${r.shown.toFixed(4)}: ${apart < 5e-5 ? "the same" : `${apart.toExponential(0)} apart`} (${r.rows} rows). `,
        h("a", {class: "ll-link", href: `lab/api/adapter.zip?run=${r.run}`, download: ""}, "download"), " ", h("button", {class: "ll-link", type: "button", onclick: () => openRun(r.run, {refill: true, push: true})}, `open run ${r.run}`));
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      saved.replaceChildren(h("span", {class: "ll-fault"}, error.message));
    }
    busy = false;
    paint();
  }
  return {nodes: [left, right], paint, curve, look: curve,
    open() { saved.replaceChildren(); plot.hidden = true; },
    unable(text) { say.textContent = text; }};
}
