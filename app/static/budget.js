/* The budget of a spec from the coefficients that Python sends (lora_core.budget_coefficients): the same affine form as
 * lora_core.budget, so that a dial is answered within the frame. Python confirms; a test compares the two. */

export function budgetOf(c, spec, load) {
  const layers = spec.layers === "all" ? c.layers : spec.layers.length;
  const lowest = spec.layers === "all" || !layers ? 0 : Math.min(...spec.layers);
  const matrices = spec.targets.length * layers;
  const sides = (of) => spec.rank * layers * spec.targets.reduce((sum, t) => sum + (of[t] || 0), 0);
  const n = sides(spec.train_A === false ? c.out : c.per_rank);                     // a frozen A is not trained…
  const kept = sides(c.per_rank) * (["pissa", "gradient"].includes(spec.init) ? 2 : 1);   // …but is in the file
  const depth = (c.layers - lowest) / c.layers, {tokens, labelled} = load;
  const logits = labelled * c.logit_bytes;
  return {
    trainable: n, fraction: n / c.total, total: c.total, matrices,
    file_bytes: kept ? c.file_bytes * kept + c.header * matrices : 0, full_bytes: c.weights,
    train_bytes: c.weights + tokens * c.act_per_token * depth + logits + c.state * n,
    full_train_bytes: c.weights + tokens * (c.act_per_token + c.inputs_per_token) + logits + c.full_state * c.total,
    step_flops: 2 * c.body * tokens * (1 + depth) + 4 * c.head * labelled + 6 * n * tokens,
  };
}

/* The tokens of one step: those of a row, times the rows. */
export function loadOf(about, config) {
  const rows = (config.batch_size || 1) * (config.accumulate || 1);
  return {rows, tokens: Math.round(rows * (about?.tokens ?? 64)), labelled: Math.round(rows * (about?.labelled ?? 32))};
}

/* Seconds of a step and of the whole run, as lora_core.estimate has it; null until the machine's speed is known. */
export function timeOf(facts, budget, about, config) {
  if (!facts?.s_per_flop || !about) return null;
  const {rows} = loadOf(about, config), {body, stream} = facts.coefficients;
  const step_s = (budget.step_flops + 4 * body * stream) * facts.s_per_flop;
  const held = Math.min(about.held_rows, config.eval_rows), eval_s = 0.45 * budget.step_flops * facts.s_per_flop * held / rows;
  const every = config.eval_every || Math.max(1, Math.round(config.steps / 3));
  let evals = 2;                                          // of the base, and at the end
  for (let s = every; s < config.steps; s += every) evals += config.steps - s > every / 2;
  return {step_s, total_s: config.steps * step_s + (held ? evals * eval_s : 0)};
}
