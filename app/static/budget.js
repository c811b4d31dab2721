/* The budget of a spec from the coefficients that Python sends (lora_core.budget_coefficients): the same form as
 * lora_core.budget, so that a dial is answered within the frame. Python confirms; a test compares the two. */

export function budgetOf(c, spec, load) {
  const {tokens, labelled} = load, {rank, targets} = spec, frozen = spec.train_A === false;
  const layers = spec.layers === "all" ? c.layers : spec.layers.length;
  const lowest = spec.layers === "all" || !layers ? 0 : Math.min(...spec.layers), depth = (c.layers - lowest) / c.layers;
  const anchored = ["pissa", "gradient"].includes(spec.init);
  const over = (of) => layers * targets.reduce((sum, t) => sum + (of[t] || 0), 0);
  const matrices = over(c.modules), sides = rank * over(c.per_rank), out = rank * over(c.out);
  const n = frozen ? out : sides;                          // a frozen A is not trained…
  const twice = anchored ? 2 : 1, kept = twice * sides;    // …but is kept, and in the file
  const logits = labelled * c.logit_bytes, stages = [...new Set(targets.map((t) => c.stage[t]))], start = Math.min(...stages);
  const inputs = layers * stages.reduce((sum, i) => sum + c.inputs[i], 0) + rank * matrices;
  /* Of the lowest layer's matrices at the first stage: nothing flows on below them. */
  const ends = rank * targets.filter((t) => c.stage[t] === start).reduce((sum, t) => sum + c.per_rank[t] * twice - c.out[t], 0);
  const factors = 4 * out + 2 * sides + (frozen ? 1 : 2) * 2 * (sides - out) + (anchored ? 4 * sides : 0) - 2 * ends;
  return {
    trainable: n, fraction: n / c.total, total: c.total, matrices,
    file_bytes: c.file_bytes * twice * rank * over(c.stored) + c.header * matrices, full_bytes: c.weights,
    train_bytes: c.weights + tokens * (c.act_per_token * depth + c.width * inputs) + logits + c.number * (kept + 4 * n),
    full_train_bytes: c.weights + tokens * (c.act_per_token + c.inputs_per_token) + logits + c.full_state * c.total,
    step_flops: 2 * tokens * (c.body * (1 + depth) - (targets.length ? c.below[start] : 0)) + 4 * c.head * labelled + tokens * factors,
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
