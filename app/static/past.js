/* The menu of runs: the newest first, a page at a time; with many of them a search. Open one, or lay it behind. */
import {Away, Refused, emit, fmt, get, h, on, state} from "./core.js";
import {behind, openRun, overlay} from "./run.js";

const MANY = 30;                                         // that the server lists at once
const TYPING = 120;                                      // ms after a key, before the question is asked

export function past() {
  const list = h("div", {class: "tr-past"}), count = h("span", {class: "ll-muted"});
  const field = h("input", {type: "search", class: "ll-input tr-find", maxlength: 200, placeholder: "find", "aria-label": "Find runs by title, model, data, settings, status or number", hidden: true, oninput: () => { clearTimeout(wait); wait = setTimeout(load, TYPING); }});
  const more = h("button", {type: "button", class: "ll-link tr-more", onclick: () => load(true)}, "show more");
  let runs = [], total = 0, wait = 0, asked = 0;

  async function load(on_ = false) {
    const further = on_ === true, text = field.value.trim(), turn = ++asked;
    const own = runs.filter((r) => !r.recorded).length;
    let found;
    try { found = await get("runs", {text: text || null, offset: further ? own : null}); } catch (error) { if (!(error instanceof Away || error instanceof Refused)) throw error; return; }
    if (turn !== asked) return;                          // a newer question is on its way
    const kept = further ? runs : [], seen = new Set(kept.map((r) => r.id));
    runs = [...kept, ...found.runs.filter((r) => !seen.has(r.id))];
    runs = [...runs.filter((r) => !r.recorded), ...runs.filter((r) => r.recorded)];
    total = found.total;
    list.classList.toggle("many", runs.some((r) => r.id > 9999));
    if (!text) field.hidden = total <= MANY;
    if (!text && !further) emit("runs", runs);
    draw(text);
  }
  function draw(text) {
    const own = runs.filter((r) => !r.recorded).length;
    count.textContent = text ? `${fmt.int(total)} found` : total > MANY ? fmt.int(total) : "";
    const none = text ? "No run has all of these words." : "Nothing yet. Train, and each run stays here, for the next time too.";
    list.replaceChildren(...(runs.length ? runs.map(line) : [h("p", {class: "ll-note"}, none)]), ...(own < total ? [more] : []));
    marks();
  }
  const line = (r) => h("div", {class: "tr-run", "data-run": r.id},
    h("button", {type: "button", class: "tr-open", title: `Open ${r.name}: ${r.says}, on ${r.data}`, onclick: () => openRun(r.id, {refill: true, push: true})},
      h("span", {class: "tr-name"}, r.name), spark(r.curve), h("span", {class: "ll-muted"}, r.says), h("span", {class: "tr-loss"}, r.loss?.toFixed(2) ?? "–")),
    h("button", {type: "button", class: "ll-icon tr-over", "aria-pressed": "false", "aria-label": `Lay ${r.name} behind the open run`, title: "Lay it behind the open run", onclick: () => {
      const now = behind();
      overlay(now.includes(r.id) ? now.filter((n) => n !== r.id) : [...now, r.id]);
      marks();
    }}, over()));
  function marks() {
    list.querySelectorAll(".tr-run").forEach((n) => {
      const id = Number(n.dataset.run), open = id === state.run;
      n.classList.toggle("open", open);
      open ? n.firstChild.setAttribute("aria-current", "true") : n.firstChild.removeAttribute("aria-current");
      n.lastChild.style.visibility = open ? "hidden" : "";
      n.lastChild.setAttribute("aria-pressed", !open && behind().includes(id));
    });
  }
  on("start back", () => load());
  const head = h("div", {class: "ll-head tr-runs"}, h("h2", {class: "ll-h tr-h"}, "Runs ", count), field);
  return {nodes: [head, list], load, marks};
}
const over = () => h("svg", {viewBox: "0 0 20 14", width: 20, height: 14, "aria-hidden": "true"}, h("path", {d: "M1 3c4 0 5 6 9 7s6 1 9 1"}), h("path", {d: "M1 1c4 0 4 4 9 5s6 1 9 1"}));
function spark(ys) {
  const low = Math.min(...ys), high = Math.max(...ys), n = ys.length - 1 || 1;
  const d = ys.length < 2 ? "" : `M${ys.map((y, i) => `${(62 * i / n + 1).toFixed(1)} ${(20 - 18 * (y - low) / (high - low || 1)).toFixed(1)}`).join("L")}`;
  return h("svg", {viewBox: "0 0 64 22", class: "tr-spark", "aria-hidden": "true"}, h("path", {d}));
}
