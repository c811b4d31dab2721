/* What trains: LoRA, or a method that the paper compares it with (section 5.1). Each is a spec like any other. */
import {h, on, state} from "./core.js";

/* Whether a spec trains more than the factors of the matrices that it names. */
export const beyond = (spec) => Boolean(spec.full?.length || spec.bottleneck || spec.prefix || spec.targets?.includes("bias"));
/* Whether only Python can count what it costs. */
export const uncounted = (spec) => beyond(spec) || Boolean(spec.dora);
const NONE = {full: [], bottleneck: 0, prefix: 0, dora: false};
const own = (spec, facts) => spec.targets.filter((t) => facts.matrices.some((m) => m.name === t));

/* [name, size] of a spec. */
function found(spec) {
  if (spec.full?.includes("all")) return ["full", null];
  const top = spec.full?.map((f) => /^top(\d+)$/.exec(f)).find(Boolean);
  if (top) return ["last-layer", +top[1]];
  if (spec.bottleneck) return ["bottleneck", spec.bottleneck];
  if (spec.prefix) return [spec.targets.length ? "lora-prefix" : "prefix", spec.prefix];
  return [spec.targets.includes("bias") ? "bitfit" : spec.dora ? "dora" : "lora", null];
}
function specOf(name, size, kept) {
  if (name === "full") return {...NONE, targets: [], full: ["all"]};
  if (name === "last-layer") return {...NONE, targets: [], full: [`top${size}`]};
  if (name === "bitfit") return {...NONE, targets: ["bias"]};
  if (name === "bottleneck") return {...NONE, targets: [], bottleneck: size};
  if (name === "prefix") return {...NONE, targets: [], prefix: size};
  return {...NONE, targets: kept, prefix: name === "lora-prefix" ? size : 0, dora: name === "dora"};
}

/* The control; `apply` takes {spec, config}. known: [{name, title, about, size, usual, lr}] */
export function methods(known, apply) {
  const of = new Map(known.map((m) => [m.name, m])), say = h("small", {class: "ll-muted mt-say", id: "method-say"});
  const pick = h("select", {class: "ll-field", id: "method", "aria-describedby": "method-say"}, known.map((m) => h("option", {value: m.name}, m.title)));
  const size = h("input", {class: "ll-field", type: "number", min: 1, step: 1, inputmode: "numeric"}), unit = h("span"), many = h("label", {class: "ll-pick mt-size"}, unit, size);
  let kept = null;                                           // the matrices that LoRA had, to come back to
  const set = (name, n) => {
    const {spec, facts} = state;
    if (!beyond(spec) || spec.prefix && own(spec, facts).length) kept = own(spec, facts);
    const usual = kept?.length ? kept : facts.spec.targets;
    apply({spec: specOf(name, n, usual), config: {lr: of.get(name).lr}});
  };
  pick.addEventListener("change", () => state.facts ? set(pick.value, of.get(pick.value).usual) : refresh());
  size.addEventListener("input", () => { const n = +size.value; if (Number.isInteger(n) && n > 0) apply({spec: specOf(pick.value, n, own(state.spec, state.facts)), config: {}}); });
  size.addEventListener("blur", refresh);
  function refresh() {
    if (!state.spec?.targets) return;
    const [name, n] = found(state.spec), m = of.get(name);
    pick.value = name;
    many.hidden = n === null;
    if (n !== null) { unit.textContent = name === "lora-prefix" ? "prefix tokens" : m.size; if (size !== document.activeElement) size.value = n; }
    say.textContent = name === "lora" ? "" : `${m.about[0].toUpperCase()}${m.about.slice(1)}.`;
  }
  on("spec facts refill", refresh);
  refresh();
  return h("div", {class: "mt"}, h("label", {class: "ll-pick"}, h("span", {}, "method"), pick), many, say);
}
