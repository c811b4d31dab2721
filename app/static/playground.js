/* Play: LoRA on one matrix of 16 × 24, trained in the browser while one watches: the questions and the picture. The
 * arithmetic is in toy.js. No library, no request; the notebook's widget and docs/play.html have both as one module. */
import {D, K, DEFAULT, VALLEYS, VALLEY_RANKS, VALLEY_RATES, VALLEY_RULES, bestRate, cut, less, problem, productOf, scaleOf, sharesOf, square, svd, swaps, timesT1, timesT2, train} from "./toy.js";
export * from "./toy.js";

// ---- the eight presets ------------------------------------------------------------------------------------------------
const num = (x, d = 3) => {
  if (x === 0 || !Number.isFinite(x)) return x === 0 ? "0" : "∞";
  if (Math.abs(x) < 1e-4) return x.toExponential(0).replace("-", "−").replace(/e(.*)/, "·10^$1").replace(/\^(.*)/, (_, n) => [...n.replace("+", "")].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join(""));
  const text = Math.abs(x) >= 100 ? x.toFixed(0) : x.toFixed(Math.max(0, Math.min(4, d - 1 - Math.floor(Math.log10(Math.abs(x)))))).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return text.replace("-", "−");
};
const fixed = (x, d = 2) => x.toFixed(d).replace("-", "−");
const share = (x) => { const v = Math.abs(x) < 5e-4 ? 0 : 100 * x; return num(Math.abs(v) >= 10 ? Math.round(v) : Number(v.toPrecision(1))); };
const list = (xs) => xs.length < 2 ? xs.join("") : `${xs.slice(0, -1).join(", ")} and ${xs.at(-1)}`;
const lead = (xs) => xs.length > 4 ? xs.slice(0, 4) : xs;
const below = (losses, x) => losses.findIndex((l) => l < x);
const STARTS = {A: "A random", B: "B random", both: "both random", none: "both zero"};
const RANKS = [1, 2, 3, 4, 8, 16];

