/* Compare: one prompt, both models side by side, written as one watches; below it four ways to look at what was learnt:
 * how much of ΔW, which matrices, which words, and beside others. The dials belong to all of them. */
import {Away, Refused, address, asked, fmt, get, h, on, state} from "./core.js";
import {cutView} from "./cut.js";
import {makeDial} from "./dial.js";
import {changed} from "./diff.js";
import {knockView} from "./knock.js";
import {sidesView} from "./sides.js";
import {wordsView} from "./speaks.js";

const PAGE = Math.random().toString(36).slice(2);
const WAYS = [["cut", "How much of ΔW"], ["matrices", "Which matrices"], ["words", "Which words"], ["sides", "Side by side"]];

export function compare(root, {send}) {
  const prompt = h("textarea", {class: "ll-field cp-prompt", rows: 1, spellcheck: "false", "aria-label": "Prompt", placeholder: "a prompt, as the task's rows have it"});
  const pick = h("select", {class: "ll-field", "aria-label": "Held-out example"}), reference = h("p", {class: "ll-note cp-reference"});
  const go = h("button", {class: "ll-button go", type: "button", id: "compare-button", onclick: () => ask()}, "Write both");
  const fault = h("p", {class: "ll-fault", role: "alert"}), badge = h("span", {class: "ll-badge", hidden: true}, "recorded");
  const base = h("p", {class: "cp-text", id: "base-output"}), adapted = h("p", {class: "cp-text", id: "adapted-output"});
  const head = h("h2", {class: "ll-h ll-warm"}), since = h("div", {class: "ll-tabs cp-since", role: "group", "aria-label": "What is marked", hidden: true});
  const ways = h("div", {class: "ll-tabs cp-ways", role: "group", "aria-label": "What to look at"}), lossLine = h("div", {class: "cp-loss", role: "status"});
  const panes = h("div", {class: "ll-grid cp-panes"}, h("section", {class: "ll-card", style: {"--span": 6}}, h("h2", {class: "ll-h ll-base"}, "base"), base),
    h("section", {class: "ll-card", style: {"--span": 6}}, h("div", {class: "ll-head"}, head, badge, since), adapted));
  const below = h("section", {class: "ll-card cp-below"}, h("div", {class: "cp-bar-row"}, ways, lossLine));
  root.append(h("div", {class: "ll-row cp-top"}, h("label", {id: "prompt", class: "cp-hold"}, prompt), pick, go), reference, fault, panes, below);

  let info = null, dials = null, held = null, shown = null, before = null, mark = "base", seq = 0, timer = 0, poll = 0, way = "cut";
  const examples = () => info?.examples ?? [];

  /* ---- where the dials stand */
  const stand = makeDial({get info() { return info; }, get dials() { return dials; }, get held() { return held; }});
  const {dial, measured, at, full, whole, nothing, setting, said, lossNow} = stand, key = () => JSON.stringify(setting());
  function turn(change, soon = 150) {
    Object.assign(dial, change);
    paintDials();
    address({cut: full() ? null : `${dial.by}.${at()}`, strength: dial.strength === 1 ? null : dial.strength, off: [...dial.off].map((m) => m.replace("layers.", "")).join("_"), way: way === "cut" ? null : way});
    clearTimeout(timer);
    timer = setTimeout(ask, soon);
  }
  function paintDials() {
    for (const v of Object.values(views)) v.paint?.();
    losses();
    heading();
  }
  const ctx = {...stand, turn, page: PAGE,
    get info() { return info; }, get dials() { return dials; }, get held() { return held; }, get shown() { return shown; }, get prompt() { return prompt.value; },
    wake: () => follow(), reference: () => examples()[+pick.value]?.reference};
  const views = {cut: cutView(ctx), matrices: knockView(ctx), words: wordsView(ctx), sides: sidesView(ctx)};
  const bodies = WAYS.map(([id]) => h("div", {class: `cp-body cp-${id}`, "data-way": id, hidden: id !== way}, views[id].nodes));
  below.append(...bodies);
  ways.append(...WAYS.map(([id, text]) => h("button", {type: "button", "data-way": id, "aria-pressed": id === way, onclick: () => look(id)}, text)));
  function look(id) {
    way = id;
    ways.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.way === id));
    bodies.forEach((b) => { b.hidden = b.dataset.way !== id; });
    address({way: id === "cut" ? null : id});
    panes.hidden = lossLine.hidden = id === "sides";
    views[id].look?.();
    paint();
    if (id !== "sides") first();
  }

  /* ---- the run that is compared */
  let opening = 0;
  async function open() {
    const mine = ++opening, run = state.run;
    clearTimeout(poll);
    dials = held = null;
    stand.reset();
    if (run == null) { info = null; return blank("After a run, the texts of the base and of the adapted model will stand here side by side."); }
    try { info = await get("compare", {run}); } catch (error) {
      if (error instanceof Away) return;
      if (!(error instanceof Refused)) throw error;
      return blank(error.message);
    }
    if (mine !== opening) return;
    pick.replaceChildren(...(examples().length ? examples().map((e, i) => h("option", {value: i}, `held-out example ${i + 1}`)) : [h("option", {value: ""}, "no held-out example")]), h("option", {value: "own"}, "a prompt of your own"));
    shown = before = null;
    seq++;
    fault.textContent = "";
    if (examples().length) choose(0); else pick.value = "own";
    paint();
    if (way !== "sides" && !(linked && (asked("way") === "sides" || ["cut", "strength", "off"].some((n) => asked(n))))) first();
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
    if (linked) restore(); else address({cut: null, strength: null, off: null});
    linked = false;
    for (const v of Object.values(views)) v.open?.();
    if (WAYS.some(([id]) => id === asked("way"))) look(asked("way"));
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
    base.textContent = adapted.textContent = "";
    base.append(h("span", {class: "ll-note"}, text));
    go.disabled = true;
    head.textContent = "adapted";
    below.hidden = true;
    lossLine.replaceChildren();
  }
  function choose(i) {
    const e = examples()[i];
    pick.value = i;
    prompt.value = e.prompt;
    reference.replaceChildren(h("b", {}, "held-out answer "), e.reference);
    if (e.base != null) { before = null; shown = {texts: [e.base, e.adapted], tokens: e.tokens, said: "", key: "null", done: true, recorded: true}; }
  }
  pick.onchange = () => {
    if (pick.value === "own") { prompt.value = ""; reference.textContent = ""; prompt.focus(); return; }
    seq++;
    choose(+pick.value);
    paint();
    if (!shown?.recorded || !whole()) ask();
  };
  prompt.oninput = () => { pick.value = "own"; reference.textContent = ""; };
  prompt.onkeydown = (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); ask(); } };

  /* ---- asking */
  async function ask() {
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
  function heading() {
    const now = shown?.said ?? said();
    head.textContent = !info ? "adapted" : shown?.nothing ? "adapted, nothing of ΔW left: the base again" : `adapted by ${info.name}${now ? `, ${now}` : ""}`;
  }
  function paint() {
    const busy = Boolean(shown && !shown.done) || way === "sides" && views.sides.busy(), ready = Boolean(info?.ready);
    below.hidden = !ready;
    go.disabled = busy || !ready;
    go.textContent = way === "sides" ? "Write them" : shown?.seconds ? `Write both (≈ ${fmt.time(shown.seconds)})` : "Write both";
    badge.hidden = !shown?.recorded;
    heading();
    for (const p of [base, adapted]) { p.classList.toggle("busy", busy); p.setAttribute("aria-busy", busy); }
    if (!shown) {
      base.replaceChildren(h("span", {class: "ll-note"}, info?.note ?? "Press the button: both models write at once."));
      adapted.replaceChildren();
    } else {
      const [plain, mine] = shown.texts, old = before?.texts[1];
      base.textContent = plain || (shown.done ? "(it wrote nothing)" : "");
      const diff = changed(plain ?? "", mine ?? ""), older = before && old !== mine ? changed(old, mine ?? "") : null;
      since.hidden = !(older && shown.done && shown.key !== before.key);
      if (since.hidden) mark = "base";
      if (!since.hidden) since.replaceChildren(...[["base", "unlike base"], ["before", "unlike before"]].map(([id, text]) => h("button", {type: "button", title: id === "before" ? `marked is what differs from ${before.said || "all of ΔW"}` : "marked is what the base did not write", "aria-pressed": id === mark, onclick: () => { mark = id; paint(); }}, text)));
      const {runs} = mark === "before" && older ? older : diff;
      adapted.replaceChildren(...(mine ? runs.map(([w, is]) => is ? h("ins", {}, w) : w) : [shown.done ? "(it wrote nothing)" : ""]));
    }
    views.words.show();
    losses();
  }
  function losses() {
    if (!info) return;
    const {loss, score} = info, now = lossNow(), pieces = [], moved = !whole();
    if (loss) pieces.push(h("span", {title: `mean over ${loss.rows} held-out rows, nats a token`}, h("span", {class: "ll-muted"}, "held-out loss "), h("b", {class: "ll-base"}, loss.base.toFixed(2)), h("span", {"aria-label": "to"}, " → "),
      h("b", {class: "ll-warm ll-mid", id: "cp-loss-now"}, (now?.loss ?? loss.adapted).toFixed(2)),
      moved ? h("span", {class: "ll-muted"}, now ? now.rows != null && now.rows < now.of ? ` on ${now.rows} of ${now.of} rows` : "" : " from all, measuring…") : null));
    if (score) pieces.push(h("span", {title: `over ${score.rows} held-out prompts`}, h("span", {class: "ll-muted"}, `${score.name} `), h("b", {class: "ll-base"}, score.base), h("span", {"aria-label": "to"}, " → "),
      h("b", {class: "ll-warm ll-mid"}, score.adapted), moved ? h("span", {class: "ll-muted"}, " from all") : null));
    lossLine.replaceChildren(...pieces);
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
