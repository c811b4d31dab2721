/* Spectra: where the update is (layer by matrix), and the one matrix that is chosen under the microscope (microscope.js).
 * What is looked at is a run's adapter. */
import {Away, Refused, address, asked, get, h, on, show, state} from "./core.js";
import {cellmap, cividis, warmth} from "./cellmap.js";
import {microscope} from "./microscope.js";
import {exports} from "./plot.js";
import {strip} from "./strip.js";

export function spectra(root) {
  const left = h("div", {id: "spectrum-heatmap", class: "sp-map"}), badge = h("span", {class: "ll-badge", hidden: true}, "recorded"), fault = h("p", {class: "ll-fault", role: "alert"});
  const heatTitle = h("h2", {class: "ll-h"}), heatSay = h("p", {class: "tr-say"}), scale = h("div", {class: "sp-scale"}), which = h("div", {class: "ll-tabs sp-which", role: "group", "aria-label": "What the colour shows"});
  const glass = microscope(), across = strip({onPick: (m) => pick(m)});
  const empty = h("section", {class: "ll-card sp-empty", hidden: true}), grid = h("div", {class: "ll-grid"},
    h("section", {class: "ll-card sp-left", style: {"--span": 7}}, h("div", {class: "ll-head"}, heatTitle, badge, which,
      exports("the map", {name: () => `update-${heat?.name.replaceAll(" ", "-")}-${measure}`, figure: () => heat?.measures[measure].figure, rows: () => table()})), left, scale, heatSay, across.node),
    glass.node);
  root.append(fault, empty, grid);

  let heat = null, map = null, ghost = null, measure = "norm", cache = new Map(), opening = 0, picking = 0, waiting = 0;
  const key = () => ({run: state.run});
  const table = () => heat && [["layer", ...Object.keys(heat.measures[measure].values)],
    ...Object.values(heat.measures[measure].values)[0].map((_, l) => [l, ...Object.values(heat.measures[measure].values).map((r) => r[l])])];

  async function open() {
    const mine = ++opening;
    glass.clear();
    ghost = null;
    cache = new Map();
    clearTimeout(waiting);
    if (state.run == null) return blank("After a run, the spectrum of every ΔW will be here: how strongly it acts, and along how many directions.", true);
    let found;
    try { found = await get("heat", key()); } catch (error) {
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
    if (!heat.measures[measure]) measure = "norm";
    choices();
    build();
    across.load(heat);
    pick(known(state.matrix) ? state.matrix : heat.first, false);
    beside();
  }
  /* Amplification and overlap take W0: measured in the background once somebody looks here. */
  async function beside() {
    clearTimeout(waiting);
    if (!heat || state.tab !== "spectra" || heat.measures.amplification || heat.away) return;
    const mine = opening;
    let b;
    try { b = await get("besides", key()); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      return;
    }
    if (mine !== opening || !heat) return;
    if (b.away) heat.away = b.away;
    if (b.measures) Object.assign(heat.measures, b.measures);
    else if (!b.away) waiting = setTimeout(beside, 700);
    choices(b);
  }
  function choices(b = {}) {
    const button = (id, m) => h("button", {type: "button", "data-id": id, onclick: () => { measure = id; paint(); }}, m.title);
    const later = heat.measures.amplification ? [] : [["amplification", "amplification"], ["overlap", "overlap with W0"]].map(([id, text]) =>
      h("button", {type: "button", disabled: true, "data-id": id, title: heat.away ? `Needs W0: ${heat.away}` : `Being measured beside W0${b.of ? `: ${b.done} of ${b.of} matrices` : ""}`}, text));
    which.replaceChildren(...Object.entries(heat.measures).map(([id, m]) => button(id, m)), ...later);
    pressed();
  }
  const pressed = () => which.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.id === measure));
  const known = (m) => { const [, l, t] = (m ?? "").split("."); return heat?.measures.norm.values[t]?.[+l] != null; };
  function blank(text, offer) {
    heat = null;
    grid.hidden = true;
    empty.hidden = false;
    empty.replaceChildren(h("p", {class: "ll-say"}, text), offer ? h("button", {class: "ll-button go", type: "button", onclick: () => show("train")}, "Go to training") : h("button", {class: "ll-button", type: "button", onclick: () => show("train")}, "Watch it train"));
  }
  function build() {
    if (!heat) return;
    const values = heat.measures[measure].values, names = Object.keys(values), narrow = root.clientWidth < 700, room = narrow ? 190 : Math.max(140, Math.min(420, innerHeight - 548));
    map = cellmap(names, values[names[0]].length, {label: "Layer by matrix; arrow keys move, and the spectrum follows", onPick: (m) => pick(m), onHover: hover,
      height: Math.max(20, Math.min(narrow ? 72 : 160, Math.round(room / names.length)))});
    left.replaceChildren(map.node);
    paint();
    if (glass.current) map.mark(glass.current.m);
  }
  function paint() {
    const {values, title: name, say: text} = heat.measures[measure], all = Object.values(values).flat().filter((x) => x != null);
    const high = Math.max(...all), low = measure === "norm" ? 0 : Math.min(...all), colour = measure === "norm" ? warmth : cividis, part = measure === "overlap";
    const number = (x) => part ? `${(100 * x).toPrecision(2)} %` : x.toPrecision(3), word = (l, t) => heat.words[`layers.${l}.${t}`];
    map.paint(values, low, high, (l, t, x) => x == null ? `layer ${l} ${t}, frozen` : `layer ${l} ${t}, ${name} ${number(x)}, ${word(l, t)}`, colour);
    map.at.forEach((c) => { c.title = c.getAttribute("aria-label"); });
    pressed();
    scale.replaceChildren(h("span", {}, low ? number(low) : "0"), h("i", {style: {background: `linear-gradient(90deg, ${Array.from({length: 10}, (_, i) => colour(i / 9)).join(",")})`}}), h("span", {}, number(high)),
      h("span", {class: "ll-muted"}, {norm: `${name}, size of the update`, stable_rank: `${name} of ${heat.rank} (Σσ²/σ₁²)`, amplification: "‖ΔW‖ over ‖UᵀW0V‖, times", overlap: "‖UᵀW0V‖ over the most possible"}[measure]));
    heatSay.textContent = measure === "norm" || measure === "stable_rank" ? `${text} ${heat.verdicts}` : text;
  }

  const ask = (m) => { if (!cache.has(m)) cache.set(m, get("spectrum", {...key(), m}).catch((error) => { cache.delete(m); throw error; })); return cache.get(m); };
  async function pick(m, told = true) {
    const began = performance.now(), mine = ++picking;
    map.mark(m);
    across.mark(m);
    ghost = null;
    fault.textContent = "";
    let r;
    try { r = await ask(m); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      if (mine === picking && error instanceof Refused) fault.textContent = error.message;   // away: the frame says so
      return;
    }
    if (mine !== picking || !heat || r.run !== heat.run) return;
    await glass.show(r, heat, key());
    globalThis.LoraLab.clicks = [...(globalThis.LoraLab.clicks ?? []), performance.now() - began].slice(-100);
    if (state.matrix !== r.m) state.matrix = r.m;
    if (told || asked("m")) address({m: r.m});
  }
  /* Pointing at another cell lays its spectrum over the chosen one. */
  async function hover(m) {
    const {current} = glass;
    if (!current) return;
    if (!m || m === current.m || !known(m)) { if (ghost) { ghost = null; glass.over(null); } return; }
    let r;
    try { r = await ask(m); } catch { return; }
    if (current.m !== glass.current?.m) return;
    ghost = r.m;
    glass.over(r);
  }
  let was = null, wide = null;
  on("start run ended", open);
  on("view", (v) => { const now = v && `${v.run}.${v.adapter}.${v.live}`; if (was && now !== was && v) open(); was = now; });
  on("matrix", (m) => { if (heat && known(m) && m !== glass.current?.m) pick(m, false); });
  on("tab", (t) => { if (t === "spectra") { beside(); glass.wake(); } });
  on("back", () => { if (!glass.current) open(); });
  new ResizeObserver(() => { const now = root.clientWidth < 700; if (root.clientWidth && now !== wide) { wide = now; build(); } }).observe(root);
}
