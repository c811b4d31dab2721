/* Presets: each fills the form from the model's shapes and this machine's speed, and says in one line what it is for. */
import {copy, fmt, h, layersOf, same, state} from "./core.js";
import {budgetOf, loadOf, timeOf} from "./budget.js";

const DEMO_S = 10, FEWEST = 24, MOST = 200;              // s; below so few steps the text hardly changes, above so many it is learnt
const EPOCHS = 5;                                        // of the paper's E2E runs
const SHARE = 0.8;                                       // of the free memory that a training may take
const range = (from, to) => Array.from({length: to - from}, (_, i) => from + i);
const names = (facts) => facts.matrices.map((m) => m.name);
const has = (facts, wanted) => { const found = wanted.filter((t) => names(facts).includes(t)); return found.length ? found : names(facts).slice(0, 2); };
const seconds = (facts, spec, about, config) => timeOf(facts, budgetOf(facts.coefficients, spec, loadOf(about, config)), about, config);

const PRESETS = [
  {name: "ten-second demo", make({facts, about, config}) {
    /* Gradients stop at the lowest adapted layer, so the upper half costs a third less; v and down learn fastest there. */
    const layers = range(Math.floor(facts.layers / 2), facts.layers), few = {...config, batch_size: 4, accumulate: 1, lr: 0.005, eval_rows: 8, eval_every: 0};
    const spec = {targets: has(facts, ["v", "down"]), rank: 8, alpha: 16, scaling: "alpha/r", layers};
    let batch = 4, steps = FEWEST, t = null;
    for (const rows of [4, 2, 1]) {
      batch = rows;
      t = seconds(facts, spec, about, {...few, batch_size: rows, steps: FEWEST});
      if (!t || t.total_s <= DEMO_S) break;
    }
    if (t) steps = Math.round(Math.min(MOST, Math.max(FEWEST, FEWEST + (DEMO_S - t.total_s) / t.step_s)));
    const set = {steps, batch_size: batch, accumulate: 1, lr: 0.005, eval_rows: 8, eval_every: 0}, all = seconds(facts, spec, about, {...config, ...set});
    return {spec, config: set, say: `For a first look: ${steps} steps of ${batch} ${batch === 1 ? "row" : "rows"} in the upper half${all ? `, ≈ ${fmt.time(all.total_s)} of training here, as long again to start and to score` : ""}. The text changes visibly.`};
  }},
  {name: "paper's setting", make({facts, about, config}) {
    const steps = Math.max(1, Math.round(EPOCHS * (about?.train_rows ?? 1000) / 8));
    const spec = {targets: has(facts, ["q", "v"]), rank: 4, alpha: 32, scaling: "alpha/r", init: "gaussian", dropout: 0.1, layers: "all"};
    const set = {steps, batch_size: 8, accumulate: 1, lr: 2e-4, schedule: "linear", warmup: 0.02, weight_decay: 0.01}, t = seconds(facts, spec, about, {...config, ...set});
    return {spec, config: set, say: `GPT-2 on E2E as in Table 11: r = 4, α = 32, five times through the rows${t ? `, ≈ ${fmt.time(t.total_s)} here` : ""}.`};
  }},
  {name: "all linear", make: ({facts}) => ({spec: {targets: names(facts), rank: 8, layers: "all"}, config: {},
    say: "Every matrix of every layer: attention and MLP, which later work found best (QLoRA, arXiv 2305.14314)."})},
  {name: "your machine's limit", make({facts, about, config, memory}) {
    const side = Math.min(...facts.matrices.map((m) => Math.min(m.in, m.out))), load = loadOf(about, config);
    const bytes = (rank) => budgetOf(facts.coefficients, {targets: names(facts), rank, layers: "all"}, load).train_bytes;
    const ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024].filter((r) => r < side).concat(side);
    const rank = memory ? ranks.filter((r) => bytes(r) <= SHARE * memory).at(-1) ?? 1 : side;
    const why = rank === side ? `no ΔW can have more, and it takes ${fmt.bytes(bytes(rank))}` : `it takes ${fmt.bytes(bytes(rank))}`;
    return {spec: {targets: names(facts), rank, layers: "all"}, config: {}, say: `The largest that fits${memory ? ` into ${fmt.bytes(memory)} of free memory` : ""}: every matrix at r = ${rank}; ${why}.`};
  }},
];

/* The row of presets; `apply` takes {spec, config}. */
export function presets(apply) {
  const say = h("p", {class: "ll-note bg-say", "aria-live": "polite"}, "Each fills the form, and says what it is for."), group = h("div", {class: "bg-presets", role: "group", "aria-label": "Presets"});
  let applied = null;
  PRESETS.forEach(({name, make}) => group.append(h("button", {type: "button", class: "ll-chip", "aria-pressed": "false", onclick: () => {
    if (!state.facts) return;
    const made = make({facts: state.facts, about: state.about, config: state.config, memory: state.boot.memory});
    applied = {name, made: copy(made)};
    say.textContent = made.say;
    apply(made);
  }}, name)));
  return {
    nodes: [group, say],
    /* Marked while the form is as the preset left it. */
    refresh() {
      const {spec, config, facts} = state, set = (of, from) => Object.fromEntries(Object.keys(of).map((k) => [k, from[k]]));
      const plain = (s) => "layers" in s ? {...s, layers: layersOf(s, facts)} : s;
      const is = applied && facts && same(set(applied.made.spec, plain(spec)), plain(applied.made.spec)) && same(set(applied.made.config, config), applied.made.config);
      group.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", Boolean(is) && b.textContent === applied.name));
      if (applied && !is) { applied = null; say.textContent = "Each fills the form, and says what it is for."; }
    },
  };
}