/* set: what differs from DEFAULT; alpha null: it follows r. others: further trainings whose losses are drawn thinly. */
export const PRESETS = [
  {id: "first", chip: "What is learnt first?", steps: 120, tease: 14, set: {alpha: null},
    q: "The target has directions of size 4, 2 and 1. Which does LoRA learn first?", answers: ["all at once", "the largest", "the smallest"], right: 1,
    say: ({film, t, X}) => {
      const p = film.problem, full = sharesOf(p, film.F[t]), even = Math.max(...full) - Math.min(...full) < 0.005;
      return `At step ${t} LoRA has ${list(lead(sharesOf(p, X)).map(share))} % of the ${p.sigma.length > 1 ? `${p.sigma.length > 4 ? "first four " : ""}directions` : "direction"}, full fine-tuning ${even ? `${share(full[0])} % of each` : `${list(lead(full).map(share))} %`}.`;
    }},
  {id: "bzero", chip: "Why B = 0?", steps: 150, tease: 8, set: {alpha: null, std: 0.2},
    q: "Either factor may start at zero. Which start never learns?", answers: ["A random, B = 0", "both random", "both zero"], right: 2,
    others: (toy) => ["A", "B", "both", "none"].filter((x) => x !== toy.init).map((init) => ({toy: {...toy, init}, label: STARTS[init]})),
    say: ({film, t, more}) => {
      if (film.toy.init === "none") return `With both zero each factor's gradient is the other times G: ${num(1 - film.loss[t])} learnt after ${t} step${t === 1 ? "" : "s"}.`;
      const rows = [[STARTS[film.toy.init], film.loss], ...more.map((o) => [o.label, o.film.loss])];
      const each = rows.map(([name, l]) => `${name} ${below(l, 0.01) < 0 ? name === STARTS.none ? "never" : "later" : `at ${below(l, 0.01)}`}${l[0] > 1.0005 ? ` (from ${fixed(l[0])})` : ""}`);
      const start = film.loss[0] === 1 ? "ΔW = 0 left the model untouched at step 0" : "it was broken before it learnt";
      return `At step ${t} the loss is ${num(film.loss[t])}; ${start}. A loss of 1 % comes with ${list(each)}.`;
    }},
  {id: "scale", chip: "Why α/r?", steps: 100, tease: 10, log: true, set: {opt: "adam", std: 0.2, eps: 0},
    q: "Under Adam: α × 4, rate ÷ 2, start of A ÷ 2. How does it train now?", answers: ["the same", "faster", "it breaks"], right: 0,
    others: (toy) => [{toy: {...toy, alpha: toy.alpha * 4, rate: toy.rate / 2, std: toy.std / 2}, label: "α × 4", dash: true}],
    say: ({film, t, more, valley}) => {
      const other = more[0]?.film.loss, gap = other ? Math.max(...film.loss.slice(0, t + 1).map((l, i) => Math.abs(l - (other[i] ?? 9e9)))) : null;
      const adam = film.toy.opt === "adam";
      const x = valley?.moved, moved = x ? ` From r = 1 to 16 your best rate moved ×${num(x.root, 2)} with α/√r, ×${num(x.r, 2)} with α/r, ×${num(x.one, 2)} with α alone.` : "";
      return (gap == null ? "" : gap === 0 ? `Over ${t} steps the two losses differ by exactly 0: ${adam ? "Adam cannot tell s from its rate" : "nothing has moved apart yet"}.` : `Over ${t} steps the two losses part by up to ${num(gap)}: ${adam ? "the start is another" : "for SGD, s counts twice"}.`) + moved;
    }},
  {id: "lowrank", chip: "What can't low rank do?", steps: 120, tease: 8, set: {alpha: null, r: 2, rstar: 8, spectrum: "flat"},
    q: "Eight equal directions, rank 2. Where does the loss end?", answers: ["at 0", "at 0.25", "at 0.75"], right: 2,
    say: ({film, t, floor}) => floor < 1e-12 ? `Rank ${film.toy.r} can hold all ${film.toy.rstar} directions: nothing stops it; the loss is ${num(film.loss[t])} at step ${t}.`
      : `Rank ${film.toy.r} cannot pass ${fixed(floor, 3)}: the rest of ΔW* holds ${share(floor)} % of its energy. At step ${t} the loss is ${fixed(film.loss[t], 3)}.`},
  {id: "full", chip: "Is r = 16 full?", steps: 600, tease: 30, log: true, set: {alpha: null, r: 16, rstar: 16, spectrum: "linear"},
    q: "A 16 × 24 matrix and r = 16. Does LoRA reach what full fine-tuning does?", answers: ["never quite", "yes, and it is smaller", "yes, but it is larger"], right: 2,
    say: ({film, t, X}) => {
      const gap = Math.sqrt(square(less(X, film.F[t])) / square(film.F[t])), size = film.toy.r * (D + K) / (D * K);
      return `${t ? `At step ${t} the two matrices are ${gap < 1e-3 ? num(gap) : `${share(gap)} %`} apart` : "Both start at zero"}, with ${num(size)}× the numbers: LoRA is smaller only below r = dk/(d+k) = ${num(D * K / (D + K), 2)}.`;
    }},
  {id: "noise", chip: "Is more rank better?", steps: 600, tease: 24, peak: 0.4, set: {alpha: null, r: 3, inputs: "samples", std: 0.05, rate: 0.03},
    q: "64 noisy samples of a task of rank 3. Which rank does best on new inputs?", answers: ["1", "3", "16"], right: 1,
    others: (toy) => RANKS.filter((r) => r !== toy.r).map((r) => ({toy: {...toy, r, alpha: r}, label: `r ${r}`})),
    say: ({film, t, more}) => {
      const held = film.held.length ? film.held : film.loss, full = film.fullHeld.length ? film.fullHeld : film.full;
      const all = [[film.toy.r, held.at(-1)], ...more.map((o) => [o.toy.r, (o.film.held.length ? o.film.held : o.film.loss).at(-1)])].sort((a, b) => a[1] - b[1]);
      const best = all.length > 1 ? ` After ${film.loss.length - 1} steps rank ${all[0][0]} is best (${num(all[0][1])})` : "";
      const times = full.at(-1) / all[0][1];
      return `Rank ${film.toy.r} stands at ${num(held[t])} on new inputs at step ${t}.${best}${best && times > 1.05 ? `; full fine-tuning fits the noise: ${num(times, 2)}×.` : best ? "." : ""}`;
    }},
  {id: "swap", chip: "Is W0 back?", steps: 1000, tease: 1, set: {alpha: null, prec: "bf16", tasks: "fresh"},
    q: "Add BA to W0 in bf16, take it away, 1,000 times with ever new adapters. Is W0 back?", answers: ["exactly", "off as after one", "further off each time"], right: 2,
    say: ({wear, t, set}) => {
      if (set.prec === "copy") return `A copy of W0 was kept: after ${t} swaps 0 of 384 numbers differ.`;
      const n = wear.changed[t];
      return n ? `After ${t} swap${t === 1 ? "" : "s"}${set.tasks === "two" ? " of the same two adapters" : ""} ${n} of 384 numbers are no longer W0's; ‖W − W0‖ is ${num(100 * wear.error[t], 2)} % of ‖W0‖.` : `Before the first swap all 384 numbers are W0's (in ${set.prec}).`;
    }},
  {id: "cut", chip: "Cut, or train small?", steps: 800, tease: 24, set: {alpha: null, r: 8, rstar: 8, spectrum: "linear", inputs: "stretched", rate: 0.03}, cut: 3,
    q: "Train at rank 8 and cut to 3, or train at 3: which is better where inputs are stretched?", answers: ["cutting", "the same", "training at 3"], right: 2,
    others: (toy, to) => [{toy: {...toy, r: to, alpha: to}, label: `r ${to}`}],
    say: ({film, t, more, cuts, to}) => {
      if (!cuts) return "";
      const i = Math.min(cuts.length - 1, Math.round(t / film.loss.length * cuts.length)), [step, value] = cuts[i], small = more[0]?.film.loss[Math.min(step, more[0].film.loss.length - 1)];
      if (small == null) return `Cut to ${to} at step ${step}: loss ${fixed(value, 3)}.`;
      return `At step ${step}: cut to ${to} ${fixed(value, 3)}, trained at ${to} ${fixed(small, 3)}${value > 1.02 * small ? `: cutting cost ${share(value / small - 1)} %. Eckart–Young speaks of ΔW, the loss of ΔW·x.` : value < 0.98 * small ? ": so far the cut is ahead." : ": the same."}`;
    }},
];
const DIALS = {   // name: [label, kind, choices or [from, to], what it is]
  r: ["r", "int", [1, 16], "the rank: columns of B and rows of A"],
  alpha: ["α", "log2", [0.25, 64], "the scale s of BA is made of α and r"],
  rule: ["s =", "pick", {r: "α/r", root: "α/√r", one: "α"}, "how α becomes s"],
  init: ["start", "pick", STARTS, "which factor starts with random numbers"],
  rate: ["rate", "log2", [0.002, 2], "the learning rate"],
  std: ["size of the start", "log2", [0.005, 1], "standard deviation of the random start"],
  opt: ["optimiser", "pick", {sgd: "SGD", adam: "Adam"}, "how the gradient becomes a step"],
  rstar: ["true rank r*", "int", [1, 16], "how many directions the target has"],
  spectrum: ["its sizes", "pick", {halving: "halving", flat: "all equal", linear: "linear"}, "how large the target's directions are"],
  inputs: ["inputs", "pick", {plain: "plain", stretched: "stretched ×100", samples: "64 noisy samples"}, "what the layer is trained on"],
  noise: ["noise", "log2", [0.05, 2], "of the 64 samples"],
  seed: ["seed", "int", [0, 99], "other random numbers, the same dials"],
  prec: ["numbers in", "pick", {bf16: "bf16", fp32: "fp32", copy: "a kept copy"}, "how W0 is stored while adapters come and go"],
  tasks: ["adapters", "pick", {fresh: "ever new", two: "the same two"}, "which adapters are added and taken away"],
};
const MAIN = ["r", "alpha", "rule", "init", "rate"], PHONE = ["r", "rate"];   // in sight; the others are in the sheet

/* A preset and what differs from it, out of an address; whatever is not understood is left out. */
export function read(query) {
  const i = Math.max(0, PRESETS.findIndex((p) => p.id === query.get("p"))), set = {...DEFAULT, ...PRESETS[i].set};
  for (const [name, [, kind, range]] of Object.entries(DIALS)) {
    const text = query.get(name);
    if (text == null || text === "" || !(name in set)) continue;
    if (kind === "pick") { if (Object.hasOwn(range, text)) set[name] = text; continue; }
    if (name === "alpha" && text === "r") { set.alpha = null; continue; }
    const x = Number(text);
    if (Number.isFinite(x)) set[name] = Math.min(range[1], Math.max(range[0], kind === "int" ? Math.round(x) : x));
  }
  const t = query.get("t"), hide = (query.get("hide") ?? "").split(",").filter((n) => n in DIALS);
  return {preset: i, set, t: t != null && /^\d+$/.test(t) ? Math.min(PRESETS[i].steps, Number(t)) : null, hide, thirty: query.get("seeds") === "30"};
}
export function write({preset, set, t, hide, thirty}) {
  const p = PRESETS[preset], plain = {...DEFAULT, ...p.set}, out = {p: p.id, t: t ?? null, hide: hide?.length ? hide.join(",") : null, seeds: thirty ? "30" : null};
  for (const name of Object.keys(DIALS)) out[name] = set[name] === plain[name] || !(name in plain) ? null : set[name] === null ? "r" : String(set[name]);
  return out;
}
export const toyOf = (set) => { const {prec, tasks, ...toy} = set; return {...toy, alpha: set.alpha ?? set.r}; };

