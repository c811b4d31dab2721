/* Where the adapter speaks: a text token by token, darker where the token's probability moved more, or where the whole
 * distribution did (KL); and for one token what both models held for likely there. One tab stop, arrow keys inside. */
import {fmt, h} from "./core.js";

const FULL = {d: 6, kl: 4};                                 // nats at which a token is as dark as can be

export function tokenStrip() {
  const strip = h("div", {class: "cp-tokens", role: "listbox", "aria-label": "The text by token; arrow keys move", "aria-orientation": "horizontal"});
  const detail = h("div", {class: "cp-detail"});
  let list = null, by = "d";
  const at = (e) => e.target.closest?.("[data-i]")?.dataset.i;
  strip.addEventListener("pointerover", (e) => at(e) && explain(+at(e)));
  strip.addEventListener("focusin", (e) => at(e) && explain(+at(e)));
  strip.addEventListener("click", (e) => at(e) && explain(+at(e)));
  strip.addEventListener("keydown", (e) => {
    const i = +at(e), to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: list.length - 1}[e.key], n = strip.children[to];
    if (!n) return;
    e.preventDefault();
    n.focus();
  });
  function explain(i) {
    const t = list[i], visible = (w) => w.replace(/^ /, "␣").replaceAll("\n", "↵").replaceAll("\t", "→") || "∅";
    [...strip.children].forEach((n, j) => { n.setAttribute("aria-selected", j === i); n.tabIndex = j === i ? 0 : -1; });
    const p = (x) => x >= 0.995 ? "1.00" : x < 0.005 ? x.toExponential(0) : x.toFixed(2);
    const column = (name, tops, cls) => h("div", {class: "cp-col"}, h("span", {class: cls}, `${name}'s likeliest`), tops.map(([w, x]) => h("span", {class: "cp-p"},
      h("code", {class: w === t.t ? "is" : null}, visible(w)), h("span", {class: "cp-bar", "aria-hidden": "true"}, h("i", {class: `${cls}-bar`, style: {width: `${Math.max(1, 100 * x)}%`}})), h("span", {class: "ll-muted"}, p(x)))));
    detail.replaceChildren(h("p", {class: "cp-said"}, h("code", {}, visible(t.t)), ` ${moved(t.d)}`,
      h("span", {class: "ll-muted"}, ` p ${p(Math.exp(t.p[0]))} → ${p(Math.exp(t.p[1]))}${t.kl == null ? "" : `; KL ${t.kl.toFixed(2)} nats`}`)), column("base", t.base, "ll-base"), column("adapted", t.adapted, "ll-warm"));
  }
  return {
    nodes: [strip, detail],
    show(tokens, empty = "", measure = "d") {
      if (tokens === list && measure === by) { if (!list?.length) detail.replaceChildren(h("p", {class: "ll-note"}, empty)); return; }
      list = tokens;
      by = measure;
      if (!list?.length) { strip.replaceChildren(); detail.replaceChildren(h("p", {class: "ll-note"}, empty)); return; }
      strip.replaceChildren(...list.map((t, i) => h("span", {class: `cp-tok${by === "d" && t.d < -0.1 ? " less" : ""}`, role: "option", "aria-selected": "false", tabindex: -1, "data-i": i,
        style: {"--d": Math.min(1, Math.abs(t[by]) / FULL[by]).toFixed(2)}, "aria-label": `${t.t.trim() || "space"}, ${by === "d" ? moved(t.d) : `KL ${t.kl.toFixed(2)} nats`}`}, t.t.replaceAll("\n", "↵\n"))));
      explain(list.reduce((a, t, i) => t[by] > list[a][by] ? i : a, 0));
    },
  };
}
function moved(d) {
  const x = Math.exp(Math.abs(d)), how = d > 0 ? "likely" : "unlikely";
  const nats = `(${d > 0 ? "+" : "−"}${Math.abs(d).toFixed(1)} nats)`;
  if (Math.abs(d) < 0.1) return "is as likely as before";
  return `became ${x > 1000 ? "more than 1,000×" : x < 10 ? `${x.toFixed(1)}×` : `${fmt.int(x)}×`} as ${how} ${nats}`;
}
