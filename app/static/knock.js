/* Which matrices: the layer × matrix map as switches. What is clicked is "these"; either these are off, or only these
 * act. And the fifth of them that holds most of the gain. */
import {address, asked, fmt, h} from "./core.js";
import {cellmap, warmth} from "./cellmap.js";
import {mark} from "./help.js";

export function knockView(ctx) {
  const box = h("div", {class: "kn-map"}), say = h("p", {class: "ct-say", role: "status"}), how = h("p", {class: "ll-note"});
  const modes = h("div", {class: "ll-tabs", role: "group", "aria-label": "Which act"}, [["but", "all but these"], ["only", "only these"]].map(([id, text]) =>
    h("button", {type: "button", "data-mode": id, "aria-pressed": String(id === "but"), onclick: () => { mode = id; push(); }}, text)));
  const allOn = h("button", {class: "ll-button small", type: "button", onclick: () => { these.clear(); mode = "but"; found = false; push(0); }}, "all on");
  const find = h("button", {class: "ll-button small", type: "button", id: "kn-find", onclick: seek}, "");
  const side = h("div", {class: "kn-side"}, h("div", {class: "kn-acts"}, modes, allOn, mark("knock", "switching off")), h("p", {class: "ll-note"}, "Click a matrix, a name or a layer number to switch its ΔW."), find, say, how);
  const these = new Set();
  let mode = "but", map = null, known = [], wanted = false, found = false, ticks = [];

  const matrices = () => known.filter((m) => mode === "but" ? these.has(m) : !these.has(m));
  function push(soon = 250) {
    const off = these.size || mode === "only" ? matrices() : [];
    address({knock: mode === "only" ? "only" : null});
    ctx.turn({off: new Set(off)}, soon);
  }
  function flip(list) {
    if (ctx.dials.dora) return;
    found = false;
    const all = list.every((m) => these.has(m));
    list.forEach((m) => all ? these.delete(m) : these.add(m));
    push();
  }
  function open() {
    const norms = ctx.dials.norms, names = Object.keys(norms), layers = norms[names[0]]?.length ?? 0;
    known = names.flatMap((t) => norms[t].map((v, l) => v == null ? null : `layers.${l}.${t}`)).filter(Boolean);
    mode = asked("knock") === "only" ? "only" : "but";             // as the address has it
    these.clear();
    (mode === "but" ? [...ctx.dial.off] : known.filter((m) => !ctx.dial.off.has(m))).forEach((m) => these.add(m));
    wanted = found = false;
    map = cellmap(names, layers, {label: "Matrices that are adapted; a click switches one", onPick: (m) => known.includes(m) && flip([m]), onMove: () => {}, height: names.length > 4 ? 22 : 34});
    map.grid.querySelectorAll(".cm-head").forEach((n, i) => n.replaceChildren(h("button", {class: "kn-name", type: "button", "aria-label": `all ${names[i]}`, onclick: () => flip(known.filter((m) => m.endsWith(`.${names[i]}`)))}, names[i])));
    const every = layers > 16 ? 5 : 1;
    ticks = Array.from({length: layers}, (_, l) => h("button", {class: "kn-tick", type: "button", tabindex: l ? -1 : 0, "aria-label": `layer ${l}`, onclick: () => flip(known.filter((m) => m.startsWith(`layers.${l}.`)))}, l % every ? "·" : String(l)));
    const axis = h("div", {class: "cm-row kn-axis", role: "toolbar", "aria-label": "Layers; arrow keys move"}, h("span", {class: "cm-head ll-muted"}, "layer"), ticks);
    axis.addEventListener("keydown", (e) => {
      const i = ticks.indexOf(e.target), n = ticks[{ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: layers - 1}[e.key]];
      if (!n) return;
      e.preventDefault();
      ticks.forEach((t) => { t.tabIndex = -1; });
      n.tabIndex = 0;
      n.focus();
    });
    map.node.lastChild.replaceWith(axis);
    box.replaceChildren(map.node);
    const top = Math.max(...Object.values(norms).flat().filter((x) => x != null));
    map.paint(norms, 0, top, (l, t, v) => v == null ? `layer ${l} ${t}, not adapted` : `layer ${l} ${t}, ‖ΔW‖ ${v.toPrecision(3)}`, warmth);
    side.hidden = ctx.dials.dora;
    if (ctx.dials.dora) box.append(h("p", {class: "ll-note"}, "A DoRA adapter: its magnitudes do not go with a matrix, so matrices cannot be switched off one by one. The map shows ‖s·B·A‖."));
  }
  function seek() {
    wanted = true;
    paint();
    if (ctx.held?.holders) apply(); else ctx.wake();
  }
  function apply() {
    const {keys, kept, rows} = ctx.held.holders;
    these.clear();
    keys.forEach((m) => these.add(m));
    mode = "only";
    found = true;
    wanted = false;
    const off = known.filter((m) => !these.has(m));
    Object.assign(ctx.dial, {at: null, strength: 1, off: new Set(off)});
    ctx.measured.set(JSON.stringify(ctx.setting()), {loss: kept, rows, of: rows});
    push(0);
  }
  function paint() {
    const {dials, dial, held, info} = ctx;
    if (!dials || !map) return;
    if (wanted && held?.holders) { apply(); return; }
    if (!dial.off.size && these.size) { these.clear(); mode = "but"; found = false; address({knock: null}); }
    const n = dials.matrices, few = Math.max(1, Math.round(n * 0.2)), on = n - dial.off.size;
    map.at.forEach((c, m) => {
      const off = dial.off.has(m);
      c.classList.toggle("off", off);
      if (known.includes(m)) c.setAttribute("aria-label", `${c.getAttribute("aria-label").replace(/, (on|off)$/, "")}, ${off ? "off" : "on"}`);
    });
    modes.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.mode === mode));
    allOn.disabled = !dial.off.size;
    find.disabled = wanted;
    find.textContent = wanted ? `Finding them… ${held?.progress ? fmt.pct(held.progress) : held?.says ?? ""}` : `Find the ${few} of ${n} that hold most`;
    const now = ctx.lossNow(), base = info.loss?.base, best = info.loss?.adapted, share = now && base > best ? (base - now.loss) / (base - best) : null;
    const gain = share == null ? "" : share < 0 ? `: the loss is ${now.loss.toFixed(2)}, worse than the base's ${base.toFixed(2)}` : `: loss ${now.loss.toFixed(2)}, ${share > 0.995 ? "all" : fmt.pct(share)} of what was learnt`;
    say.textContent = !dial.off.size ? `All ${n} matrices act${best == null ? "" : `: loss ${best.toFixed(2)}, where the base has ${base.toFixed(2)}`}.`
      : !on ? "No matrix acts: this is the base model." : `${on} of ${n} matrices act${gain}.`;
    const h0 = held?.holders;
    how.textContent = !found || !h0 ? "" : `These ${h0.keys.length} alone keep ${h0.held == null ? "nothing" : fmt.pct(Math.max(0, h0.held))} of the gain, measured on ${h0.rows} rows. They have the largest shares of it along the way from base to adapted: −⟨∂L/∂ΔW, ΔW⟩ at ${h0.points} strengths, on ${h0.shared} rows.`;
  }
  return {nodes: [box, side], paint, open, wanted: () => wanted};
}
