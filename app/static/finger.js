/* A finger that points at what can be done next: one at a time, in the order of the reading path, and gone for good once
 * that was used. It takes no click and covers nothing that can be read; screen readers have the controls' own names. */
import {h, on, state} from "./core.js";

const KEY = "ll-finger";
/* tab, what is pointed at (the first that is visible), the words */
const STEPS = [
  ["play", ".pg-answers .pg-answer:not([aria-disabled='true'])", "make a guess"],
  ["adapt", "#targets .lm-m[aria-pressed='false']", "click a matrix"],
  ["adapt", "#rank input", "change the rank"],
  ["train", "#train-button", "train it"],
  ["compare", ".cp-below input[type='range'], #cp-k", "turn this dial"],
  ["spectra", "#spectrum-heatmap [data-m]:not([aria-selected]):not([aria-label*='frozen'])", "click a cell"],
  ["questions", ".qs-choices label", "make a guess"],
];
const LOOK = 600;                                                // ms between two looks at where things stand

function used() { try { return JSON.parse(localStorage.getItem(KEY) ?? "[]"); } catch { return []; } }
function keep(done) { try { localStorage.setItem(KEY, JSON.stringify(done)); } catch { /* no storage: it points again next time */ } }

const area = (n) => { const r = n.getBoundingClientRect(); return r.width * r.height; };

export function finger() {
  const words = h("span"), node = h("div", {class: "fg", "aria-hidden": "true", hidden: true},
    h("svg", {viewBox: "0 0 24 24", width: 26, height: 26, "stroke-linejoin": "round", "stroke-linecap": "round"},
      h("path", {d: "M9 21l-4.6-6.4a1.6 1.6 0 0 1 2.5-2L9 15V4.6a1.6 1.6 0 0 1 3.2 0V11l5.3 1.1A2.4 2.4 0 0 1 19.4 15l-1.1 6z"})), words);
  let done = used(), now = null, target = null, timer = 0;
  /* Any use of what a step is about ends it, whether or not the finger stood there. */
  function note(e) {
    STEPS.forEach(([tab, where], i) => {
      if (done.includes(i) || tab !== state.tab || !e.target.closest?.(where.replace(/:not\([^)]*\)|\[aria-pressed='false'\]/g, ""))) return;
      done = [...done, i];
      keep(done);
    });
    setTimeout(look, 0);
  }
  function look() {
    const i = STEPS.findIndex(([tab], i) => tab === state.tab && !done.includes(i)), panel = document.getElementById(`panel-${state.tab}`);
    const found = i < 0 || !panel ? [] : [...panel.querySelectorAll(STEPS[i][1])].filter((n) => n.checkVisibility() && !n.disabled);
    target = found.reduce((a, n) => a && (!(n instanceof SVGElement) || area(a) >= area(n)) ? a : n, null);   // of drawings the largest: it has room
    node.hidden = !target;
    if (!target) return;
    if (now !== i) { now = i; words.textContent = STEPS[i][2]; }
    const r = target.getBoundingClientRect(), x = r.left + Math.min(r.width / 2, 60), y = r.top + Math.min(r.height * 0.75, r.height - 4);
    node.hidden = y < 0 || y > innerHeight - 10;
    node.classList.toggle("left", x > innerWidth - 170);
    node.style.left = `${Math.round(x)}px`;
    node.style.top = `${Math.round(Math.min(y, innerHeight - 44))}px`;
  }
  function watch() {
    clearInterval(timer);
    if (done.length < STEPS.length) timer = setInterval(() => { if (!document.hidden) look(); }, LOOK);
    look();
  }
  document.addEventListener("click", note, true);
  document.addEventListener("input", note, true);
  document.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") note(e); }, true);
  addEventListener("scroll", look, {passive: true});
  on("start tab", watch);
  return node;
}
