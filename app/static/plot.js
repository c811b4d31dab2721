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

const shown = new Map(), keys = new WeakMap();
export const spent = {ms: 0};                                      // on all drawing so far
/* Draws a figure into a div, or moves the one that is there to new data: the same SVG, its zoom kept. A div in a hidden
 * tab has no width; it is drawn when it gets one. */
export async function draw(div, figure) {
  const first = !shown.has(div);
  shown.set(div, figure);
  if (first) new ResizeObserver(() => { if (div.clientWidth && !div.dataset.drawn) draw(div, shown.get(div)); }).observe(div);
  if (!div.clientWidth) { delete div.dataset.drawn; return; }
  const P = await plotly();
  if (shown.get(div) !== figure || !div.clientWidth) return;       // overtaken while the script loaded
  const began = performance.now(), {data, layout} = themed(figure), key = `${div.clientWidth}x${div.clientHeight} ${JSON.stringify([data, layout])}`;
  if (div.dataset.drawn && keys.get(div) === key) return;          // it stands there already
  keys.set(div, key);
  await P.react(div, data, {...layout, autosize: true}, {displayModeBar: false, responsive: true, doubleClick: "reset"});
  div.querySelectorAll(".main-svg").forEach((s) => s.setAttribute("aria-hidden", "true"));
  div.dataset.drawn = "1";
  spent.ms += performance.now() - began;
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
/* Rows as CSV: numbers stay numbers, and a text that a spreadsheet would take for a formula gets an apostrophe. */
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
function cell(c) {
  let text = String(c ?? "");
  if (typeof c === "string" && /^[=+\-@\t\r]/.test(c) && !NUMBER.test(c)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
export const csv = (rows) => `${rows.map((line) => line.map(cell).join(",")).join("\n")}\n`;

/* A map of cells as a figure and as rows: values are {matrix: [value of layer 0, 1, …]}. */
export const mapRows = (values) => Object.keys(values ?? {}).length ? [["layer", ...Object.keys(values)],
  ...Object.values(values)[0].map((_, l) => [l, ...Object.values(values).map((row) => row[l])])] : null;
export function mapFigure(values, title, template) {
  const names = Object.keys(values ?? {});
  return names.length ? {data: [{type: "heatmap", y: names, z: names.map((n) => values[n]), xgap: 1, ygap: 1, zmin: 0, colorscale: [[0, "#e8edf3"], [1, "#e8590c"]],
    colorbar: {title: {text: title, side: "right"}, thickness: 12, outlinewidth: 0}}],
  layout: {template, xaxis: {title: {text: "layer"}, showgrid: false}, yaxis: {title: {text: "matrix"}, autorange: "reversed", showgrid: false, type: "category"}}} : null;
}

/* A drawing of ours (an SVG in the page) as a picture of its own: what the style sheets say is written into it. */
const STYLES = ["fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "opacity", "visibility", "display", "font-family", "font-size", "font-weight", "text-anchor", "text-decoration"];
function standalone(svg) {
  const box = h("div", {class: "ll", style: {position: "fixed", left: "-3000px"}}), made = svg.cloneNode(true);
  for (const [hex, name] of Object.entries(TOKENS)) box.style.setProperty(`--ll-${name}`, hex);
  made.querySelectorAll(".lit").forEach((n) => n.classList.remove("lit"));
  box.append(made);
  document.body.append(box);
  try {
    for (const node of [made, ...made.querySelectorAll("*")]) {
      const style = getComputedStyle(node);
      for (const name of STYLES) node.setAttribute(name, style.getPropertyValue(name));
    }
    for (const node of [made, ...made.querySelectorAll("*")]) ["class", "tabindex", "role", "aria-pressed", "aria-label"].forEach((n) => node.removeAttribute(n));
    made.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    return new XMLSerializer().serializeToString(made);
  } finally { box.remove(); }
}
async function drawing(svg, format, name) {
  const text = standalone(svg), {width, height} = svg.viewBox.baseVal;
  if (format === "svg") return save(`${name}.svg`, text, "image/svg+xml");
  const image = new Image(), canvas = h("canvas", {width: 2 * width, height: 2 * height}), c = canvas.getContext("2d");
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  c.fillStyle = "#ffffff";
  c.fillRect(0, 0, canvas.width, canvas.height);
  c.drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => save(`${name}.png`, blob, "image/png"));
}

/* A folded "⋯" with PNG, SVG and CSV. Pictures are taken in the light colours, on white, whatever the theme is.
 * figure() gives a Plotly figure, or svg() a drawing of ours. */
export function exports(what, {name, figure, svg, rows}) {
  async function picture(format) {
    if (svg) return svg() && drawing(svg(), format, name());
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
    item("CSV", () => { const r = rows(); if (r) save(`${name()}.csv`, csv(r), "text/csv"); })));
}
