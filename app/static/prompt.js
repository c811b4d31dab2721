/* Compare's prompt: a held-out example with its answer, or one's own; the address carries which. */
import {address, asked, h} from "./core.js";
import {brief} from "./link.js";

export function promptRow({onAsk, onExample}) {
  const field = h("textarea", {class: "ll-field cp-prompt", rows: 1, spellcheck: "false", "aria-label": "Prompt", placeholder: "a prompt, as the task's rows have it"});
  const pick = h("select", {class: "ll-field", "aria-label": "Held-out example"}), reference = h("p", {class: "ll-note cp-reference"});
  let examples = [], timer = 0, typed = false;

  const link = () => address({example: +pick.value ? pick.value : null, prompt: pick.value === "own" ? brief(field.value) : null});
  function choose(i) {
    pick.value = i;
    field.value = examples[i].prompt;
    reference.replaceChildren(h("b", {}, "held-out answer "), examples[i].reference);
  }
  function own(text) { pick.value = "own"; field.value = text; reference.textContent = ""; }
  pick.onchange = () => {
    if (pick.value === "own") { own(""); field.focus(); } else choose(+pick.value);
    link();
    if (pick.value !== "own") onExample(+pick.value);
  };
  field.oninput = () => { typed = true; pick.value = "own"; reference.textContent = ""; clearTimeout(timer); timer = setTimeout(link, 300); };
  field.onkeydown = (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); onAsk(); } };
  return {
    field: h("label", {id: "prompt", class: "cp-hold"}, field), pick, reference,
    get value() { return field.value; },
    get example() { return examples[+pick.value]; },
    /* A run is being opened: what is typed from now on stays. */
    begin() { typed = false; },
    /* A run's examples; what was written or linked stays, else the first is chosen. Gives which, or null for one's own. */
    fill(list, again) {
      const before = typed ? {own: field.value} : again ? {own: pick.value === "own" ? field.value : null, i: +pick.value} : {own: asked("prompt"), i: +asked("example")};
      examples = list;
      pick.replaceChildren(...(list.length ? list.map((e, i) => h("option", {value: i}, `held-out example ${i + 1}`)) : [h("option", {value: ""}, "no held-out example")]), h("option", {value: "own"}, "a prompt of your own"));
      if (before.own != null || !list.length) { own(before.own ?? ""); if (typed) link(); return null; }
      const i = list[before.i] ? before.i : 0;
      choose(i);
      return i;
    },
  };
}
