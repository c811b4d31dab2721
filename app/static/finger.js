/* A finger that points at what can be done next: one at a time, in the order of the reading path, and gone for good once
 * that was used. It takes no click; screen readers have the controls' own names. It stands where nothing is that can be
 * read or pressed: at a side of its target with its words, without them, or, where there is no room, as a ring around it. */
import {h, on, state} from "./core.js";

const KEY = "ll-finger";
/* tab, what is pointed at (the first that is visible), the words */
const STEPS = [
  ["play", ".pg-answers .pg-answer:not([aria-disabled='true'])", "make a guess"],
  ["adapt", "#targets:has(.lm-m[aria-pressed='true']) .lm-m[aria-pressed='false']", "click a matrix"],
  ["adapt", "#rank input", "change the rank"],
  ["train", "#train-button", "train it"],
  ["compare", ".cp-below input[type='range'], #cp-k", "turn this dial"],
  ["spectra", "#spectrum-heatmap [data-m]:not([aria-selected]):not([aria-label*='frozen'])", "click a cell"],
  ["questions", ".qs-choices label", "make a guess"],
];
const LOOK = 600, SELDOM = 4800, STILL = 150;                    // ms between two looks at where things stand; while a run has the processors; after the last scroll
const GAPS = [2, 8, 16, 30], EDGE = 4, BOB = 5, HAND = 26;      // px: how far from the target, from the window's edge, how it bobs, the hand's side
const CONTROLS = "button, a[href], input, select, textarea, summary, label, canvas, progress, .main-svg, [role='button'], [role='option'], [data-m]";

function used() { try { return JSON.parse(localStorage.getItem(KEY) ?? "[]"); } catch { return []; } }
function keep(done) { try { localStorage.setItem(KEY, JSON.stringify(done)); } catch { /* no storage: it points again next time */ } }

const area = (n) => { const r = n.getBoundingClientRect(); return r.width * r.height; };
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

/* What must not be covered: every line of text and every control that is in sight. */
function taken(...roots) {
  const found = [], range = document.createRange();
  const add = (r) => { if (r.width > 1 && r.height > 1 && r.bottom > 0 && r.top < innerHeight) found.push(r); };
  for (const root of roots) {
    const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let n = texts.nextNode(); n; n = texts.nextNode()) {
      if (!n.data.trim() || n.parentElement.closest(".ll-hidden, .fg") || !n.parentElement.checkVisibility()) continue;
      range.selectNodeContents(n);
      [...range.getClientRects()].forEach(add);
    }
    root.querySelectorAll(CONTROLS).forEach((n) => { if (n.checkVisibility() && !n.closest(".ll-hidden")) add(n.getBoundingClientRect()); });
  }
  return found;
}
/* Places for a box of w × t at a target r, the best first: {side, left, top, flip}. Below and above the fingertip is
 * within the target, and the words stand at the hand's right, or (flip) at its left. */
function places(r, w, t) {
  const found = [], tips = [Math.min(r.width / 2, 60), r.width / 2, 16, r.width - 16].map((x) => r.left + Math.max(0, x));
  const xs = tips.flatMap((x) => [{left: x - HAND / 2, flip: false}, {left: x + HAND / 2 - w, flip: true}]), ys = [r.top + r.height / 2 - t / 2, r.top, r.bottom - t];
  for (const gap of GAPS) {
    found.push(...xs.map((x) => ({side: "below", ...x, top: r.bottom + gap})), ...ys.map((top) => ({side: "right", left: r.right + gap, top})),
      ...ys.map((top) => ({side: "left", left: r.left - gap - w, top})), ...xs.map((x) => ({side: "above", ...x, top: r.top - gap - t - BOB})));
  }
  return found;
}

export function finger() {
  const words = h("span"), node = h("div", {class: "fg", "aria-hidden": "true", hidden: true},
    h("svg", {viewBox: "0 0 24 24", width: HAND, height: HAND, "stroke-linejoin": "round", "stroke-linecap": "round"},
      h("path", {d: "M9 21l-4.6-6.4a1.6 1.6 0 0 1 2.5-2L9 15V4.6a1.6 1.6 0 0 1 3.2 0V11l5.3 1.1A2.4 2.4 0 0 1 19.4 15l-1.1 6z"})), words);
  let done = used(), now = null, target = null, timer = 0, soon = 0, looked = 0;
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
    looked = performance.now();
    const i = STEPS.findIndex(([tab], i) => tab === state.tab && !done.includes(i)), panel = document.getElementById(`panel-${state.tab}`);
    const found = i < 0 || !panel ? [] : [...panel.querySelectorAll(STEPS[i][1])].filter((n) => n.checkVisibility() && !n.disabled);
    target = found.reduce((a, n) => a && (!(n instanceof SVGElement) || area(a) >= area(n)) ? a : n, null);   // of drawings the largest: it has room
    node.hidden = !target;
    if (!target) return;
    if (now !== i) { now = i; words.textContent = STEPS[i][2]; }
    const r = target.getBoundingClientRect();
    node.hidden = r.bottom < 0 || r.top > innerHeight - EDGE;
    if (!node.hidden) stand(r, panel);
  }
  function stand(r, panel) {
    const others = taken(panel, node.parentElement);
    node.style.width = node.style.height = "";
    for (const form of ["words", "bare"]) {
      node.dataset.form = form;
      const w = node.offsetWidth, t = node.offsetHeight;
      const place = places(r, w, t).find(({left, top}) => left >= EDGE && top >= EDGE && left + w <= innerWidth - EDGE && top + t + BOB <= innerHeight - EDGE
        && !others.some((o) => meet(o, {left, top, right: left + w, bottom: top + t + BOB})));
      if (place) return put(place, {left: place.left, top: place.top});
    }
    node.dataset.form = "ring";
    put({side: "around"}, {left: r.left - 3, top: r.top - 3, width: r.width + 6, height: r.height + 6});
  }
  function put({side, flip}, box) {
    node.dataset.side = side;
    node.classList.toggle("flip", Boolean(flip));
    for (const [name, x] of Object.entries(box)) node.style[name] = `${Math.round(x)}px`;
  }
  function watch() {
    clearInterval(timer);
    if (done.length < STEPS.length) timer = setInterval(() => { if (!document.hidden && performance.now() - looked > (state.view?.live ? SELDOM : LOOK - 50)) look(); }, LOOK);
    look();
  }
  document.addEventListener("click", note, true);
  document.addEventListener("input", note, true);
  document.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") note(e); }, true);
  addEventListener("scroll", () => { node.hidden = true; clearTimeout(soon); soon = setTimeout(look, STILL); }, {passive: true});
  addEventListener("resize", () => { node.hidden = true; clearTimeout(soon); soon = setTimeout(look, STILL); });
  on("start tab", watch);
  return node;
}
