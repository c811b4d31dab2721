/* What is hit: for each chosen matrix how many modules in how many layers, from the loaded model's own map. */
import {h, layersOf, on, state} from "./core.js";

/* [{name, modules, layers, also}] of a spec's targets; `also` is another name for the same matrix in these layers. */
export function hitsOf(spec, facts) {
  const layers = layersOf(spec, facts);
  return spec.targets.filter((name) => facts.matrices.some((x) => x.name === name)).map((name) => {
    const m = facts.matrices.find((x) => x.name === name), counts = layers.map((l) => m?.by_layer[l] ?? 0);
    const twice = m?.also ? layers.filter((l) => m.also.layers.includes(l)).length : 0;
    return {name, modules: counts.reduce((a, b) => a + b, 0), layers: counts.filter(Boolean).length, also: twice ? {name: m.also.name, layers: twice} : null};
  });
}
/* The target that hits nothing, as a sentence; "" where each hits something. */
export function missed(spec, facts) {
  const miss = hitsOf(spec, facts).find((x) => !x.modules);
  if (!miss) return "";
  const k = facts.matrices.find((x) => x.also?.name === miss.name);
  return `${miss.name} hits nothing in the chosen layers${k ? `: there ${k.name} is also ${miss.name}` : ""}; choose others.`;
}

const plural = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
export function hits() {
  const line = h("p", {class: "ll-note ad-hits", id: "hits", role: "status"});
  const say = () => {
    const {facts, spec} = state;
    line.replaceChildren();
    if (!facts || !layersOf(spec).length || !hitsOf(spec, facts).length) return;
    line.append("hits ", ...hitsOf(spec, facts).flatMap(({name, modules, layers, also}, i) => [i ? ", " : "", h("b", {}, name),
      ` ${i ? `${modules} in ${layers}` : `${plural(modules, "module")} in ${plural(layers, "layer")}`}${also ? ` (${name} is also ${also.name} in ${also.layers} of them)` : ""}`]));
  };
  on("spec facts refill start", say);
  say();
  return line;
}
