/* A map of cells: layers across, matrices down. As a control it is a grid with one tab stop and arrow keys inside. */
import {h} from "./core.js";

/* ‖ΔW‖ has the warm ramp on every tab; other measures have cividis, which reads the same in grey. */
export const warmth = (x) => x == null ? "var(--ll-sunk)" : `color-mix(in oklab, var(--ll-warm-fill) ${Math.round(100 * clamp(x))}%, var(--ll-base-soft))`;
const CIVIDIS = ["#00204d", "#0b2f6c", "#31446b", "#4e576c", "#666970", "#7d7c78", "#958f78", "#b0a473", "#cdba69", "#ffea46"];
export function cividis(x) {
  if (x == null) return "var(--ll-sunk)";
  const at = 9 * clamp(x), i = Math.min(8, Math.floor(at));
  return `color-mix(in srgb, ${CIVIDIS[i + 1]} ${Math.round(100 * (at - i))}%, ${CIVIDIS[i]})`;
}
const clamp = (x) => Math.min(1, Math.max(0, x));

export function cellmap(targets, layers, {label, onPick, onHover, onMove = onPick, height = 26}) {
  const at = new Map(), grid = h("div", {class: "cm", role: onPick ? "grid" : "img", "aria-label": label});
  const key = (l, t) => `layers.${l}.${t}`;
  targets.forEach((t, y) => {
    const row = h("div", {class: "cm-row", role: onPick && "row"}, h("span", {class: "cm-head", role: onPick && "rowheader"}, t));
    for (let l = 0; l < layers; l++) {
      const c = h(onPick ? "button" : "span", {class: "cm-cell", role: onPick && "gridcell", type: onPick && "button",
        tabindex: onPick ? (l || y ? -1 : 0) : null, "data-m": key(l, t), style: {height: `${height}px`}});
      at.set(key(l, t), c);
      row.append(c);
    }
    grid.append(row);
  });
  const every = layers > 60 ? 10 : 5;
  const axis = h("div", {class: "cm-row cm-axis", "aria-hidden": "true"}, h("span", {class: "cm-head"}, "layer"));
  for (let l = 0; l < layers; l++) axis.append(h("span", {class: "cm-tick"}, l % every ? "" : String(l)));
  if (onPick) {
    grid.addEventListener("click", (e) => e.target.dataset.m && onPick(e.target.dataset.m));
    grid.addEventListener("keydown", (e) => {
      const [, l, t] = (e.target.dataset.m || "").split("."), y = targets.indexOf(t);
      const step = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[e.key];
      const next = step && at.get(key(+l + step[0], targets[y + step[1]]));
      if (!next) return;
      e.preventDefault();
      at.forEach((c) => { c.tabIndex = -1; });
      next.tabIndex = 0;
      next.focus();
      onMove(next.dataset.m);
    });
    if (onHover) {
      grid.addEventListener("pointerover", (e) => e.target.dataset.m && onHover(e.target.dataset.m));
      grid.addEventListener("pointerleave", () => onHover(null));
    }
  }
  return {
    node: h("div", {class: "cm-map"}, grid, axis), at, grid,
    /* values: {matrix: [value by layer]}; `say` makes the words of a cell */
    paint(values, low, high, say, colour = warmth) {
      for (const t of targets) values[t]?.forEach((v, l) => {
        const c = at.get(key(l, t));
        if (!c) return;
        c.style.background = colour(v == null ? null : (v - low) / (high - low || 1));
        onPick ? c.setAttribute("aria-label", say(l, t, v)) : c.title = say(l, t, v);
      });
    },
    mark(m) {
      at.forEach((c, k) => { k === m ? c.setAttribute("aria-selected", "true") : c.removeAttribute("aria-selected"); c.tabIndex = k === m ? 0 : -1; });
    },
  };
}
