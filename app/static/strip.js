/* One number of the same matrix in every layer, as a line below the map and in step with its columns. */
import {address, asked, h} from "./core.js";
import {exports} from "./plot.js";

const HIGH = 84, PAD = 10;

export function strip({onPick}) {
  const title = h("span", {class: "ll-muted"}), high = h("span", {class: "cm-head st-top"}), which = h("div", {class: "ll-tabs", role: "group", "aria-label": "What the line shows"}), picture = h("div", {class: "st-picture", role: "img", "aria-label": "One number of the chosen matrix by layer"}), say = h("p", {class: "ll-note"});
  const extra = h("span", {class: "sp-extra"});
  const node = h("div", {class: "sp-strip"}, h("div", {class: "sp-strip-head"}, title, extra, which, exports("the line", {name: () => `${measure}-by-layer`, figure, rows})), h("div", {class: "cm-row"}, high, picture), say);
  let linked = asked("line"), measures = {}, measure = linked ?? "sigma1", chosen = null, template = null;   // linked: what the address names, until it is there

  /* The line as a figure and as rows, to take along. */
  function rows() {
    const all = Object.entries(measures[measure]?.values ?? {});
    return all.length ? [["layer", ...all.map(([t]) => t)], ...all[0][1].map((_, l) => [l, ...all.map(([, v]) => v[l])])] : null;
  }
  function figure() {
    const m = measures[measure], [, , target] = (chosen ?? "").split(".");
    return m && {data: Object.entries(m.values).map(([t, y]) => ({x: y.map((_, l) => l), y, name: t, type: "scatter", mode: t === target ? "lines+markers" : "lines", line: {color: t === target ? "#e8590c" : "#76859a", width: t === target ? 2.5 : 1.2}})),
      layout: {template, title: {text: m.title}, xaxis: {title: {text: "layer"}}, yaxis: {title: {text: m.short}, rangemode: "tozero"}, showlegend: true}};
  }
  const at = (l, n, wide) => (l + 0.5) / n * (wide + 2) - 1;
  function paint() {
    const m = measures[measure], [, layer, target] = (chosen ?? "").split(".");
    which.replaceChildren(...Object.entries(measures).map(([id, x]) => h("button", {type: "button", "data-id": id, "aria-pressed": String(id === measure), onclick: () => { measure = id; address({line: id}); paint(); }}, x.short)));
    extra.replaceChildren(m?.extra ?? "");
    if (!m || !m.values[target]) { picture.replaceChildren(); title.textContent = `${target ?? ""} in every layer`; say.textContent = m && target ? `${target} is not in both.` : ""; return; }
    const wide = picture.clientWidth, rows = Object.entries(m.values), n = m.values[target].length;
    title.textContent = `${target} in every layer`;
    say.textContent = m.say(target, m.values[target]);
    picture.setAttribute("aria-label", `${m.title} of ${target} by layer. ${say.textContent}`);
    if (!wide) return;
    const top = m.top ?? Math.max(...rows.flatMap(([, v]) => v.filter((x) => x != null)), 1e-12), y = (x) => HIGH - PAD - (HIGH - 2 * PAD) * Math.min(1, x / top);
    const path = (v) => { let pen = "M"; return v.map((x, l) => { if (x == null) { pen = "M"; return ""; } const p = `${pen}${at(l, n, wide).toFixed(1)} ${y(x).toFixed(1)}`; pen = "L"; return p; }).join(""); };
    const others = rows.filter(([t]) => t !== target).map(([, v]) => h("path", {d: path(v), class: "other"}));
    const control = m.control?.[target], line = control == null ? [] : [h("path", {d: `M0 ${y(control)}L${wide} ${y(control)}`, class: "control"})];
    const dots = m.values[target].map((x, l) => x == null ? null : h("circle", {cx: at(l, n, wide), cy: y(x), r: l === +layer ? 5.5 : 3.2, class: l === +layer ? "is" : null}));
    picture.replaceChildren(h("svg", {width: wide, height: HIGH, "aria-hidden": "true"}, others, line, h("path", {d: path(m.values[target]), class: "main"}), dots),
      ...(control == null ? [] : [h("span", {class: "st-control", style: {top: `${Math.max(0, y(control) - 22)}px`}}, "random")]));
    high.textContent = m.number(top);
    picture.title = `${m.title} by layer; other matrices thin. Click to choose a layer.`;
  }
  picture.addEventListener("click", (e) => {
    const [, , target] = (chosen ?? "").split("."), v = measures[measure]?.values[target];
    if (!v) return;
    const box = picture.getBoundingClientRect(), l = Math.round((e.clientX - box.left + 1) / (box.width + 2) * v.length - 0.5);
    if (v[l] != null) onPick(`layers.${l}.${target}`);
  });
  new ResizeObserver(paint).observe(picture);

  const ends = (v) => v.map((x, l) => [x, l]).filter(([x]) => x != null).sort((a, b) => a[0] - b[0]);
  const told = (what, number) => (t, v) => { const e = ends(v), [low, high] = [e[0], e.at(-1)]; return e.length < 2 ? `Only layer ${low[1]} has an update of ${t}.` : `${t}: ${what} from ${number(low[0])} (layer ${low[1]}) to ${number(high[0])} (layer ${high[1]}).`; };
  const three = (x) => x >= 100 ? x.toFixed(0) : x.toPrecision(3).replace(/\.?0+$/, "");
  return {
    node,
    load(heat) {
      template = heat.measures.norm.figure.layout.template;
      measures = {sigma1: {short: "σ₁", title: "Largest singular value σ₁", values: heat.sigma1, number: three, say: told("σ₁", three)},
        stable_rank: {short: "effective rank", title: "Effective rank", values: heat.measures.stable_rank.values, number: three, say: told("effective rank", three)}};
      if (!measures[measure]) measure = "sigma1";
      paint();
    },
    /* One more measure, or (null) one less: {short, title, values, say, number, top, control, extra: a node}. */
    add(id, m) {
      if (m) { measures[id] = m; measure = linked in measures ? linked : id; linked = null; } else { delete measures[id]; if (measure === id) measure = "sigma1"; }
      paint();
    },
    mark(m) { chosen = m; paint(); },
  };
}