// ---- the picture --------------------------------------------------------------------------------------------------------
function h(tag, attrs = {}, ...kids) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) {
    if (v == null || v === false) continue;
    if (k.startsWith("on")) node.addEventListener(k.slice(2), v); else node.setAttribute(k, v === true && !k.startsWith("aria-") ? "" : v);
  }
  node.append(...kids.flat().filter((k) => k != null));
  return node;
}
const mix = (a, b, x) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * x)).join()})`;
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function palette(node) {
  const css = getComputedStyle(node), get = (name, or) => css.getPropertyValue(`--${name}`).trim() || or, dark = Boolean(node.closest(".dark"));
  return {ink: get("ll-ink", "#0f172a"), muted: get("ll-muted", "#475569"), line: get("ll-line", "#dde3ea"), edge: get("ll-edge", "#76859a"), card: get("ll-card", "#ffffff"),
    base: get("ll-base-fill", "#cbd5e1"), warm: get("ll-warm-fill", "#e8590c"), warmText: get("ll-warm", "#b4400c"), sunk: get("ll-sunk", "#eef1f5"),
    A: get("pg-a", "#6d28d9"), B: get("pg-b", "#0f766e"), plus: rgb(dark ? "#f0782b" : "#e8590c"), minus: rgb(dark ? "#5b9bf5" : "#1d4ed8"), zero: rgb(dark ? "#1b2638" : "#f3f5f8"), font: css.fontFamily};
}
/* A canvas that is sharp and as wide as its place. */
function begin(canvas, height) {
  const ratio = globalThis.devicePixelRatio || 1, width = canvas.parentElement.clientWidth;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); canvas.style.height = `${height}px`;
  }
  const c = canvas.getContext("2d");
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.clearRect(0, 0, width, height);
  return {c, width};
}
function cells(c, box, values, rows, columns, most, colours) {
  const gap = Math.min(box.w, box.v) > 5 ? 1 : 0;
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) {
    const x = Math.max(-1, Math.min(1, values[i * columns + j] / most)), power = Math.abs(x) ** 0.7;
    c.fillStyle = mix(colours.zero, x < 0 ? colours.minus : colours.plus, power);
    c.fillRect(box.x + j * box.w, box.y + i * box.v, box.w - gap, box.v - gap);
  }
}
function frame(c, box, rows, columns, colour, width = 2) { c.strokeStyle = colour; c.lineWidth = width; c.strokeRect(box.x - 2.5, box.y - 2.5, columns * box.w + 4, rows * box.v + 4); }
function text(c, words, x, y, colour, align = "left", weight = 400, size = 14) {
  c.font = `${weight} ${size}px ${c.family}`; c.fillStyle = colour; c.textAlign = align;
  if (c.halo) { c.strokeStyle = c.halo; c.lineWidth = 4; c.lineJoin = "round"; c.strokeText(words, x, y); }
  c.fillText(words, x, y);
}

function file(name, blob) {
  const a = h("a", {href: URL.createObjectURL(blob), download: name});
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 1000);
}
/* A canvas to take along: its picture, and its numbers as rows. */
function saving(what, canvas, name, rows, back) {
  const item = (words, act) => h("button", {type: "button", class: "ll-button small", onclick: act}, words);
  const png = () => {
    const out = h("canvas", {width: canvas.width, height: canvas.height}), c = out.getContext("2d");
    c.fillStyle = back(); c.fillRect(0, 0, out.width, out.height); c.drawImage(canvas, 0, 0);
    out.toBlob((blob) => file(`${name()}.png`, blob));
  };
  return h("details", {class: "ll-export pg-save"}, h("summary", {"aria-label": `Save ${what}`, title: `Save ${what}`}, "⋯"), h("div", {class: "ll-export-items"},
    item("PNG", png), item("CSV", () => file(`${name()}.csv`, new Blob([`${rows().map((line) => line.join(",")).join("\n")}\n`], {type: "text/csv"})))));
}

/* Builds the tab in root. host: query() the address' parameters, address(change), next() what follows the last preset. */
export function playground(root, host = {}) {
  const still = matchMedia("(prefers-reduced-motion: reduce)"), narrow = matchMedia("(max-width: 900px)");
  let {preset, set, t: asked, hide, thirty: many} = read(host.query?.() ?? new URLSearchParams());
  let film, more = [], cuts = null, wear = null, valley = null, seeds = null, X = null, values = null, t = 0, end = 0, seen = 0;
  let guess = null, locked = asked != null, playing = false, slow = false, last = 0, cell = null, work = 0, colours, drawn = -1;

  const part = {};
  const button = (words, act, cls = "ll-button small", more = {}) => h("button", {type: "button", class: cls, onclick: act, ...more}, words);
  part.chips = PRESETS.map((p, i) => button(`${i + 1}  ${p.chip}`, () => choose(i), "pg-chip"));
  part.q = h("h2", {class: "pg-q", id: "pg-q"});
  part.answers = [0, 1, 2].map((i) => button("", () => pick(i), "ll-button small pg-answer"));
  part.go = button("", forward, "ll-button pg-go");
  part.skip = button("skip the guess", reveal, "ll-link", {title: "Escape"});
  part.left = h("canvas", {role: "img", tabindex: 0, "aria-label": "B, A, their product and the target as coloured cells; arrow keys choose a cell of the product, the line below says its sum", "aria-describedby": "pg-cell"});
  part.right = h("canvas", {role: "img", "aria-label": "Singular values of BA beside the target's, and the loss over the steps; the line below says the numbers", "aria-describedby": "pg-live"});
  part.formula = h("p", {class: "pg-formula"});
  part.cell = h("p", {class: "pg-cell ll-note", id: "pg-cell"});
  part.live = h("p", {class: "ll-note pg-live", id: "pg-live"});
  part.say = h("p", {class: "ll-say pg-say"});
  part.dials = h("div", {class: "pg-dials"});
  part.more = h("div", {class: "pg-more"});
  part.back = button("◂", () => { settle(); seek(t - 1); }, undefined, {"aria-label": "One step back"});
  part.step = button("step ▸", () => { settle(); seek(t + 1); });
  part.slow = button("slow", () => start(true));
  part.play = button("play", () => playing ? pause() : start(false), "ll-button small pg-play");
  part.rewind = button("⟲", () => seek(0), undefined, {"aria-label": "Back to the start"});
  part.scrub = h("input", {type: "range", min: 0, step: 1, value: 0, "aria-label": "Step", class: "pg-scrub"});
  part.scrub.addEventListener("input", () => seek(Number(part.scrub.value)));
  part.at = h("output", {class: "pg-at"});
  part.seeds = button("×30 seeds", thirty, undefined, {"aria-pressed": "false"});
  part.link = button("link", copyLink, "ll-link");
  part.code = h("pre", {class: "pg-code", tabindex: 0, "aria-label": "The same in Python"});
  part.store = h("p", {class: "ll-note pg-store"});
  const pop = (words, kids, cls) => h("details", {class: `pg-pop ${cls}`}, h("summary", {}, words), h("div", {class: "pg-sheet"}, kids));
  const popMore = pop("more dials", part.more, "pg-popmore"), popCode = pop("as code", part.code, "pg-popcode");
  root.append(
    h("nav", {class: "pg-chips", "aria-label": "Eight questions"}, part.chips),
    h("div", {class: "pg-ask", role: "group", "aria-labelledby": "pg-q"}, part.q, h("div", {class: "pg-answers"}, part.answers), part.go, part.skip),
    h("div", {class: "pg-stage"},
      h("div", {class: "ll-card pg-card"}, h("div", {class: "pg-top"}, part.formula, part.store), h("div", {class: "pg-canvas"}, part.left), part.cell, saving("the matrices", part.left, () => `toy-${PRESETS[preset].id}-matrices-${Math.round(t)}`, matrixRows, () => colours.card)),
      h("div", {class: "ll-card pg-card"}, h("div", {class: "pg-canvas"}, part.right), part.live, saving("the curves", part.right, () => `toy-${PRESETS[preset].id}-curves`, curveRows, () => colours.card))),
    part.say,
    h("div", {class: "pg-controls"}, part.dials, popMore),
    h("div", {class: "pg-time"}, h("div", {class: "pg-bar"}, part.back, part.step, part.slow, part.play, part.rewind, part.scrub, part.at),
      h("div", {class: "pg-foot"}, part.seeds, part.link, popCode)));

  // ---- dials
  const dials = {};
  for (const [name, [label, kind, range, about]] of Object.entries(DIALS)) {
    const id = `pg-${name}`, said = h("output", {class: "pg-value", for: id});
    let input;
    if (kind === "pick") {
      input = h("select", {id, class: "pg-select"}, Object.entries(range).map(([v, words]) => h("option", {value: v}, words)));
      input.addEventListener("change", () => turn(name, input.value));
    } else {
      const log = kind === "log2";
      input = h("input", {id, type: "range", min: log ? Math.log2(range[0]) : range[0], max: log ? Math.log2(range[1]) : range[1], step: log ? (name === "alpha" ? 1 : 0.01) : 1});
      input.addEventListener("input", () => turn(name, log ? Number((2 ** Number(input.value)).toPrecision(name === "alpha" ? 6 : 2)) : Number(input.value)));
    }
    const tie = name === "alpha" ? button("= r", () => turn("alpha", set.alpha === null ? set.r : null), "pg-tie", {"aria-label": "α follows r", title: "α follows r, so s stays the same"}) : null;
    const box = h("div", {class: `pg-dial pg-${kind}`, title: about}, h("label", {for: id}, label), input, kind === "pick" ? null : said, tie);
    dials[name] = {box, input, said, kind, tie};
  }
  function showDials() {
    const swap = PRESETS[preset].id === "swap", main = ["prec", "tasks", ...narrow.matches ? PHONE : MAIN], place = (name) => main.includes(name) ? part.dials : part.more;
    if (Object.entries(dials).some(([name, d]) => d.box.parentNode !== place(name))) for (const [name, d] of Object.entries(dials)) place(name).append(d.box);
    for (const [name, d] of Object.entries(dials)) {
      const value = name === "alpha" ? set.alpha ?? set.r : set[name];
      d.box.hidden = hide.includes(name) || !(name in set) || (name === "noise" && set.inputs !== "samples") || (swap && !["prec", "tasks", "seed", "rstar", "spectrum"].includes(name));
      if (value === undefined) continue;
      d.input.value = d.kind === "log2" ? Math.log2(value) : value;
      d.said.textContent = num(value);
      if (d.kind !== "pick") d.input.setAttribute("aria-valuetext", num(value));
      d.tie?.setAttribute("aria-pressed", set.alpha === null);
    }
    const size = set.r * (D + K) / (D * K);
    part.store.textContent = `Stored: one task ${share(1 + size)} % of the matrix, ten tasks ${share((1 + 10 * size) / 10)} %`;
    const plain = toyOf(set), args = Object.keys(DEFAULT).filter((k) => plain[k] !== DEFAULT[k]).map((k) => `${k}=${typeof plain[k] === "string" ? JSON.stringify(plain[k]) : plain[k]}`).join(", ");
    part.code.textContent = swap ? `from lora_core.toy import Toy, swaps\n\nW = swaps(Toy(${args}), ${end}, dtype="${set.prec === "fp32" ? "fp32" : "bf16"}", fresh=${set.tasks === "fresh" ? "True" : "False"})\nprint((W[-1] != W[0]).sum())` : `from lora_core.toy import Toy, train\n\nfilm = train(Toy(${args}), steps=${PRESETS[preset].steps})\nprint(film.loss[-1], film.sigma(-1))`;
  }
  function turn(name, value) {
    set = {...set, [name]: value};
    locked = true;
    const keep = seen ? t : PRESETS[preset].steps;
    playing = false;
    showDials();
    soon(() => { t = Math.min(keep, end); seen = Math.max(seen, t); showAsk(); pause(); });
  }
  /* A film takes up to 0.2 s: what was turned or chosen is seen first. Only the last one that is due is made. */
  let due = null, ticket = 0;
  function soon(then) {
    due = then;
    work += 1;                                                   // what was going on for the last one ends
    root.dataset.ready = "false";
    cancelAnimationFrame(ticket);
    ticket = requestAnimationFrame(() => setTimeout(settle));
  }
  function settle() {
    const then = due;
    due = null;
    if (then) { rebuild(); then(); }
  }

  // ---- films
  function worn(toy) {
    const W = swaps(toy, PRESETS[preset].steps, {dtype: set.prec === "fp32" ? "fp32" : "bf16", fresh: set.tasks === "fresh", copy: set.prec === "copy"}), size = Math.sqrt(square(W[0]));
    return {W, changed: W.map((w) => w.reduce((n, v, i) => n + (v !== W[0][i]), 0)), error: W.map((w) => Math.sqrt(square(less(w, W[0]))) / size)};
  }
  function rebuild() {
    const p = PRESETS[preset], toy = toyOf(set), mine = ++work;
    [more, cuts, wear, valley, seeds, drawn] = [[], null, null, null, null, -1];
    part.seeds.setAttribute("aria-pressed", "false");
    if (p.id === "swap") {
      wear = worn(toy);
      film = {toy, problem: problem(toy), loss: wear.error, full: [], held: [], fullHeld: []};
      end = p.steps;
    } else {
      film = train(toy, p.steps);
      end = film.loss.length - 1;
    }
    part.scrub.max = end;
    const jobs = [], to = p.cut ? Math.max(1, Math.min(p.cut, set.r - 1)) : 0;
    for (const o of p.others?.(toy, to) ?? []) jobs.push(() => more.push({...o, film: train(o.toy, p.steps, {full: false, keep: false})}));
    if (p.cut) jobs.push(() => { cuts = Array.from({length: 41}, (_, i) => { const at = Math.round(i * end / 40); return [at, film.problem.error(cut(productOf(film, at), to)) / film.problem.error(new Float64Array(D * K))]; }); });
    if (p.id === "scale") {
      const best = {};
      for (const [rule, alpha] of VALLEY_RULES) for (const r of VALLEY_RANKS) jobs.push(() => {
        (best[rule] ??= []).push(VALLEY_RATES[bestRate(toy, rule, alpha, r)]);
        if (best.one?.length === VALLEY_RANKS.length) valley = {best, moved: Object.fromEntries(VALLEY_RULES.map(([n]) => [n, Math.max(...best[n]) / Math.min(...best[n])]))};
      });
    }
    run(jobs, mine);
  }
  function run(jobs, mine) {
    const next = () => {
      if (mine !== work) return;
      const until = performance.now() + 8;
      while (jobs.length && performance.now() < until) jobs.shift()();
      drawn = -1; draw();
      if (jobs.length) setTimeout(next, 4); else root.dataset.ready = "true";
    };
    root.dataset.ready = String(!jobs.length);
    if (jobs.length) setTimeout(next, 30);
  }
  function thirty(move = true) {
    settle();
    if (seeds) { seeds = null; part.seeds.setAttribute("aria-pressed", "false"); drawn = -1; draw(); tell(); return; }
    seeds = [];
    locked = true; showAsk();
    part.seeds.setAttribute("aria-pressed", "true");
    const toy = toyOf(set);
    const one = (seed) => { if (wear) return worn({...toy, seed}).error; const f = train({...toy, seed}, PRESETS[preset].steps, {full: false, keep: false}); return f.held.length ? f.held : f.loss; };
    run(Array.from({length: 30}, (_, i) => () => seeds?.push(one(i))), work);
    if (move && seen < end) return seek(end);
    seen = end; tell();
  }

  // ---- predict, lock, reveal
  function choose(i) {
    preset = i; set = {...DEFAULT, ...PRESETS[i].set}; [guess, locked, t, seen, cell, playing] = [null, false, 0, 0, null, false];
    showAsk(); showDials(); tell();
    soon(() => { showDials(); if (still.matches) seek(0, false); else start(false); });
  }
  function pick(i) { if (locked) return; guess = i; showAsk(); part.go.focus({preventScroll: true}); }
  function reveal() {
    settle();
    locked = true;
    showAsk();
    if (still.matches) seek(end); else start(false);
  }
  function forward() {
    if (!locked) return reveal();
    if (preset === PRESETS.length - 1) return host.next?.();
    choose(preset + 1);
    part.answers[0].focus({preventScroll: true});
    part.q.scrollIntoView({block: "nearest"});
  }
  function showAsk() {
    const p = PRESETS[preset], done = locked && seen >= Math.min(end, p.steps);
    part.chips.forEach((c, i) => { if (i === preset) c.setAttribute("aria-current", "true"); else c.removeAttribute("aria-current"); });
    part.q.textContent = p.q;
    part.answers.forEach((b, i) => {
      const mine = guess === i, right = done && i === p.right && untouched();
      b.textContent = `${right ? "✓ " : ""}${p.answers[i]}${mine && locked ? " · your guess" : ""}`;
      b.setAttribute("aria-pressed", mine);
      b.setAttribute("aria-disabled", locked);
      b.classList.toggle("right", right);
    });
    part.go.textContent = !locked ? "Lock my guess" : preset === PRESETS.length - 1 ? "Next: a real model" : `Next: ${PRESETS[preset + 1].chip}`;
    part.go.classList.toggle("go", !locked ? guess !== null : done);
    part.go.disabled = !locked && guess === null;
    part.skip.hidden = locked;
    const row = part.chips[0].parentElement, chip = part.chips[preset];
    if (row.scrollWidth > row.clientWidth) row.scrollLeft = chip.offsetLeft - row.offsetLeft - 40;
  }
  const untouched = () => Object.entries({...DEFAULT, ...PRESETS[preset].set}).every(([k, v]) => k === "seed" || set[k] === v);

  // ---- time
  const stop = () => locked ? end : Math.min(end, PRESETS[preset].tease);
  function start(slowly) {
    settle();
    if (t >= stop()) { t = 0; if (!locked) { guess ??= null; } }
    if (still.matches) { seek(stop()); return; }
    slow = slowly; playing = true; last = performance.now();
    showPlay();
    requestAnimationFrame(tick);
  }
  function tick(now) {
    if (!playing) return;
    if (!root.isConnected || root.clientWidth === 0) { pause(); return; }
    const speed = slow ? 3 : locked ? Math.max(12, end / 7) : stop() / 3;
    t = Math.min(stop(), t + Math.min(0.1, Math.max(0, now - last) / 1000) * speed);
    last = now;
    draw();
    if (t >= stop()) pause(); else requestAnimationFrame(tick);
  }
  function pause() {
    playing = false; t = Math.round(t);
    showPlay(); drawn = -1; draw(); tell();
  }
  function seek(to, by = true) { settle(); if (by && to > PRESETS[preset].tease && !locked) { locked = true; showAsk(); } t = Math.max(0, Math.min(end, to)); pause(); }
  function showPlay() {
    part.play.textContent = playing && !slow ? "pause" : still.matches ? "to the end" : "play";
    part.slow.hidden = still.matches;
    part.slow.setAttribute("aria-pressed", playing && slow);
    part.say.setAttribute("aria-live", playing ? "off" : "polite");
  }
  const moved = () => locked || preset > 0;
  function tell() { if (moved()) host.address?.(write({preset, set, t: locked ? Math.round(t) : null, hide, thirty: Boolean(seeds)})); }
  async function copyLink() {
    tell();
    try { await navigator.clipboard.writeText(location.href); part.link.textContent = "link copied"; } catch { part.link.textContent = "the address is the link"; }
    setTimeout(() => { part.link.textContent = "link"; }, 2500);
  }

  // ---- the numbers of both pictures
  function matrixRows() {
    const p = film.problem, all = wear ? [["W", wear.W[Math.round(t)], D, K], ["W0", wear.W[0], D, K]] : [["W0", p.W0, D, K], ["B", values.B, D, film.toy.r], ["A", values.A, film.toy.r, K], ["s*BA", X, D, K], ["target", p.target, D, K]];
    return [["matrix", "row", "column", "value"], ...all.flatMap(([name, x, n, m]) => Array.from({length: n * m}, (_, i) => [name, Math.floor(i / m) + 1, i % m + 1, x[i]]))];
  }
  function curveRows() {
    const all = wear ? [["changed numbers", wear.changed], ["relative error", wear.error]] : [["loss", film.loss], ["full fine-tuning", film.full], ...film.held.length ? [["loss on new inputs", film.held], ["full on new inputs", film.fullHeld]] : [], ...more.map((o) => [o.label, o.film.loss])];
    all.push(...(seeds ?? []).map((l, i) => [`seed ${i}`, l]));
    return [[wear ? "swap" : "step", ...all.map(([name]) => name)], ...Array.from({length: end + 1}, (_, i) => [i, ...all.map(([, l]) => l[i] ?? "")])];
  }

  // ---- drawing
  function state(step) {
    const s = scaleOf(film.toy);
    if (wear) { values = {A: null, B: null, X: less(wear.W[step], wear.W[0]), s}; X = values.X; return; }
    X = productOf(film, step);
    values = {A: film.A[step], B: film.B[step], X, s};
  }
  function draw() {
    const step = Math.max(0, Math.min(end, Math.floor(t + 1e-9)));
    if (due || step === drawn || root.clientWidth === 0) return;
    drawn = step;
    if (step > seen) { seen = step; if (seen >= end) showAsk(); }
    colours ??= palette(root);
    state(step);
    part.scrub.value = step;
    part.at.textContent = `${wear ? "swap" : "step"} ${step} of ${PRESETS[preset].steps}`;
    drawMatrices(); drawCharts(step); say(step);
  }
  function say(step) {
    const p = PRESETS[preset], toy = film.toy, energy = Array.from(film.problem.sigma, (x) => x * x), all = energy.reduce((a, b) => a + b);
    const floor = energy.slice(toy.r).reduce((a, b) => a + b, 0) / all;
    let words = p.say({film, t: step, X, more, cuts, wear, valley, set, floor, to: p.cut ? Math.max(1, Math.min(p.cut, set.r - 1)) : 0});
    const limit = 1 / (values.s * film.problem.sigma[0] * (film.problem.C ? svd(film.problem.C, K, K).sigma[0] : 1));
    if (!wear && film.diverged) {
      words = toy.opt === "adam" ? `Diverged at step ${end}: Adam moves every number by about the rate, and ${num(toy.rate)} at each step is too far. Turn the rate down.`
        : toy.rate * (film.problem.C ? limit * values.s * film.problem.sigma[0] : 1) > 0 && toy.rate > limit ? `Diverged at step ${end}: the rate ${num(toy.rate)} is ${num(toy.rate / limit, 2)} times 1/(s·σ₁) = ${num(limit)}, about the most that SGD bears here. Turn the rate down.`
          : `Diverged at step ${end}: s = ${num(values.s)} and a start of ${num(toy.std)} make the first gradients too large for the rate ${num(toy.rate)}. Turn one of them down.`;
    } else if (!wear && toy.opt === "sgd" && toy.rate > 1.05 * limit && film.loss.at(-1) > Math.min(...film.loss) + 0.05) {
      words = `It does not settle: the rate ${num(toy.rate)} is ${num(toy.rate / limit, 2)} times 1/(s·σ₁) = ${num(limit)}, so it jumps over the target again and again.`;
    }
    if (!locked && step >= p.tease) words = "A toy, training in this browser. What comes next? Guess above, lock it, and watch.";
    if (seeds?.length === 30) { const ends = seeds.map((l) => l.at(-1)).sort((a, b) => a - b); const of = (x) => wear ? `${num(100 * x, 2)} %` : num(x); words += ` Over 30 seeds ${wear ? "that" : "the loss"} ends between ${of(ends[0])} and ${of(ends[29])}, in the middle ${of(ends[15])}.`; }
    if (part.say.textContent !== words) part.say.textContent = words;
    if (wear) part.live.textContent = `${wear.changed[step]} of 384 numbers changed · ‖W − W0‖ / ‖W0‖ = ${num(wear.error[step])}`;
    else {
      const G = film.problem.gradient(X), gA = timesT1(values.B, G, toy.r, D, K, values.s, new Float64Array(toy.r * K)), gB = timesT2(G, values.A, D, K, toy.r, values.s, new Float64Array(D * toy.r));
      const held = film.held.length, ghost = (held ? film.fullHeld : film.full)[step];
      part.live.textContent = `loss ${num((held ? film.held : film.loss)[step])} · full ${Number.isFinite(ghost) ? num(ghost) : "diverged"} · ‖∂A‖ ${num(Math.sqrt(square(gA)), 2)} · ‖∂B‖ ${num(Math.sqrt(square(gB)), 2)}`;
    }
    const s = values.s, how = {r: "α/r", root: "α/√r", one: "α"}[toy.rule];
    part.formula.replaceChildren(...(wear ? [h("b", {}, "W ← W + BA − BA"), `  in ${set.prec === "copy" ? "bf16, with a kept copy" : set.prec}`]
      : [h("span", {class: "ll-base"}, "h = W0 x"), " + s·", h("b", {class: "pg-inkb"}, "B"), "·", h("b", {class: "pg-inka"}, "A"), " x", h("span", {class: "ll-muted"}, `   s = ${how} = ${num(s)}`)]));
    if (wear) part.cell.textContent = "Left: how far each number of W is from W0. Right: the adapters that come and go.";
    else if (!cell) part.cell.textContent = "Orange is above zero, blue below. Point at a cell of BA to see its sum.";
    else {
      const [i, j] = cell, terms = Array.from({length: toy.r}, (_, n) => [values.B[i * toy.r + n], values.A[n * K + j]]);
      part.cell.textContent = `${s === 1 ? "" : "s·"}(BA)[${i + 1},${j + 1}] = ${s === 1 ? "" : `${num(s)}·(`}${terms.slice(0, 3).map(([b, a]) => `${fixed(b)}·${fixed(a)}`).join(" + ")}${terms.length > 3 ? " + …" : ""}${s === 1 ? "" : ")"} = ${fixed(X[i * K + j])}; target ${fixed(film.problem.target[i * K + j])}`;
    }
  }
  let place = null;
  function drawMatrices() {
    const width = part.left.parentElement.clientWidth, narrow = width < 520, r = film.toy.r, p = film.problem;
    const wide = globalThis.innerWidth > 900, c0 = narrow ? (width - 22) / 32 : Math.min((width - 64) / 56, 10.5), v = Math.floor(Math.max(4, wide ? c0 : Math.min(c0, 10)) * 4) / 4;
    const f = r <= 8 ? v : 8 * v / r, small = narrow ? Math.min(7, (width - 20) / 48) : v;
    const px = 8 * v + 12, py = (narrow ? r * f : 8 * v) + 14, tx = narrow ? 4 : px + 24 * v + 44, ty = narrow ? py + 16 * v + 34 : py;
    const height = ty + 16 * small + 26, {c} = begin(part.left, Math.ceil(height));
    c.family = colours.font;
    const product = {x: px, y: py, w: v, v}, target = {x: tx, y: ty, w: small, v: small}, w0 = narrow ? {x: tx + 24 * small + 12, y: ty, w: (width - tx - 24 * small - 18) / 24, v: small} : {x: tx, y: 4, w: v * 0.42, v: v * 0.42};
    const b = {x: px - 8 - r * f, y: py, w: f, v}, a = {x: px, y: py - 8 - r * f, w: v, v: f};
    place = {...product, width};
    const most = Math.max(...p.target.map(Math.abs));
    if (wear) {
      const top = Math.max(1e-9, ...wear.W[end].map((w, i) => Math.abs(w - wear.W[0][i])));
      cells(c, product, values.X, D, K, top, colours); frame(c, product, D, K, colours.edge, 1);
      text(c, "W − W0", product.x, py + 16 * v + 19, colours.ink);
    } else {
      const factor = film.factor ??= Math.max(1e-6, ...film.A.concat(film.B).filter((_, i) => i % 7 === 0 || i === end).map((m) => m.reduce((x, y) => Math.max(x, Math.min(20, Math.abs(y))), 0)));
      cells(c, b, values.B, D, r, factor, colours); frame(c, b, D, r, colours.B);
      cells(c, a, values.A, r, K, factor, colours); frame(c, a, r, K, colours.A);
      cells(c, product, X, D, K, most, colours); frame(c, product, D, K, colours.warm);
      text(c, `A ${r} × 24`, px - 12, a.y + r * f / 2 + 5, colours.A, "right", 600);
      text(c, `B 16 × ${r}`, px - 8, py + 16 * v + 19, colours.B, "right", 600);
      text(c, values.s === 1 ? "BA, so far" : "s·BA, so far", px, py + 16 * v + 19, colours.warmText, "left", 600);
      if (cell) {
        c.strokeStyle = colours.ink; c.lineWidth = 2;
        c.strokeRect(b.x - 1, py + cell[0] * v - 1, r * f + 1, v + 1);
        c.strokeRect(px + cell[1] * v - 1, a.y - 1, v + 1, r * f + 1);
        c.strokeRect(px + cell[1] * v - 1, py + cell[0] * v - 1, v + 1, v + 1);
      }
    }
    cells(c, target, p.target, D, K, most, colours); frame(c, target, D, K, colours.edge, 1);
    text(c, wear ? "an adapter's BA" : "target ΔW*", target.x, target.y + 16 * small + 19, colours.ink);
    const grey = {...colours, plus: rgb(colours.muted), minus: rgb(colours.muted)};
    cells(c, w0, p.W0, D, K, 0.6, grey);
    text(c, "W0, frozen", narrow ? w0.x : w0.x + 24 * w0.w + 8, narrow ? w0.y + 16 * w0.v + 19 : w0.y + 16 * w0.v - 2, colours.muted);
  }
  function drawCharts(step) {
    const p = PRESETS[preset], tall = Math.max(250, Math.min(330, part.left.clientHeight + 30)), {c, width} = begin(part.right, tall);
    c.family = colours.font; c.halo = colours.card;
    const shown = !(p.id === "scale" && valley && locked), first = wear ? 0 : Math.round(tall * 0.42);
    if (!wear && shown) {
      const sigma = svd(X).sigma, ghost = film.F[step] && Number.isFinite(film.F[step][0]) ? svd(film.F[step]).sigma : [], goal = film.problem.sigma;
      const n = Math.min(16, Math.max(goal.length, Math.min(film.toy.r, 8), 4)), top = 24, base = first - 8, high = Math.max(goal[0] * 1.1, Math.min(sigma[0] || 0, 2 * goal[0])), w = Math.min(44, (width - 8) / n);
      text(c, "σ of s·BA", 0, 13, colours.warmText, "left", 600);
      c.strokeStyle = colours.edge; c.lineWidth = 1.5; c.strokeRect(84, 2, 9, 12); text(c, "full fine-tuning", 99, 13, colours.muted);
      c.fillStyle = colours.ink; c.fillRect(216, 7, 16, 2); text(c, "target", 238, 13, colours.muted);
      for (let i = 0; i < n; i++) {
        const x = 4 + i * w, y = (s) => base - (base - top) * Math.min(1, s / high);
        c.fillStyle = colours.warm; c.fillRect(x + w * 0.18, y(sigma[i]), w * 0.5, base - y(sigma[i]));
        if (ghost[i] > 1e-9) { c.strokeStyle = colours.edge; c.lineWidth = 1.5; c.strokeRect(x + w * 0.1, y(ghost[i]), w * 0.66, base - y(ghost[i])); }
        if (goal[i]) { c.fillStyle = colours.ink; c.fillRect(x, y(goal[i]) - 1, w * 0.86, 2); }
      }
      c.fillStyle = colours.line; c.fillRect(0, base, width, 1);
    } else if (!wear) drawValley(c, width, first);
    c.font = `400 14px ${c.family}`;
    const room = wear ? 8 : 16 + Math.max(...["full", ...more.map((o) => o.label)].map((w) => c.measureText(w).width));
    const left = wear ? 58 : 34, top = first + 26, bottom = tall - 22, right = width - room, steps = p.steps, held = film.held.length > 0;
    const main = held ? film.held : film.loss, ghost = held ? film.fullHeld : film.full, log = p.log, low = log ? 1e-6 : 0;
    const peak = wear ? Math.max(1e-9, ...main) : (film.loss[0] < 1.001 && p.peak) || Math.min(2.5, Math.max(1.05, main[0], ...(locked ? more.map((o) => o.film.loss[0]) : [])));
    const x = (i) => left + (right - left) * i / steps, y = (l) => bottom - (bottom - top) * Math.max(0, Math.min(1.02, log ? Math.log10(Math.max(l, low) / low) / Math.log10(peak / low) : l / peak));
    text(c, wear ? "‖W − W0‖ / ‖W0‖" : held ? "loss on new inputs" : `loss${log ? " (log)" : ""}`, 0, first + 13, colours.ink, "left", 600);
    for (const tick of log ? [1e-6, 1e-4, 1e-2, 1] : wear || p.peak ? [0, peak / 2, peak] : [0, 0.5, 1]) {
      if (tick > peak) continue;
      c.fillStyle = colours.line; c.fillRect(left, y(tick), right - left, 1);
      text(c, log ? `10${{"-6": "⁻⁶", "-4": "⁻⁴", "-2": "⁻²", 0: "⁰"}[Math.round(Math.log10(tick))]}` : wear ? `${num(100 * tick, 2)} %` : num(tick), left - 6, y(tick) + 5, colours.muted, "right");
    }
    const labels = [];
    const line = (l, to, colour, wide, dash = [], alpha = 1) => {
      c.beginPath(); c.strokeStyle = colour; c.lineWidth = wide; c.setLineDash(dash); c.globalAlpha = alpha;
      for (let i = 0; i <= Math.min(to, l.length - 1); i++) { if (!Number.isFinite(l[i])) break; if (i) c.lineTo(x(i), y(l[i])); else c.moveTo(x(i), y(l[i])); }
      c.stroke(); c.setLineDash([]); c.globalAlpha = 1;
    };
    c.save(); c.beginPath(); c.rect(left, top - 4, right - left + 6, bottom - top + 8); c.clip();
    for (const l of seeds ?? []) line(l, seen, colours.warm, 1, [], 0.25);
    if (locked) for (const o of more) { const l = held && o.film.held.length ? o.film.held : o.film.loss; line(l, seen, colours.muted, 1.25, o.dash ? [6, 5] : [], 0.9); labels.push([o.label, l[Math.min(seen, l.length - 1)], colours.muted]); }
    if (locked && cuts) { c.fillStyle = colours.B; for (const [i, l] of cuts) if (i <= seen) c.fillRect(x(i) - 2, y(l) - 2, 4, 4); labels.push(["cut", cuts.filter((q) => q[0] <= seen).at(-1)?.[1] ?? 1, colours.B]); }
    line(ghost, seen, colours.edge, 1.75); line(main, seen, colours.warm, 1, [], 0.45); line(main, step, colours.warm, 2.5);
    c.restore();
    if (!wear) labels.push(["full", ghost[Math.min(seen, ghost.length - 1)], colours.muted]);
    const energy = Array.from(film.problem.sigma, (s) => s * s), floor = energy.slice(film.toy.r).reduce((a, b) => a + b, 0) / energy.reduce((a, b) => a + b);
    if (locked && floor > 1e-9 && !film.problem.C && !wear) { c.strokeStyle = colours.ink; c.lineWidth = 1; c.setLineDash([3, 4]); c.beginPath(); c.moveTo(left, y(floor)); c.lineTo(right, y(floor)); c.stroke(); c.setLineDash([]); text(c, `floor ${fixed(floor, 3)}`, right, y(floor) - 6, colours.ink, "right"); }
    c.fillStyle = colours.warm; c.beginPath(); c.arc(x(step), y(main[step]), 5, 0, 7); c.fill(); c.strokeStyle = colours.card; c.lineWidth = 2; c.stroke();
    const from = x(Math.min(seen, end));
    labels.filter((l) => Number.isFinite(l[1])).map((l) => [l[0], Math.min(bottom - 3, Math.max(top + 8, y(l[1]) + 5)), l[2]]).sort((a, b) => a[1] - b[1])
      .forEach((l, i, all) => { if (i && l[1] < all[i - 1][1] + 15) l[1] = all[i - 1][1] + 15; if (l[1] < tall) text(c, l[0], from + 9, l[1], l[2]); });
    text(c, "0", left, tall - 4, colours.muted); text(c, `${steps} ${wear ? "swaps" : "steps"}`, right, tall - 4, colours.muted, "right");
  }
  /* The best rate for each rank, under the three rules: what should lie level. */
  function drawValley(c, width, tall) {
    text(c, "best rate for r = 1, 2, 4, 8, 16", 0, 13, colours.ink, "left", 600); text(c, "band: 20 seeds", 234, 13, colours.muted);
    const many = VALLEYS[set.opt], left = 34, right = width - 70, all = [...Object.values(valley.best).flat(), ...Object.values(many).flat(2).map((i) => VALLEY_RATES[i])], low = Math.min(...all) / 1.3, high = Math.max(...all) * 1.3;
    const x = (i) => left + (right - left) * i / 4, y = (v) => tall - 14 - (tall - 42) * Math.log(v / low) / Math.log(high / low);
    const ends = Object.entries({one: ["α", colours.A], r: ["α/r", colours.warmText], root: ["α/√r", colours.B]}).map(([rule, [label, colour]]) => {
      c.strokeStyle = c.fillStyle = colour; c.lineWidth = 2; c.globalAlpha = 0.16; c.beginPath();
      many[rule].forEach((b, i) => c.lineTo(x(i), y(VALLEY_RATES[b[0]]))); [...many[rule].entries()].reverse().forEach(([i, b]) => c.lineTo(x(i), y(VALLEY_RATES[b[2]]))); c.fill();
      c.globalAlpha = 1; c.beginPath(); valley.best[rule].forEach((b, i) => c.lineTo(x(i), y(b))); c.stroke();
      valley.best[rule].forEach((b, i) => { c.beginPath(); c.arc(x(i), y(b), 3, 0, 7); c.fill(); });
      return [label, y(valley.best[rule][4]) + 5, colour];
    });
    ends.sort((a, b) => a[1] - b[1]).forEach((l, i) => { if (i && l[1] < ends[i - 1][1] + 15) l[1] = ends[i - 1][1] + 15; text(c, l[0], right + 10, l[1], l[2], "left", 600); });
  }

  // ---- hands
  const point = (e) => {
    const box = part.left.getBoundingClientRect(), i = Math.floor((e.clientY - box.top - place.y) / place.v), j = Math.floor((e.clientX - box.left - place.x) / place.w);
    const now = i >= 0 && j >= 0 && i < D && j < K && !wear ? [i, j] : null;
    if (String(now) !== String(cell)) { cell = now; drawn = -1; draw(); }
  };
  part.left.addEventListener("pointermove", point);
  part.left.addEventListener("pointerdown", point);
  part.left.addEventListener("pointerleave", () => { if (document.activeElement !== part.left) { cell = null; drawn = -1; draw(); } });
  part.left.addEventListener("keydown", (e) => {
    const by = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
    if (!by || wear) return;
    e.preventDefault();
    cell = cell ? [(cell[0] + by[0] + D) % D, (cell[1] + by[1] + K) % K] : [0, 0];
    drawn = -1; draw();
  });
  root.addEventListener("keydown", (e) => {
    const open = root.querySelector("details[open]");
    if (e.key === "Escape" && open) { open.open = false; open.querySelector("summary").focus(); } else if (e.key === "Escape" && !locked) reveal();
    if (e.key === " " && !e.target.closest("button, input, select, summary")) { e.preventDefault(); part.play.click(); }
  });
  root.addEventListener("click", (e) => root.querySelectorAll("details[open]").forEach((d) => { if (!d.contains(e.target)) d.open = false; }));
  const fresh = () => { colours = null; drawn = -1; draw(); };
  new ResizeObserver(fresh).observe(root);
  new MutationObserver(fresh).observe(document.body, {attributes: true, attributeFilter: ["class"]});
  still.addEventListener?.("change", showPlay);
  narrow.addEventListener?.("change", showDials);

  rebuild();
  if (locked) { t = seen = Math.min(asked, end); }
  if (locked && many) thirty(false);
  showAsk(); showDials(); showPlay(); draw();
  return {
    begin() { if (!locked && t === 0 && !still.matches && !playing) start(false); },
    pause() { if (playing) pause(); },
  };
}

// ---- in a notebook: anywidget calls this. Only settings go to the kernel and come from it, never what is drawn.
export default {render({model, el}) {
  const plain = (change) => Object.fromEntries(Object.entries(change).filter(([, v]) => v != null).map(([k, v]) => [k, String(v)]));
  let told = null, part = null;
  const build = () => {
    part?.pause();
    const root = h("div", {class: "ll part-play"});
    el.replaceChildren(h("div", {class: `ll-lab${document.body.dataset.jpThemeLight === "false" ? " dark" : ""}`}, root));
    part = playground(root, {
      query: () => new URLSearchParams(model.get("query")),
      next: () => { part.pause(); },
      address: (change) => { told = JSON.stringify(plain(change)); model.set("query", JSON.parse(told)); model.save_changes(); },
    });
    if (model.get("query").t == null) requestAnimationFrame(() => part.begin());
  };
  const follow = () => { if (JSON.stringify(model.get("query")) !== told) build(); };
  model.on("change:query", follow);
  build();
  return () => { part.pause(); model.off("change:query", follow); };
}};
