/* Spectra: where the update is (layer by matrix), and the singular values of the one that is chosen. */
import {Away, Refused, address, get, h, on, show, state} from "./core.js";
import {cellmap, cividis, warmth} from "./cellmap.js";
import {draw, exports} from "./plot.js";

export function spectra(root) {
  const left = h("div", {id: "spectrum-heatmap", class: "sp-map"}), plot = h("div", {class: "sp-plot", id: "spectrum-plot"}), badge = h("span", {class: "ll-badge", hidden: true}, "recorded");
  const title = h("h2", {class: "ll-h"}), say = h("p", {class: "ll-say"}), facts = h("p", {class: "ll-note sp-facts"}), fault = h("p", {class: "ll-fault", role: "alert"});
  const heatTitle = h("h2", {class: "ll-h"}), heatSay = h("p", {class: "tr-say"}), scale = h("div", {class: "sp-scale"}), which = h("div", {class: "ll-tabs", role: "group", "aria-label": "What the colour shows"});
  const empty = h("section", {class: "ll-card sp-empty", hidden: true}), grid = h("div", {class: "ll-grid"},
    h("section", {class: "ll-card sp-left", style: {"--span": 7}}, h("div", {class: "ll-head"}, heatTitle, badge, which,
      exports("the map", {name: () => `update-run${state.run}-${measure}`, figure: () => heat?.measures[measure].figure, rows: () => table()})), left, scale, heatSay),
    h("section", {class: "ll-card sp-right", style: {"--span": 5}}, h("div", {class: "ll-head"}, title,
      exports("the spectrum", {name: () => `spectrum-run${state.run}-${current?.m}`, figure: () => current?.figure, rows: () => current?.rows})), plot, say, facts));
  root.append(fault, empty, grid);

  let heat = null, map = null, current = null, ghost = null, measure = "norm", cache = new Map(), opening = 0, picking = 0;
  const table = () => heat && [["layer", ...Object.keys(heat.measures[measure].values)],
    ...Object.values(heat.measures[measure].values)[0].map((_, l) => [l, ...Object.values(heat.measures[measure].values).map((r) => r[l])])];

  async function open() {
    const mine = ++opening, run = state.run;
    current = ghost = null;
    cache = new Map();
    if (run == null) return blank("After a run, the spectrum of every ΔW will be here: how strongly it acts, and along how many directions.", true);
    let found;
    try { found = await get("heat", {run}); } catch (error) {
      if (error instanceof Away) return;
      if (!(error instanceof Refused)) throw error;
      return blank(error.message);
    }
    if (mine !== opening) return;
    if (found.error) return blank(`${found.error[0].toUpperCase()}${found.error.slice(1)}.`, !found.live);
    heat = found;
    empty.hidden = true;
    grid.hidden = false;
    badge.hidden = !heat.recorded;
    heatTitle.textContent = `Layer by matrix, ${heat.name}`;
    which.replaceChildren(...Object.entries(heat.measures).map(([id, m]) => h("button", {type: "button", "data-id": id, onclick: () => { measure = id; paint(); }}, m.title)));
    build();
    pick(known(state.matrix) ? state.matrix : heat.first, false);
  }
  const known = (m) => { const [, l, t] = (m ?? "").split("."); return heat?.measures.norm.values[t]?.[+l] != null; };
  function blank(text, offer) {
    heat = null;
    grid.hidden = true;
    empty.hidden = false;
    empty.replaceChildren(h("p", {class: "ll-say"}, text), offer ? h("button", {class: "ll-button go", type: "button", onclick: () => show("train")}, "Go to training") : h("button", {class: "ll-button", type: "button", onclick: () => show("train")}, "Watch it train"));
  }
  function build() {
    if (!heat) return;
    const values = heat.measures[measure].values, names = Object.keys(values), narrow = root.clientWidth < 700, room = narrow ? 210 : Math.max(240, Math.min(480, innerHeight - 386));
    map = cellmap(names, values[names[0]].length, {label: "Layer by matrix; arrow keys move, and the spectrum follows", onPick: (m) => pick(m), onHover: hover,
      height: Math.max(22, Math.min(narrow ? 72 : 160, Math.round(room / names.length)))});
    left.replaceChildren(map.node);
    paint();
    if (current) map.mark(current.m);
  }
  function paint() {
    const {values, title: name, say: text} = heat.measures[measure], all = Object.values(values).flat().filter((x) => x != null);
    const high = Math.max(...all), low = measure === "norm" ? 0 : Math.min(...all), colour = measure === "norm" ? warmth : cividis;
    map.paint(values, low, high, (l, t, x) => x == null ? `layer ${l} ${t}, frozen` : `layer ${l} ${t}, ${name} ${x.toPrecision(3)}`, colour);
    which.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.id === measure));
    scale.replaceChildren(h("span", {}, low.toPrecision(2).replace(/^0\.0$/, "0")), h("i", {style: {background: `linear-gradient(90deg, ${Array.from({length: 10}, (_, i) => colour(i / 9)).join(",")})`}}), h("span", {}, high.toPrecision(2)),
      h("span", {class: "ll-muted"}, measure === "norm" ? `${name}, size of the update` : `${name} of ${heat.rank} (Σσ²/σ₁²)`));
    heatSay.textContent = text;
  }

  const ask = (m) => { if (!cache.has(m)) cache.set(m, get("spectrum", {run: heat.run, m}).catch((error) => { cache.delete(m); throw error; })); return cache.get(m); };
  async function pick(m, told = true) {
    const began = performance.now(), mine = ++picking;
    map.mark(m);
    ghost = null;
    fault.textContent = "";
    let r;
    try { r = await ask(m); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      if (mine === picking && error instanceof Refused) fault.textContent = error.message;   // away: the frame says so
      return;
    }
    if (mine !== picking || !heat || r.run !== heat.run) return;
    current = r;
    state.matrix = r.m;
    title.textContent = r.title;
    title.title = r.path;
    say.textContent = r.say;
    facts.replaceChildren(...r.facts.flatMap(([k, v]) => [h("span", {}, `${k} `, h("b", {}, v))]), h("span", {class: "sp-path"}, r.path));
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `Singular values of ΔW in ${r.title}. ${r.say}`);
    await draw(plot, r.figure);
    globalThis.LoraLab.clicks = [...(globalThis.LoraLab.clicks ?? []), performance.now() - began].slice(-100);
    if (told || asked()) address({m: r.m});
  }
  const asked = () => new URLSearchParams(location.search).has("m");
  /* Pointing at another cell lays its spectrum over the chosen one. */
  async function hover(m) {
    if (!current) return;
    if (!m || m === current.m || !known(m)) { if (ghost) { ghost = null; draw(plot, current.figure); } return; }
    const on = current;
    let r;
    try { r = await ask(m); } catch { return; }
    if (on !== current) return;
    ghost = r.m;
    const over = {x: r.sigma.map((_, i) => i + 1), y: r.sigma, mode: "lines", type: "scatter", line: {color: "#0f172a", width: 1.5}, opacity: 0.55, hoverinfo: "skip", name: r.m};
    draw(plot, {data: [...current.figure.data, over], layout: current.figure.layout});
  }
  let was = null, wide = null;
  on("start run ended", open);
  on("view", (v) => { const key = v && `${v.run}.${v.adapter}.${v.live}`; if (was && key !== was && v) open(); was = key; });
  on("matrix", (m) => { if (heat && known(m)) pick(m, false); });
  on("back", () => { if (!current) open(); });
  new ResizeObserver(() => { const now = root.clientWidth < 700; if (root.clientWidth && now !== wide) { wide = now; build(); } }).observe(root);
}
