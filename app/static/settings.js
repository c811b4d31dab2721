/* Train's settings: four that matter in the row, the rest folded behind "more". */
import {emit, h, on, same, state} from "./core.js";
import {mark} from "./help.js";

const MAIN = [["steps", "steps", 1], ["lr", "learning rate", "any"], ["batch_size", "batch", 1], ["seed", "seed", 1]];

export function settings(more) {
  const fields = new Map();                                  // name -> {where, node, field}
  const input = (where, name, step, choices) => {
    const node = choices?.length ? h("select", {class: "ll-field", "data-name": name}, choices.map((c) => h("option", {value: JSON.stringify(c)}, c === true ? "yes" : c === false ? "no" : c)))
      : h("input", {class: "ll-field", type: "number", step, min: 0, inputmode: step === 1 ? "numeric" : "decimal", "data-name": name});
    node.addEventListener("input", () => {
      const value = node.tagName === "SELECT" ? JSON.parse(node.value) : node.value === "" || !Number.isFinite(+node.value) ? null : +node.value;
      if (value === null) return;
      state[where] = {...state[where], [name]: value};
      emit(where, true);
    });
    node.addEventListener("blur", fill);
    fields.set(name, {where, node});
    return node;
  };
  const row = MAIN.map(([name, text, step]) => h("div", {class: `st-set st-${name}`}, h("label", {class: "ll-pick", id: name === "steps" ? "steps" : null}, h("span", {}, text), input("config", name, step)), mark(name, text)));
  const fold = h("details", {class: "st-more"}, h("summary", {}, "more"), h("div", {class: "st-sheet"},
    more.map(([where, name, text, help, choices]) => h("div", {class: "st-set"}, h("label", {title: help}, h("span", {}, text), input(where, name, whole(name) ? 1 : "any", choices), h("small", {}, help)), mark(name, text)))));
  addEventListener("click", (e) => { if (fold.open && !fold.contains(e.target)) fold.open = false; });
  fold.addEventListener("keydown", (e) => { if (e.key === "Escape") { fold.open = false; fold.querySelector("summary").focus(); } });

  function fill() {
    for (const [name, {where, node}] of fields) {
      const value = state[where]?.[name];
      const text = node.tagName === "SELECT" ? JSON.stringify(value) : value;
      if (node !== document.activeElement && value != null && !same(String(text), node.value)) node.value = text;
    }
  }
  /* A mark at the control that a fault is about; gives whether it is one of these. */
  function blame(field) {
    for (const [name, {node}] of fields) name === field ? node.setAttribute("aria-invalid", "true") : node.removeAttribute("aria-invalid");
    return fields.has(field);
  }
  on("facts refill config spec", fill);
  fill();
  return {nodes: [...row, fold], blame};
}
const whole = (name) => ["accumulate", "max_tokens", "eval_rows", "eval_every"].includes(name);
