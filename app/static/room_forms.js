/* The presenter's forms: a question of their own, and the grid with its budget. */
import {Away, Refused, fmt, get, h} from "./core.js";
import {act} from "./room.js";

const field = (label, input, note) => h("label", {class: "rm-field"}, h("span", {}, label), input, note && h("span", {class: "ll-note"}, note));

export function ownForm() {
  const text = h("textarea", {class: "ll-field", rows: 2, maxlength: 300, placeholder: "Which rank has the lowest held-out loss?"});
  const choices = Array.from({length: 5}, (_, i) => h("input", {class: "ll-field", maxlength: 120, "aria-label": `Choice ${"ABCDE"[i]}`, placeholder: i < 2 ? `choice ${"ABCDE"[i]}` : "optional", oninput: () => rights()}));
  const right = h("select", {class: "ll-field", "aria-label": "The right one"});
  const node = h("div", {class: "rm-own"}, field("Your question", text), h("div", {class: "rm-five"}, choices), field("The right one, shown after Reveal", right), h("p", {class: "ll-note"}, "Two to five choices. Predict asks it."));
  function rights() {
    const was = right.value, filled = choices.map((c, i) => [c.value.trim(), i]).filter(([t]) => t);
    right.replaceChildren(h("option", {value: ""}, "none: the run says it"), ...filled.map(([t, i]) => h("option", {value: i}, `${"ABCDE"[i]} ${t}`)));
    right.value = filled.some(([, i]) => String(i) === was) ? was : "";
  }
  rights();
  return {node, update() {},
    read() {
      const filled = choices.map((c, i) => [c.value.trim(), i]).filter(([t]) => t);
      if (!text.value.trim() || filled.length < 2) return null;
      const at = filled.findIndex(([, i]) => String(i) === right.value);
      return {text: text.value.trim(), choices: filled.map(([t]) => t), right: at < 0 ? null : at};
    },
    clear() { text.value = ""; choices.forEach((c) => { c.value = ""; }); rights(); }};
}

export function gridForm() {
  const ranks = h("input", {class: "ll-field", value: "1, 8, 64"}), sets = h("input", {class: "ll-field", value: "q v; all"}), task = h("select", {class: "ll-field"});
  const steps = h("input", {class: "ll-field", type: "number", min: 2, max: 1000, value: 30}), teams = h("input", {class: "ll-field", type: "number", min: 0, max: 20, value: 0}), minutes = h("input", {class: "ll-field", type: "number", min: 1, max: 240, value: 10});
  const fault = h("p", {class: "ll-fault", role: "alert"}), said = h("p", {class: "ll-note", role: "status"}), go = h("button", {class: "ll-button go"}, "Set the grid");
  const node = h("form", {class: "rm-gridform", onsubmit: (e) => { e.preventDefault(); send(); }}, field("Ranks", ranks), field("Matrices, sets with ;", sets), field("Task", task), field("Steps", steps), field("Teams, 0: everybody alone", teams), field("Budget in minutes", minutes), go, said, fault);
  let known = null;
  async function tasks() {
    if (task.options.length) return;
    try { const {tasks: all} = await get("room-tasks"); task.replaceChildren(...all.map((t) => h("option", {value: t}, t))); } catch (error) { if (!(error instanceof Away || error instanceof Refused)) throw error; }
  }
  async function send() {
    go.disabled = true;
    said.textContent = "Estimating each cell on this machine…";
    const whole = (t) => /^\s*\d+\s*$/.test(t) ? Number(t) : t;
    const answer = await act("grid", {ranks: ranks.value.split(",").filter((t) => t.trim()).map(whole), targets: sets.value.split(";").map((t) => t.trim() === "all" ? "all" : t.split(/[\s,]+/).filter(Boolean)).filter((t) => t.length),
      task: task.value, steps: Number(steps.value), teams: Number(teams.value), minutes: Number(minutes.value)});
    go.disabled = false;
    known = null;
    said.textContent = "";
    update(answer);
  }
  function update(view) {
    tasks();
    const g = view?.grid, key = g && JSON.stringify([g.places.map((p) => [p.rank, p.set, p.estimate_s]), g.task, g.steps, g.teams, g.minutes]);
    if (!g || key === known || go.disabled) return;
    known = key;
    const each = g.places.map((p) => p.estimate_s), all = each.reduce((a, b) => a + b, 0) + g.each_s;
    said.textContent = `${g.places.length} cells of ≈ ${fmt.time(Math.min(...each))} to ${fmt.time(Math.max(...each))} each; once through all, together, ≈ ${fmt.time(all)}, of ${g.minutes} min.`;
    if (node.contains(document.activeElement)) return;
    ranks.value = g.ranks.join(", ");
    sets.value = g.targets.map((t) => t === "all" ? t : t.join(" ")).join("; ");
    if ([...task.options].some((o) => o.value === g.task)) task.value = g.task;
    [steps.value, teams.value, minutes.value] = [g.steps, g.teams, g.minutes];
  }
  return {node, update};
}
