/* What all parts share: making elements, saying numbers, the page's state, the server, the address. */

export function h(tag, attrs = {}, ...kids) {
  const svg = /^(svg|path|g|rect|circle|line)$/.test(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(attrs || {})) {
    if (v == null || v === false) continue;
    if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else if (k === "style") for (const [p, w] of Object.entries(v)) node.style.setProperty(p, w);
    else node.setAttribute(k, v === true && !k.startsWith("aria-") ? "" : v);
  }
  node.append(...kids.flat(Infinity).filter((k) => k != null && k !== false));
  return node;
}

export const icon = (d) => h("svg", {viewBox: "0 0 24 24", width: 20, height: 20, fill: "none", stroke: "currentColor",
  "stroke-width": 1.8, "stroke-linecap": "round", "stroke-linejoin": "round", "aria-hidden": "true"}, h("path", {d}));

export const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
export const copy = (x) => JSON.parse(JSON.stringify(x));

export const fmt = {
  int: (n) => Math.round(n).toLocaleString("en"),
  bytes: (n) => n >= 1e9 ? `${(n / 1e9).toFixed(1)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} MB`
    : n >= 1e3 ? `${(n / 1e3).toFixed(0)} kB` : `${n} B`,
  pct: (f) => `${f >= 0.1 ? (100 * f).toFixed(0) : Number((100 * f).toPrecision(2))} %`,
  time: (s) => s < 1 ? "1 s" : s < 100 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min`
    : `${Math.floor(s / 3600)} h ${Math.round(s % 3600 / 60)} min`,
  step: (s) => s < 10 ? `${s.toPrecision(2)} s` : `${Math.round(s)} s`,
  millions: (n) => n >= 1e9 ? `${(n / 1e9).toFixed(1)} B` : `${Math.round(n / 1e6)} M`,
};

/* ---- state: one of each on the page; whoever changes it says so on the bus ---------------------------------- */
export const state = {
  boot: null, facts: null, spec: null, config: null, data: null,   // the dials
  about: null,                                                     // what is known of the data
  run: null, view: null,                                           // the run that is open, and how it stands
  tab: "play", fault: null, time: null,
  get matrix() { return matrix; },                                 // "layers.12.v": the one that all tabs show
  set matrix(m) { if (m !== matrix) { matrix = m; emit("matrix", m); } },
};
let matrix = null;
const bus = new EventTarget();
export const on = (names, f) => names.split(" ").forEach((n) => bus.addEventListener(n, (e) => f(e.detail)));
export const emit = (name, detail) => bus.dispatchEvent(new CustomEvent(name, {detail}));

/* ---- the server: an answer, or Refused (the user's to mend), or Away ------------------------------------------ */
export class Refused extends Error { constructor(text, field) { super(text); this.field = field || ""; } }
export class Away extends Error {}
let away = false, knock = 0;

async function ask(path, options) {
  let response, body;
  try {
    response = await fetch(`lab/api/${path}`, options);
    body = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    gone();
    throw new Away("the server is away");
  }
  if (away) back();
  if (!response.ok || "field" in body && "error" in body) throw new Refused(body.error || `status ${response.status}`, body.field);
  return body;
}
export function get(name, query = {}) {
  const q = new URLSearchParams(Object.entries(query).filter(([, v]) => v != null));
  return ask(q.size ? `${name}?${q}` : name);
}
export const post = (name, body) => ask(name, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
export const upload = (file) => ask(`upload?${new URLSearchParams({name: file.name})}`, {method: "POST", headers: {"Content-Type": "application/octet-stream"}, body: file});

/* Away: one calm line (the frame shows it), a knock every two seconds, and everything goes on when it answers. */
function gone() {
  if (!away) { away = true; emit("away", true); }
  clearTimeout(knock);
  knock = setTimeout(async () => { try { await ask("ping"); } catch { /* it knocks again by itself */ } }, 2000);
}
function back() { away = false; clearTimeout(knock); emit("away", false); emit("back"); }
setInterval(() => { if (!document.hidden && !away) ask("ping").catch(() => {}); }, 15000);

/* ---- the address carries run, tab and matrix -------------------------------------------------------------------- */
export function address(change, push = false) {
  const q = new URLSearchParams(location.search);
  for (const [k, v] of Object.entries(change)) v == null || v === "" ? q.delete(k) : q.set(k, v);
  const url = location.pathname + (q.size ? `?${q}` : "");
  if (url !== location.pathname + location.search) history[push ? "pushState" : "replaceState"](null, "", url);
}
export const asked = (name) => new URLSearchParams(location.search).get(name);

export function show(tab, push = true) {
  if (!document.getElementById(`panel-${tab}`)) return;
  state.tab = tab;
  document.querySelectorAll(".ll-panel").forEach((p) => { p.hidden = p.id !== `panel-${tab}`; });
  if (push) address({tab}, true);
  emit("tab", tab);
}

/* ---- words about the dials ---------------------------------------------------------------------------------------- */
export const layersOf = (spec, facts = state.facts) => spec.layers === "all" ? [...Array(facts.layers).keys()] : spec.layers;
export function saySpec(spec, facts) {
  if (spec.full?.includes("all")) return "everything";
  const more = [...(spec.full ?? []).map((f) => f.replace(/^top(\d+)$/, "the last $1 layers")), spec.bottleneck && `adapter layers of ${spec.bottleneck}`, spec.prefix && `a prefix of ${spec.prefix}`].filter(Boolean).join(", ");
  if (!spec.targets.length) return more || "nothing adapted yet";
  const all = facts && facts.matrices.length === spec.targets.length && spec.targets.length > 4;
  const n = facts ? layersOf(spec, facts).length : spec.layers === "all" ? null : spec.layers.length;
  return `${more ? `${more} and ` : ""}${all ? "all matrices" : spec.targets.join(" ")}${n == null ? "" : ` in ${n} layer${n === 1 ? "" : "s"}`}`;
}
export const number = (text) => text.trim() === "" ? null : Number(text);
