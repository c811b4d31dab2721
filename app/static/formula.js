/* The formula strip: h = W0·x + (α/r)·B·A·x with this form's numbers, and the chosen matrix's shapes and norms.
 * A symbol that is pointed at or in focus lights its drawing in the open tab, and a drawing its symbol. */
import {Away, Refused, address, emit, get, h, layersOf, on, state} from "./core.js";
import {openHelp} from "./help.js";

/* Where each symbol is drawn, besides whatever carries data-sym="B": the tabs' parts know nothing of the formula. */
const DRAWN = {
  x: ".lm-x", h: ".lm-h, #adapted-output", W0: ".lm-w, #base-output",
  A: ".lm-a", B: ".lm-b", r: ".lm-r, #cp-k", alpha: ".lm-alpha", s: ".lm-pair, #cp-strength",
  dW: "#spectrum-heatmap .cm-map, #spectrum-plot, #film-plot, .part-train .cm-map, .lm-m[aria-pressed='true'] .lm-ba",
};
const LIT = {s: ["s", "alpha", "r"]};                              // a symbol that is made of others lights them too
const digits = (x) => x == null ? "–" : x >= 100 ? String(Math.round(x)) : String(+x.toPrecision(3));

/* {layer, name, matrix} of the chosen matrix. Before one was chosen it is the open run's largest update, as in Train and
 * Spectra; without a run one in the middle of the model. */
export function chosen(facts = state.facts) {
  const [, l, t] = (state.matrix ?? largest(state.view?.warm?.values) ?? "").split("."), known = facts.matrices.find((m) => m.name === t) && +l < facts.layers;
  const name = known ? t : (facts.matrices.find((m) => state.spec.targets?.includes(m.name)) ?? facts.matrices[0]).name;
  return {layer: known ? +l : Math.floor(facts.layers / 2), name, matrix: facts.matrices.find((m) => m.name === name)};
}
function largest(values = {}) {
  const cells = Object.entries(values).flatMap(([name, row]) => row.map((x, layer) => ({x: x ?? 0, m: `layers.${layer}.${name}`})));
  const top = cells.reduce((a, b) => b.x > (a?.x ?? 0) ? b : a, null);
  return top?.m;
}
/* Where the chosen matrix is not what is shown: why, as the beginning of a sentence. The choice stays what it is. */
export function absent(shown, of, why = "is not in") {
  const [, l, t] = (state.matrix ?? "").split(".");
  if (!t || shown === state.matrix) return "";
  const [, layer, name] = shown.split(".");
  return `${t} of layer ${l} ${why} ${of}: showing ${name} of layer ${layer}. `;
}
export function choose(layer, name) {
  state.matrix = `layers.${layer}.${name}`;
  address({m: state.matrix});
}

