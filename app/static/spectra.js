/* Spectra: where the update is (layer by matrix), and the one matrix that is chosen under the microscope (microscope.js).
 * What is looked at is a run's adapter, or one that was opened (openfile.js). */
import {Away, Refused, address, asked, emit, get, h, on, show, state} from "./core.js";
import {absent} from "./formula.js";
import {cellmap, cividis, warmth} from "./cellmap.js";
import {microscope} from "./microscope.js";
import {aboutSheet, opener} from "./openfile.js";
import {exports} from "./plot.js";
import {openRun} from "./run.js";
import {secondAdapter} from "./second.js";
import {strip} from "./strip.js";

export function spectra(root) {
  const left = h("div", {id: "spectrum-heatmap", class: "sp-map"}), badge = h("span", {class: "ll-badge", hidden: true}, "recorded"), fault = h("p", {class: "ll-fault", role: "alert"});
  const heatTitle = h("h2", {class: "ll-h"}), heatSay = h("p", {class: "tr-say"}), scale = h("div", {class: "sp-scale"}), which = h("div", {class: "ll-tabs sp-which", role: "group", "aria-label": "What the colour shows"});
  const glass = microscope(), across = strip({onPick: (m) => pick(m)});
  const source = h("select", {class: "ll-field"}), note = h("p", {class: "ll-note sp-note", role: "status"}), about = aboutSheet(), aboutLink = h("button", {type: "button", class: "ll-link", hidden: true, onclick: () => about.show(heat.name, heat.file)}, "what the file says");
  const files = opener({onOpened: (o) => { look(o.open); listSources(); open(); }, onFault: (text) => { fault.textContent = text; }, onNote: (text) => { note.textContent = text || remark(); }});
  const second = secondAdapter({key: () => key(), across, onFault: (text) => { fault.textContent = text; }, onChange: () => {
    cache = new Map();
    glass.forget();
    if (heat && picked) pick(picked, false);                         // also one whose answer is still under way
  }});
  const row = h("div", {class: "ll-row sp-row"}, h("label", {class: "ll-pick"}, h("span", {}, "looking at"), source), badge, second.node, aboutLink, note, files.base, files.input, files.button);
  files.zone(root);
  const empty = h("section", {class: "ll-card sp-empty", hidden: true}), grid = h("div", {class: "ll-grid"},
    h("section", {class: "ll-card sp-left", style: {"--span": 7}}, h("div", {class: "ll-head"}, heatTitle, which,
      exports("the map", {name: () => `update-${heat?.name.replaceAll(" ", "-")}-${measure}`, figure: () => heat?.measures[measure].figure, rows: () => table()})), left, scale, heatSay, across.node),
    glass.node);
  root.append(row, fault, empty, grid, about.node);

  let heat = null, map = null, ghost = null, measure = "norm", wanted = asked("map") ?? "norm", cache = new Map(), opening = 0, picking = 0, picked = null, waiting = 0;
  let opened = asked("open");
  const key = () => opened ? {open: opened} : {run: state.run};
  const remark = () => heat && glass.current && absent(glass.current.m, heat.name, known(state.matrix) ? "did not move in" : "is not in") || (heat?.note ?? heat?.file?.remarks[0] ?? "");
  /* A file in place of the run, or (null) the run again. */
  function look(id) { opened = id; address({open: id}); emit("opened", id); }

  /* ---- what can be looked at: runs, and what was opened */
  async function listSources() {
    let runs, others, bases;
    try { [{runs}, {opened: others, bases}] = await Promise.all([get("runs"), get("opened")]); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      return;
    }
    const option = (value, text) => h("option", {value}, text), group = (label, list) => list.length ? h("optgroup", {label}, list) : "";
    source.replaceChildren(group("runs", runs.map((r) => option(String(r.id), r.name === "recorded" ? "the recorded run" : r.name))), group("opened", others.map((o) => option(o.id, o.name))));
    source.value = opened ?? String(state.run ?? "");
    const rest = (list) => list.filter((x) => String(x.id) !== source.value);
    second.list([group("runs", rest(runs).filter((r) => r.loss != null).map((r) => option(String(r.id), r.name === "recorded" ? "the recorded run" : r.name))), group("opened", rest(others).map((o) => option(o.id, o.name)))]);
    files.bases(bases);
  }
  source.onchange = () => {
    fault.textContent = "";
    if (/^\d{1,15}$/.test(source.value)) {
      look(null);
      Number(source.value) === state.run ? open() : openRun(Number(source.value), {refill: true, push: true});
    } else { look(source.value); open(); }
  };
  const table = () => heat && [["layer", ...Object.keys(heat.measures[measure].values)],
    ...Object.values(heat.measures[measure].values)[0].map((_, l) => [l, ...Object.values(heat.measures[measure].values).map((r) => r[l])])];

  async function open() {
    const mine = ++opening;
    glass.clear();
    ghost = picked = null;
    cache = new Map();
    clearTimeout(waiting);
    if (!opened && state.run == null) return blank("After a run, the spectrum of every ΔW will be here: how strongly it acts, and along how many directions.", true);
    let found;
    try { found = await get("heat", key()); } catch (error) {
      if (error instanceof Away) return;
      if (!(error instanceof Refused)) throw error;
      return blank(`${error.message[0].toUpperCase()}${error.message.slice(1)}.`, true);
    }
    if (mine !== opening) return;
    if (found.error) return blank(`${found.error[0].toUpperCase()}${found.error.slice(1)}.`, !found.live);
    if (found.pending) {
      blank(`Comparing ${found.name} with ${found.base}: ${found.pending[0]} of ${found.pending[1]} matrices.`);
      waiting = setTimeout(open, 900);
      return;
    }
    heat = found;
    aboutLink.hidden = !heat.file;
    empty.hidden = true;
    grid.hidden = false;
    badge.hidden = !heat.recorded;
    heatTitle.textContent = "Layer by matrix";
    measure = heat.measures[wanted] ? wanted : "norm";
    choices();
    build();
    across.load(heat);
    pick(known(state.matrix) && !(heat.file && still(state.matrix)) ? state.matrix : heat.first, false);
    beside();
    second.pair();
    files.offer(heat.file?.kind === "checkpoint" ? {set: opened, base: heat.base} : null);
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
    if (b.measures) {
      Object.assign(heat.measures, b.measures);
      if (wanted in b.measures) { measure = wanted; paint(); }
    }
    else if (!b.away) waiting = setTimeout(beside, 700);
    choices(b);
  }
  function choices(b = {}) {
    const button = (id, m) => h("button", {type: "button", "data-id": id, onclick: () => { measure = wanted = id; address({map: id === "norm" ? null : id}); paint(); }}, m.title);
    const later = heat.measures.amplification ? [] : [["amplification", "amplification"], ["overlap", "overlap with W0"]].map(([id, text]) =>
      h("button", {type: "button", disabled: true, "data-id": id, title: heat.away ? `Needs W0: ${heat.away}` : `Being measured beside W0${b.of ? `: ${b.done} of ${b.of} matrices` : ""}`}, text));
    which.replaceChildren(...Object.entries(heat.measures).map(([id, m]) => button(id, m)), ...later);
    pressed();
  }
  const pressed = () => which.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.id === measure));
  const known = (m) => { const [, l, t] = (m ?? "").split("."); return heat?.measures.norm.values[t]?.[+l] != null; };
  /* Other tabs know the matrices of language models; a picture model's names stay here. */
  const shared = (m) => !opened || /\.(q|k|v|o|gate|up|down)$/.test(m);
  const still = (m) => { const [, l, t] = m.split("."); return heat.measures.norm.values[t][+l] === 0; };
  /* offer: true, the way to a run; false, the run that trains; nothing where neither helps. */
  function blank(text, offer) {
    heat = null;
    second.pair(false);
    aboutLink.hidden = badge.hidden = grid.hidden = true;
    note.textContent = "";
    empty.hidden = false;
    empty.replaceChildren(h("p", {class: "ll-say"}, text), offer === undefined || opened ? "" : offer ? h("button", {class: "ll-button go", type: "button", onclick: () => show("train")}, "Go to training") : h("button", {class: "ll-button", type: "button", onclick: () => show("train")}, "Watch it train"));
  }
  function build() {
    if (!heat) return;
    const values = heat.measures[measure].values, names = Object.keys(values), narrow = root.clientWidth < 700, room = narrow ? 190 : Math.max(140, Math.min(420, innerHeight - 580));
    map = cellmap(names, values[names[0]].length, {label: "Layer by matrix; arrow keys move, and the spectrum follows", onPick: (m) => pick(m), onHover: hover,
      height: Math.max(20, Math.min(narrow ? 72 : 160, Math.round(room / names.length)))});
    left.replaceChildren(map.node);
    const long = Math.max(...names.map((n) => n.length));
    grid.style.setProperty("--head", long < 6 ? "44px" : `${Math.min(narrow ? 84 : 132, 12 + 8 * long)}px`);
    left.querySelectorAll(".cm-row > .cm-head").forEach((x) => { x.title = x.textContent; });
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

  const ask = (m) => { if (!cache.has(m)) cache.set(m, get("spectrum", {...key(), m, with: second.other}).catch((error) => { cache.delete(m); throw error; })); return cache.get(m); };
  async function pick(m, told = true) {
    const began = performance.now(), mine = ++picking;
    picked = m;
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
    if (mine !== picking || !heat || r.run !== heat.run || r.open !== heat.open) return;
    const drawn = glass.show(r, heat, {...key(), with: second.other});
    if (told) { if (shared(r.m)) state.matrix = r.m; address({m: r.m}); }
    note.textContent = note.title = remark();
    await drawn;
    globalThis.LoraLab.clicks = [...(globalThis.LoraLab.clicks ?? []), performance.now() - began].slice(-100);
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
  let mine = null;                                                 // the run that was last looked at or left for a file
  on("start", () => { mine = state.run; listSources(); open(); });
  on("run", (id) => { if (id !== mine && opened) look(null); const again = id !== mine; mine = id; listSources(); if (again && !opened) open(); });
  on("ended", () => { listSources(); if (!opened) open(); });
  on("view", (v) => { const now = v && `${v.run}.${v.adapter}.${v.live}`; if (was && now !== was && v && !opened) open(); was = now; });
  on("matrix", (m) => { if (heat && known(m) && m !== glass.current?.m) pick(m, false); else if (heat) note.textContent = note.title = remark(); });
  on("tab", (t) => { if (t === "spectra") { listSources(); beside(); glass.wake(); } });
  on("back", () => { if (!glass.current) open(); });
  new ResizeObserver(() => { const now = root.clientWidth < 700; if (root.clientWidth && now !== wide) { wide = now; build(); } }).observe(root);
}
