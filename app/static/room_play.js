/* First act: Play on this device with a seed of its own. Its curve's few numbers go to the room once. */
import {Away, Refused, h, post} from "./core.js";
import {DEFAULT, PRESETS, playground, swaps, toyOf, train} from "./playground.js";

const POINTS = 41;

/* The curve of a preset with a seed, at evenly spaced steps from 0 to the last. */
export function curveOf(name, seed) {
  const p = PRESETS.find((x) => x.id === name), toy = toyOf({...DEFAULT, ...p.set, seed});
  let loss;
  if (name === "swap") {
    const W = swaps(toy, p.steps, {dtype: "bf16", fresh: true}), size = Math.hypot(...W[0]);
    loss = W.map((w) => Math.hypot(...w.map((v, i) => v - W[0][i])) / size);
  } else {
    const film = train(toy, p.steps, {full: false, keep: false});
    loss = film.held.length ? film.held : film.loss;
  }
  return {steps: p.steps, loss: Array.from({length: POINTS}, (_, i) => {
    const v = loss[Math.min(loss.length - 1, Math.round(i * p.steps / (POINTS - 1)))];
    return Number.isFinite(v) ? Math.min(v, 1e6) : 1e6;
  })};
}

export function ownPlay() {
  const node = h("div", {class: "rm-play"});
  let part = null, sent = null;
  async function send(view, tries = 0) {
    if (sent === view.round) return;
    const {steps, loss} = curveOf(view.question.name, view.seed);
    try {
      await post("room-curve", {round: view.round, seed: view.seed, steps, loss});
      sent = view.round;
    } catch (error) {
      if (!(error instanceof Away || error instanceof Refused)) throw error;
      if (error instanceof Away && tries < 10) setTimeout(() => send(view, tries + 1), 3000);
    }
  }
  return {node,
    begin(view) {
      const root = h("div", {class: "ll part-play"});
      node.replaceChildren(h("h2", {class: "rm-title"}, view.question.text), root);
      part = playground(root, {query: () => new URLSearchParams({p: view.question.name, seed: String(view.seed), t: "0"})});
      setTimeout(() => root.querySelector(".pg-play")?.click(), 60);
      setTimeout(() => send(view), 200);
    },
    end() { part?.pause(); part = null; node.replaceChildren(); }};
}
