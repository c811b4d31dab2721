/* Plotly, loaded when the first picture is drawn, and the colours of the theme in place of those of the figures. */
import {h} from "./core.js";

/* The light palette, as app/figures.py uses it -> the token whose value stands in for it. */
const TOKENS = {"#f6f7f9": "paper", "#ffffff": "card", "#0f172a": "ink", "#475569": "muted", "#dde3ea": "line",
  "#76859a": "edge", "#cbd5e1": "base-fill", "#e8edf3": "base-soft", "#b4400c": "warm", "#e8590c": "warm-fill", "#fde6d3": "warm-soft"};
const token = (name) => getComputedStyle(document.body).getPropertyValue(`--ll-${name}`).trim();

let ready;
export const plotly = () => ready ??= new Promise((ok, no) => {
  if (globalThis.Plotly) return ok(globalThis.Plotly);
  document.head.append(h("script", {src: globalThis.LoraLab.plotly, onload: () => ok(globalThis.Plotly),
    onerror: () => { ready = null; no(new Error("plotly.min.js did not come")); }}));
});
/* Fetched when the page is quiet, so that the first picture does not wait. */
export const prefetch = () => document.head.append(h("link", {rel: "prefetch", href: globalThis.LoraLab.plotly, as: "script"}));

function recolour(x, table) {
  if (typeof x === "string") return table[x.toLowerCase()] ?? x;
  if (Array.isArray(x)) return typeof x[0] === "number" ? x : x.map((y) => recolour(y, table));
  if (x && typeof x === "object") return Object.fromEntries(Object.entries(x).map(([k, v]) => [k, recolour(v, table)]));
  return x;
}
const themed = (figure) => recolour(figure, Object.fromEntries(Object.entries(TOKENS).map(([hex, name]) => [hex, token(name)])));

const shown = new Map();
/* Draws a figure into a div, or moves the one that is there to new data: the same SVG, its zoom kept. A div in a hidden
 * tab has no width; it is drawn when it gets one. */
export async function draw(div, figure) {
  const first = !shown.has(div);
  shown.set(div, figure);
  if (first) new ResizeObserver(() => { if (div.clientWidth && !div.dataset.drawn) draw(div, shown.get(div)); }).observe(div);
  if (!div.clientWidth) { delete div.dataset.drawn; return; }
  const P = await plotly();
  if (shown.get(div) !== figure || !div.clientWidth) return;       // overtaken while the script loaded
  const {data, layout} = themed(figure);
  await P.react(div, data, {...layout, autosize: true}, {displayModeBar: false, responsive: true, doubleClick: "reset"});
  div.querySelectorAll(".main-svg").forEach((s) => s.setAttribute("aria-hidden", "true"));
  div.dataset.drawn = "1";
}
export const drawn = (div) => shown.get(div);
new MutationObserver(() => shown.forEach((figure, div) => div.isConnected && draw(div, figure)))
  .observe(document.body, {attributes: true, attributeFilter: ["class"]});

/* ---- taking a picture along ------------------------------------------------------------------------------------ */
export function save(name, text, type) {
  const a = h("a", {href: URL.createObjectURL(new Blob([text], {type})), download: name});
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 1000);
}
const cell = (c) => /[",\n]/.test(String(c ?? "")) ? `"${String(c).replaceAll('"', '""')}"` : String(c ?? "");

/* A folded "⋯" with PNG, SVG and CSV. Pictures are taken in the light colours, on white, whatever the theme is. */
export function exports(what, {name, figure, rows}) {
  async function picture(format) {
    const f = figure();
    if (!f) return;
    const P = await plotly(), box = h("div", {style: {position: "fixed", left: "-3000px", width: "960px", height: "540px"}});
    document.body.append(box);
    try {
      await P.newPlot(box, f.data, {...f.layout, paper_bgcolor: "#ffffff", width: 960, height: 540}, {staticPlot: true});
      await P.downloadImage(box, {format, filename: name(), width: 960, height: 540, scale: format === "png" ? 2 : 1});
    } finally { P.purge(box); box.remove(); }
  }
  const item = (text, act) => h("button", {type: "button", class: "ll-button small", onclick: act}, text);
  return h("details", {class: "ll-export"}, h("summary", {"aria-label": `Save ${what}`, title: `Save ${what}`}, "⋯"), h("div", {class: "ll-export-items"},
    item("PNG", () => picture("png")), item("SVG", () => picture("svg")),
    item("CSV", () => { const r = rows(); if (r) save(`${name()}.csv`, r.map((line) => line.map(cell).join(",")).join("\n") + "\n", "text/csv"); })));
}
