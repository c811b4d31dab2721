/* Compare: one prompt, both models side by side, written as one watches; below it four ways to look at what was learnt:
 * how much of ΔW, which matrices, which words, and beside others. The dials belong to all of them. */
import {Away, Refused, address, asked, fmt, get, h, on, state} from "./core.js";
import {cutView} from "./cut.js";
import {makeDial} from "./dial.js";
import {knockView} from "./knock.js";
import {panes} from "./panes.js";
import {promptRow} from "./prompt.js";
import {sidesView} from "./sides.js";
import {wordsView} from "./speaks.js";

const PAGE = Math.random().toString(36).slice(2);
const WAYS = [["cut", "How much of ΔW"], ["matrices", "Which matrices"], ["words", "Which words"], ["sides", "Side by side"]];
/* What an address says of Compare that belongs to its run, besides the prompt. */
const OF_RUN = ["cut", "strength", "off", "knock", "sides"];

export function compare(root, {send}) {
  const prompt = promptRow({onAsk: () => ask(), onExample: (i) => { seq++; recorded(i); paint(); if (!shown?.recorded || !whole()) ask(); }});
  const go = h("button", {class: "ll-button go", type: "button", id: "compare-button", onclick: () => ask()}, "Write both");
  const fault = h("p", {class: "ll-fault", role: "alert"}), ways = h("div", {class: "ll-tabs cp-ways", role: "group", "aria-label": "What to look at"});

  let info = null, dials = null, held = null, shown = null, before = null, seq = 0, timer = 0, turned = false, poll = 0, way = "cut";

  /* ---- where the dials stand */
  const stand = makeDial({get info() { return info; }, get dials() { return dials; }, get held() { return held; }});
  const {dial, measured, at, full, whole, nothing, setting, said, lossNow} = stand, key = () => JSON.stringify(setting());
  function turn(change, soon = 150) {
    Object.assign(dial, change);
    paintDials();
    address({cut: full() ? null : `${dial.by}.${at()}`, strength: dial.strength === 1 ? null : dial.strength, off: [...dial.off].map((m) => m.replace("layers.", "")).join("_")});
    clearTimeout(timer);
    turned = true;                                                  // what stands there is of the place before
    pane.busy(way !== "sides");
    timer = setTimeout(ask, soon);
  }
  function paintDials() {
    views[way].paint?.();                                          // the others when they are looked at
    pane.losses();
    pane.heading();
  }
  const ctx = {...stand, turn, page: PAGE,
    get info() { return info; }, get dials() { return dials; }, get held() { return held; }, get shown() { return shown; }, get before() { return before; }, get prompt() { return prompt.value; },
    wake: () => follow(), reference: () => prompt.example?.reference};
  const pane = panes(ctx), views = {cut: cutView(ctx), matrices: knockView(ctx), words: wordsView(ctx), sides: sidesView(ctx)};
  const bodies = WAYS.map(([id]) => h("div", {class: `cp-body cp-${id}`, "data-way": id, hidden: id !== way}, views[id].nodes));
  const below = h("section", {class: "ll-card cp-below"}, h("div", {class: "cp-bar-row"}, ways, pane.line), bodies);
  ways.append(...WAYS.map(([id, text]) => h("button", {type: "button", "data-way": id, "aria-pressed": String(id === way), onclick: () => look(id)}, text)));
  root.append(h("div", {class: "ll-row cp-top"}, prompt.field, prompt.pick, go), prompt.reference, fault, pane.node, below);
  function look(id) {
    way = id;
    ways.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.way === id));
    bodies.forEach((b) => { b.hidden = b.dataset.way !== id; });
    address({way: id === "cut" ? null : id});
    pane.node.hidden = pane.line.hidden = id === "sides";
    views[id].paint?.();
    views[id].look?.();
    paint();
    if (id !== "sides") first();
  }

  /* ---- the run that is compared */
  let opening = 0;
  async function open() {
    const mine = ++opening, run = state.run, was = info?.run;
    clearTimeout(poll);
    dials = held = null;
    stand.reset();
    prompt.begin();
    if (run == null) { info = null; return blank("After a run, the texts of the base and of the adapted model will stand here side by side."); }
    try { info = await get("compare", {run}); } catch (error) {
      if (error instanceof Away) return;
      if (!(error instanceof Refused)) throw error;
      return blank(error.message);
    }
    if (mine !== opening) return;
    if (was != null && was !== run) address({example: null, prompt: null});
    shown = before = null;
    seq++;
    fault.textContent = "";
    const example = prompt.fill(info.examples, was === run);
    if (example != null) recorded(example);
    paint();
    if (way !== "sides" && !(linked && (asked("way") === "sides" || OF_RUN.some((n) => asked(n))))) first();
    if (info.ready) await openDials(mine, run);
    if (mine === opening) first();
  }
  /* What the address has, for the run that it was made with; another run begins with all of its ΔW. */
  let linked = true;
  function restore() {
    const [by, i] = (asked("cut") ?? "").split("."), t = Number(asked("strength"));
    if (dials.ticks[by] && dials.ticks[by][+i]) Object.assign(dial, {by, at: +i});
    const off = (asked("off") ?? "").split("_").filter((m) => dials.norms[m.split(".")[1]]?.[+m.split(".")[0]] != null);
    if (!dials.dora) off.forEach((m) => dial.off.add(`layers.${m}`));
    if (asked("strength") && dials.strengths.includes(t)) dial.strength = t;
  }
  async function openDials(mine, run) {
    try { dials = await get("dials", {run}); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      if (mine === opening) views.cut.unable(error.message);
      return;
    }
    if (mine !== opening) return;
    if (linked) restore(); else address(Object.fromEntries(OF_RUN.map((n) => [n, null])));
    linked = false;
    for (const v of Object.values(views)) v.open?.();
    look(WAYS.some(([id]) => id === asked("way")) ? asked("way") : way);
    paintDials();
    follow();
  }
  /* The curve along the dials: asked for while this tab is looked at, until all of it is measured. */
  async function follow() {
    clearTimeout(poll);
    if (!dials || state.tab !== "compare" || held?.done && !(views.matrices.wanted() && !held.holders)) return;
    const run = state.run;
    try { held = await get("held", {run, first: dial.strength === 1 ? dial.by : "strength", holders: views.matrices.wanted() ? 1 : null}); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      return;
    }
    if (run !== state.run) { held = null; return; }
    paintDials();
    views.cut.curve();
    poll = setTimeout(follow, document.hidden ? 5000 : 1000);
  }
  /* The first look at a run: its texts are written unasked, unless a training needs the machine. */
  function first() { if (state.tab === "compare" && info?.ready && (way === "sides" ? views.sides.fresh() : !shown || shown.recorded && !whole()) && !state.view?.live && prompt.value) ask(); }
  function blank(text) {
    shown = null;
    fault.textContent = "";
    pane.blank(text);
    go.disabled = true;
    below.hidden = true;
  }
  /* The recorded run has the texts of its examples. */
  function recorded(i) {
    const e = info.examples[i];
    if (e.base != null) { before = null; shown = {texts: [e.base, e.adapted], tokens: e.tokens, said: "", key: "null", done: true, recorded: true}; }
  }

  /* ---- asking */
  async function ask() {
    turned = false;
    if (!info?.ready || !state.run && state.run !== 0) return;
    clearTimeout(timer);
    const mine = ++seq, was = shown;
    fault.textContent = "";
    if (way === "sides") {
      if (shown && !shown.done) shown = null;                                   // it is given up for these
      const sides = views.sides.asked();
      if (sides.length) send({run: state.run, prompt: prompt.value, sides, measure: true, page: PAGE, seq}, "submit");
      paint();
      return;
    }
    if (views.sides.busy()) views.sides.failed();
    before = shown?.done ? shown : before;
    shown = {texts: ["", ""], tokens: null, said: said(), key: key(), nothing: nothing(), done: false, asked: performance.now()};
    paint();
    try { await get("ping"); } catch { if (mine === seq) { shown = was; paint(); } return; }     // away: the frame says so
    if (mine !== seq) return;
    send({run: state.run, prompt: prompt.value, setting: setting(), measure: !lossNow(), page: PAGE, seq}, "submit");
  }

  /* ---- showing */
  function paint() {
    const busy = Boolean(shown && !shown.done) || turned && way !== "sides" || way === "sides" && views.sides.busy(), ready = Boolean(info?.ready);
    below.hidden = !ready;
    go.disabled = busy || !ready;
    go.textContent = way === "sides" ? "Write them" : shown?.seconds ? `Write both (≈ ${fmt.time(shown.seconds)})` : "Write both";
    pane.paint(busy);
    views.words.show();
    pane.losses();
  }

  on("run ended start", open);
  let stale = null;
  on("view", (v) => { const k = v && `${v.run}.${v.status}.${v.score?.adapted}`; if (k !== stale) { stale = k; if (v && info && v.run === info.run && (v.live !== info.live || v.adapter !== info.ready)) open(); } });
  on("back", () => { if (shown && !shown.done) { shown = null; paint(); } follow(); });
  on("tab", () => { first(); follow(); });
  return {update(v) {
    if (!v || v.seq !== seq || v.run !== state.run) return;                 // an answer to an older question
    if (v.sides) {
      if (v.error) { fault.textContent = v.error; views.sides.failed(); } else views.sides.update(v);
      paint();
      return;
    }
    if (v.error) { fault.textContent = v.error; shown = before; paint(); return; }
    const {texts, tokens, done, seconds} = v;
    if (shown?.asked && texts?.[0]) { globalThis.LoraLab.writes = [...(globalThis.LoraLab.writes ?? []), performance.now() - shown.asked].slice(-50); shown.asked = 0; }
    const fresh = !same(shown, {texts, tokens, done});
    shown = {...shown, texts: texts?.length ? texts : ["", ""], tokens, done, seconds};
    if (v.losses) measured.set(JSON.stringify(v.setting ?? null), {loss: v.losses[1], rows: v.rows, of: v.of});
    if (fresh) paint(); else paintDials();
  }};
}
const same = (a, b) => a && a.done === b.done && a.tokens?.length === b.tokens?.length && JSON.stringify(a.texts) === JSON.stringify(b.texts);
