/* Side by side: up to four adapters, ranks or strengths in one batch, chosen by chips; and two of them as a pair. */
import {Away, Refused, address, asked as linked, get, h, state} from "./core.js";
import {changed} from "./diff.js";
import {mergeView} from "./merge.js";

const MOST = 4;
const SIDE = /^(\d{1,15})(?:\+(\d{1,15}))?(?:\.(k|energy|mb)\.(\d*)(?:\*(-?[\d.]+))?((?:!\d+\.[\w-]+)*))?$/;

/* A side as a word of the address: base, 14, 14+15 (their sum), 14.k.2 (its dial), 14.k.*0.5 (half as strong). */
function written({run, plus, setting}) {
  if (run == null) return "base";
  const dial = setting ? `.${setting.by}.${setting.at ?? ""}${setting.strength === 1 ? "" : `*${setting.strength}`}${setting.off.map((m) => m.replace("layers.", "!")).join("")}` : "";
  return `${run}${plus == null ? "" : `+${plus}`}${dial}`;
}
function read(word) {
  if (word === "base") return {run: null};
  const m = SIDE.exec(word);
  if (!m) return null;
  const [, run, plus, by, at, strength, off] = m;
  return {run: +run, ...plus ? {plus: +plus} : {}, ...by ? {setting: {by, at: at === "" ? null : +at, strength: strength ? +strength : 1, off: off ? off.slice(1).split("!").map((o) => `layers.${o}`) : []}} : {}};
}

export function sidesView(ctx) {
  const chips = h("div", {class: "sd-chips", role: "group", "aria-label": "What stands side by side; up to four"}), columns = h("div", {class: "sd-columns"});
  const note = h("p", {class: "ll-note", role: "status"});
  const pair = mergeView(ctx, () => toggle({id: "sum", run: two()[0], plus: two()[1]}));
  let list = [], chosen = [], loaded = null, shown = null;

  const name = (s) => s.run == null ? "base" : s.plus != null ? `${label(s.run)} + ${label(s.plus)}` : `${label(s.run)}${s.text ? `, ${s.text}` : ""}`;
  const label = (id) => list.find((r) => r.id === id)?.name ?? (id === 0 ? "recorded" : `run ${id}`);
  const key = (s) => JSON.stringify([s.run ?? null, s.setting ?? null, s.plus ?? null]);
  /* Two different runs that are chosen whole: a pair that could be merged. */
  const two = () => { const ids = [...new Set(chosen.filter((s) => s.run != null && !s.setting && s.plus == null).map((s) => s.run))]; return ids.length === 2 ? ids : null; };

  function offers() {
    const run = state.run, found = [{run: null}, {run}], d = ctx.dials;
    if (d) {
      const ks = d.ticks.k.map((t, i) => [t, i]).filter(([t]) => t.x && t.x < d.rank), some = ks.length > 3 ? [ks[0], ks[1], ks[Math.floor(ks.length / 2)]] : ks;
      found.push(...some.map(([t, i]) => ({run, text: `k = ${t.x}`, setting: {by: "k", at: i, strength: 1, off: []}})));
      if (d.strengths.length) found.push(...[0.5, 2].map((t) => ({run, text: `× ${t}`, setting: {by: "k", at: null, strength: t, off: []}})));
      if (ctx.setting()) found.push({run, text: ctx.said(), setting: ctx.setting()});
    }
    found.push(...list.filter((r) => r.id !== run).slice(0, 8).map((r) => ({run: r.id, about: `${r.says}, ${r.data}`})));
    if (two()) found.push({run: two()[0], plus: two()[1]});
    chosen.forEach((s) => { if (!found.some((f) => key(f) === key(s))) found.push(s); });
    const seen = new Set();
    return found.filter((s) => !seen.has(key(s)) && seen.add(key(s)));
  }
  function toggle(s) {
    const i = chosen.findIndex((c) => key(c) === key(s));
    if (i >= 0) chosen.splice(i, 1); else if (chosen.length < MOST) chosen.push(s);
    address({sides: chosen.map(written).join("_")});
    paint();
  }
  async function open() {
    const run = state.run, wished = (linked("sides") ?? "").split("_").map(read).filter(Boolean).slice(0, MOST);
    chosen = wished.length ? wished : [{run: null}, {run}];
    shown = null;
    loaded = null;
    try { const r = await get("sides", {run}); if (run === state.run) list = r.runs; } catch (error) { if (!(error instanceof Refused || error instanceof Away)) throw error; }
    loaded = run;
    chosen = chosen.filter((s) => [s.run, s.plus].every((id) => id == null || id === run || list.some((r) => r.id === id)))
      .map((s) => s.setting && s.run === run ? {...s, text: ctx.saying(s.setting)} : s);
    const other = list.find((r) => r.id !== run);
    if (other && !wished.length) chosen.push({run: other.id, about: `${other.says}, ${other.data}`});
    paint();
  }
  function paint() {
    const asked = shown?.keys ?? [];
    chips.replaceChildren(h("span", {class: "ll-muted"}, "up to four:"), ...offers().map((s) => { const is = chosen.some((c) => key(c) === key(s));
      return h("button", {class: "sd-chip", type: "button", title: s.about, "aria-pressed": String(is), disabled: !is && chosen.length >= MOST, onclick: () => toggle(s)}, name(s)); }));
    columns.style.setProperty("--n", Math.max(1, chosen.length));
    const plain = shown?.texts?.[asked.indexOf(key({run: null}))] ?? "";
    columns.replaceChildren(...chosen.map((s) => {
      const i = asked.indexOf(key(s)), text = i < 0 ? null : shown.texts?.[i] ?? "", loss = i < 0 ? null : shown.losses?.[i], base = s.run == null;
      const body = text == null ? h("span", {class: "ll-note"}, "not written yet") : base || !text ? text || (shown.done ? "(it wrote nothing)" : "") : changed(plain, text).runs.map(([w, is]) => is && plain ? h("ins", {}, w) : w);
      return h("section", {class: "sd-column", "aria-label": name(s)}, h("h2", {class: `ll-h ${base ? "ll-base" : "ll-warm"}`}, name(s)), h("p", {class: `cp-text${shown && !shown.done && i >= 0 ? " busy" : ""}`}, body),
        h("p", {class: "sd-loss"}, loss == null ? "" : [h("span", {class: "ll-muted"}, "held-out loss "), h("b", {class: base ? "ll-base" : "ll-warm"}, loss.toFixed(2))]));
    }));
    note.textContent = !shown ? "All are written in one batch, from the prompt above; the button is beside it." : shown.losses ? `Losses on ${shown.rows} of ${shown.of} held-out rows of ${ctx.info.data}${best()}` : shown.done ? "Measuring the losses…" : "";
    pair.paint(two());
  }
  function best() {
    const all = shown.keys.map((k, i) => [shown.losses[i], chosen.find((c) => key(c) === k)]).filter(([, c]) => c).sort((a, b) => a[0] - b[0]);
    return all.length > 1 && shown.rows === shown.of ? `: the least has ${name(all[0][1])}, ${all[0][0].toFixed(2)}.` : ".";
  }
  return {fresh: () => !shown, busy: () => Boolean(shown && !shown.done), nodes: [chips, columns, note, ...pair.nodes], open, paint() { if (loaded === state.run) paint(); }, look: paint,
    asked: () => { shown = {keys: chosen.map(key), texts: [], done: false}; paint(); return chosen.map(({run, setting, plus}) => ({run, setting: setting ?? null, plus: plus ?? null})); },
    update(v) { shown = {...shown, ...v}; paint(); }, failed() { shown = null; paint(); }};
}