export function formula() {
  const symbol = (id, cls) => h("button", {type: "button", class: `fx-s${cls ? ` ${cls}` : ""}`, "data-fx": id, tabindex: -1,
    "aria-haspopup": "dialog", onclick: (e) => openHelp(id, e.currentTarget)});
  const sym = {h: symbol("h"), W0: symbol("W0", "base"), x: symbol("x"), alpha: symbol("alpha"), r: symbol("r"),
    B: symbol("B", "warm"), A: symbol("A", "warm"), dW: symbol("dW", "warm"), nW: symbol("nW", "base")};
  const update = h("span", {class: "fx-update"}), root = h("span");
  const stretch = h("span", {title: "DoRA: c = m/‖W0 + s·B·A‖, for each row"}), end = h("span");   // empty but for DoRA
  const layer = h("select", {class: "fx-pick", "aria-label": "Layer of the chosen matrix"}), name = h("select", {class: "fx-pick", "aria-label": "The chosen matrix"});
  const shapes = h("span", {class: "fx-shapes"}), sizes = h("span", {class: "fx-sizes"}), from = h("span", {class: "fx-from"});
  const line = h("div", {class: "fx-line", role: "toolbar", "aria-label": "The formula; arrow keys move, Enter explains"},
    sym.h, " = ", stretch, sym.W0, "·", sym.x, update, end);
  const strip = h("div", {class: "fx", hidden: true}, line, h("div", {class: "fx-values"}, h("span", {class: "fx-which"}, layer, name), shapes, sizes));
  for (const [id, text] of [["h", "h"], ["W0", "W0"], ["x", "x"], ["B", "B"], ["A", "A"], ["dW", "‖ΔW‖"], ["nW", "‖W0‖"]]) sym[id].textContent = text;

  layer.onchange = name.onchange = () => choose(+layer.value, name.value);
  const all = () => [...strip.querySelectorAll(".fx-s")];
  line.addEventListener("keydown", step);
  sizes.addEventListener("keydown", step);
  function step(e) {
    const list = all(), i = list.indexOf(e.target), to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: list.length - 1}[e.key];
    if (i < 0 || to === undefined || !list[to]) return;
    e.preventDefault();
    rove(list[to]);
    list[to].focus();
  }
  function rove(to = all()[0]) { all().forEach((s) => { s.tabIndex = s === to ? 0 : -1; }); }

  /* ---- what it says */
  let norms = {}, asked = null;
  function say() {
    const {facts, spec, view} = state;
    strip.hidden = !facts || !spec?.targets || state.tab === "play";   // the toy has a formula, and numbers, of its own
    if (strip.hidden) return;
    const at = chosen(), {out, in: n} = at.matrix, on = spec.targets.includes(at.name) && layersOf(spec).includes(at.layer), rank = spec.rank;
    const focused = strip.contains(document.activeElement) ? document.activeElement.dataset.fx : null;
    sym.alpha.textContent = String(spec.alpha);
    sym.r.textContent = String(rank);
    root.textContent = spec.scaling === "alpha/sqrt(r)" ? "√" : "";
    update.replaceChildren(...on ? [" + (", sym.alpha, "/", root, sym.r, ")·", sym.B, "·", sym.A, "·x"] : []);
    stretch.textContent = on && spec.dora ? "c·(" : "";
    end.textContent = on && spec.dora ? ")" : "";
    fill(layer, [...Array(facts.layers).keys()].map((l) => [l, `layer ${l}`]), at.layer);
    fill(name, facts.matrices.map((m) => [m.name, m.name]), at.name);
    shapes.replaceChildren(...on ? [value("B", `${out}×${rank}`), value("A", `${rank}×${n}`)] : [h("span", {}, `${out}×${n}, frozen: no B·A here`)]);
    const mine = view && view.model === facts.name, dW = mine ? view.warm?.values[at.name]?.[at.layer] : null, W0 = norms[at.name]?.[at.layer];
    const other = mine && dW != null && (view.spec.rank !== rank || view.spec.alpha !== spec.alpha || view.spec.scaling !== spec.scaling);
    from.textContent = other ? `from r = ${view.spec.rank}${view.spec.alpha !== spec.alpha ? `, α = ${view.spec.alpha}` : ""}` : "";
    sizes.replaceChildren(...dW == null ? [] : [pair(sym.dW, digits(dW)), from], ...W0 == null ? [] : [pair(sym.nW, digits(W0))]);
    const scale = spec.scaling === "alpha/sqrt(r)" ? spec.alpha / Math.sqrt(rank) : spec.alpha / rank;
    const words = {h: "h, the output", W0: "W0, frozen", x: "x, the input", alpha: `alpha, ${spec.alpha}; alpha over ${root.textContent ? "the root of " : ""}r is ${digits(scale)}`,
      r: `rank r, ${rank}`, B: `B, ${out} by ${rank}`, A: `A, ${rank} by ${n}`, dW: `size of Delta W, ${digits(dW)}`, nW: `size of W0, ${digits(W0)}`};
    for (const [id, text] of Object.entries(words)) sym[id].setAttribute("aria-label", text);
    strip.title = dW && W0 ? `‖ΔW‖ is ${digits(100 * dW / W0)} % of ‖W0‖ in layer ${at.layer}, ${at.name}` : "";
    rove(all().find((s) => s.dataset.fx === focused) ?? all()[0]);
    if (focused && strip.isConnected && !strip.contains(document.activeElement)) sym[focused]?.focus();
    if (asked !== facts.name) fetchNorms(facts.name);
  }
  const value = (id, text) => h("span", {"data-sym": id}, h("b", {}, id), ` ${text}`);
  const pair = (button, text) => h("span", {class: "fx-pair"}, button, ` ${text}`);
  function fill(select, options, to) {
    const key = JSON.stringify(options);
    if (select.dataset.key !== key) { select.dataset.key = key; select.replaceChildren(...options.map(([v, text]) => h("option", {value: v}, text))); }
    select.value = String(to);
  }
  async function fetchNorms(model) {
    asked = model;
    norms = {};
    try { ({norms} = await get("weights", {name: model})); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      asked = null;                                                  // "back" asks again
      return;
    }
    say();
  }
  on("start spec facts view refill matrix tab about", say);
  on("back", () => { if (!asked) say(); });
  light(strip);
  return strip;
}

/* ---- a symbol and its drawing: one lights the other */
function light(strip) {
  let lit = [], now = "";
  function show(ids) {
    const key = ids.join();
    if (key === now) return;
    now = key;
    lit.forEach((n) => n.classList.remove("lit"));
    const panel = document.getElementById(`panel-${state.tab}`), wanted = ids.flatMap((id) => LIT[id] ?? [id]);
    const drawn = panel ? wanted.flatMap((id) => [...panel.querySelectorAll(`[data-sym~="${id}"]${DRAWN[id] ? `, ${DRAWN[id]}` : ""}`)]) : [];
    lit = [...drawn, ...wanted.flatMap((id) => [...strip.querySelectorAll(`[data-fx="${id}"], [data-sym="${id}"]`)])];
    lit.forEach((n) => n.classList.add("lit"));
  }
  const selectors = Object.entries(DRAWN);
  /* Which symbols a node is a drawing of: the nearest node upwards that is one. */
  function of(node) {
    if (!(node instanceof Element)) return [];
    const symbol = node.closest("[data-fx]");
    if (symbol) return [symbol.dataset.fx === "nW" ? "W0" : symbol.dataset.fx];
    const marked = node.closest("[data-sym]");
    if (marked) return marked.dataset.sym.split(" ");
    for (let n = node; n && n.classList && !n.classList.contains("ll-panel"); n = n.parentElement) {
      const found = selectors.filter(([, where]) => n.matches(where)).map(([id]) => id);
      if (found.length) return found.includes("A") || found.includes("B") ? found.filter((id) => id !== "dW") : found;
    }
    return [];
  }
  const seen = () => document.activeElement?.matches(":focus-visible") ? of(document.activeElement) : [];
  const at = (e) => { const ids = of(e.target); show(ids.length ? ids : seen()); };
  document.addEventListener("pointerover", at);
  document.addEventListener("focusin", at);
  document.addEventListener("focusout", () => show([]));
  on("tab", () => show([]));
}
