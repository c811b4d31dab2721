/* Compare: one prompt, both models side by side, written as one watches; what the adapter changed, word by word. */
import {Away, Refused, fmt, get, h, on, post, state} from "./core.js";
import {changed} from "./diff.js";
import {tokenStrip} from "./tokens.js";

const PAGE = Math.random().toString(36).slice(2);

export function compare(root, {send}) {
  const prompt = h("textarea", {class: "ll-field cp-prompt", rows: 1, spellcheck: "false", "aria-label": "Prompt", placeholder: "a prompt, as the task's rows have it"});
  const pick = h("select", {class: "ll-field", "aria-label": "Held-out example"}), reference = h("p", {class: "ll-note cp-reference"});
  const go = h("button", {class: "ll-button go", type: "button", id: "compare-button", onclick: () => ask()}, "Write both");
  const fault = h("p", {class: "ll-fault", role: "alert"}), badge = h("span", {class: "ll-badge", hidden: true}, "recorded");
  const base = h("p", {class: "cp-text", id: "base-output"}), adapted = h("p", {class: "cp-text", id: "adapted-output"});
  const head = h("h2", {class: "ll-h ll-warm"}), since = h("div", {class: "ll-tabs cp-since", role: "group", "aria-label": "What is marked", hidden: true});
  const dial = h("input", {type: "range", min: 0, step: 1, id: "cp-k"}), k = h("output", {class: "lm-number", for: "cp-k"}), dialLabel = h("label", {for: "cp-k"}, "directions of ΔW kept, k");
  const lossLine = h("div", {class: "cp-loss"}), strip = tokenStrip(), took = h("p", {class: "ll-note"});
  root.append(h("div", {class: "ll-row cp-top"}, h("label", {id: "prompt", class: "cp-hold"}, prompt), pick, go), reference, fault, h("div", {class: "ll-grid"},
    h("section", {class: "ll-card", style: {"--span": 6}}, h("h2", {class: "ll-h ll-base"}, "base"), base),
    h("section", {class: "ll-card", style: {"--span": 6}}, h("div", {class: "ll-head"}, head, badge, since), adapted),
    h("section", {class: "ll-card cp-dials", style: {"--span": 12}}, h("div", {class: "lm-row cp-dial"}, dialLabel, dial, k, lossLine)),
    h("section", {class: "ll-card", style: {"--span": 12}}, h("div", {class: "ll-head"}, h("h2", {class: "ll-h"}, "Where the adapter speaks"), h("p", {class: "ll-note"}, "darker: its probability moved more; point at a token, or use the arrows"), took), strip.nodes)));

  let info = null, shown = null, before = null, mark = "base", seq = 0, timer = 0, measured = new Map();
  const examples = () => info?.examples ?? [];
  const full = () => dial.value === dial.max;

  /* ---- the run that is compared */
  let opening = 0;
  async function open() {
    const mine = ++opening, run = state.run;
    if (run == null) { info = null; return blank("After a run, the texts of the base and of the adapted model will stand here side by side."); }
    try { info = await get("compare", {run}); } catch (error) {
      if (error instanceof Away) return;
      if (!(error instanceof Refused)) throw error;
      return blank(error.message);
    }
    if (mine !== opening) return;
    measured = new Map();
    dial.max = info.rank;
    dial.value = info.rank;
    pick.replaceChildren(...(examples().length ? examples().map((e, i) => h("option", {value: i}, `held-out example ${i + 1}`)) : [h("option", {value: ""}, "no held-out example")]), h("option", {value: "own"}, "a prompt of your own"));
    shown = before = null;
    seq++;
    fault.textContent = "";
    if (examples().length) choose(0); else pick.value = "own";
    paint();
    first();
  }
  /* The first look at a run: its texts are written unasked, unless a training needs the machine. */
  function first() { if (state.tab === "compare" && info?.ready && !shown && !state.view?.live && prompt.value) ask(); }
  function blank(text) {
    shown = null;
    fault.textContent = "";
    base.textContent = adapted.textContent = "";
    base.append(h("span", {class: "ll-note"}, text));
    strip.show([], "");
    go.disabled = true;
    head.textContent = "adapted";
    dial.disabled = true;
    lossLine.replaceChildren();
  }
  function choose(i) {
    const e = examples()[i];
    pick.value = i;
    prompt.value = e.prompt;
    reference.replaceChildren(h("b", {}, "held-out answer "), e.reference);
    if (e.base != null) { before = null; shown = {base: e.base, adapted: e.adapted, tokens: e.tokens, k: null, done: true, recorded: true}; }
  }
  pick.onchange = () => {
    if (pick.value === "own") { prompt.value = ""; reference.textContent = ""; prompt.focus(); return; }
    seq++;
    choose(+pick.value);
    paint();
    if (!shown?.recorded || !full()) ask();
  };
  prompt.oninput = () => { pick.value = "own"; reference.textContent = ""; };
  prompt.onkeydown = (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); ask(); } };

  /* ---- asking */
  async function ask() {
    if (!info?.ready || !state.run && state.run !== 0) return;
    const mine = ++seq, was = shown;
    fault.textContent = "";
    before = shown?.done ? shown : before;
    shown = {base: "", adapted: "", tokens: null, k: full() ? null : +dial.value, done: false};
    paint();
    try { await get("ping"); } catch { if (mine === seq) { shown = was; paint(); } return; }     // away: the frame says so
    if (mine !== seq) return;
    send({run: state.run, prompt: prompt.value, k: shown.k, page: PAGE, seq}, "submit");
  }
  dial.oninput = () => { k.textContent = dial.value; losses(); clearTimeout(timer); timer = setTimeout(ask, 150); };

  /* ---- showing */
  function paint() {
    const busy = Boolean(shown && !shown.done), ready = Boolean(info?.ready);
    go.disabled = busy || !ready;
    go.textContent = shown?.seconds ? `Write both (≈ ${fmt.time(shown.seconds)})` : "Write both";
    dial.disabled = !ready;
    k.textContent = dial.value;
    badge.hidden = !shown?.recorded;
    const kept = shown ? shown.k ?? info.rank : info?.rank;
    head.textContent = !info ? "adapted" : kept === 0 ? "adapted, nothing kept (k = 0): the base again" : `adapted by ${info.name}${shown && kept < info.rank ? `, ${kept} of ${info.rank} directions` : ""}`;
    for (const p of [base, adapted]) { p.classList.toggle("busy", busy); p.setAttribute("aria-busy", busy); }
    if (!shown) {
      base.replaceChildren(h("span", {class: "ll-note"}, info?.note ?? "Press the button: both models write at once."));
      adapted.replaceChildren();
    } else {
      base.textContent = shown.base || (shown.done ? "(it wrote nothing)" : "");
      const diff = changed(shown.base, shown.adapted), older = before && before.adapted !== shown.adapted ? changed(before.adapted, shown.adapted) : null;
      since.hidden = !(older && shown.done && shown.k !== before.k);
      if (since.hidden) mark = "base";
      if (!since.hidden) since.replaceChildren(...[["base", "unlike base"], ["before", `since k = ${before.k ?? info.rank}`]].map(([id, text]) => h("button", {type: "button", "aria-pressed": id === mark, onclick: () => { mark = id; paint(); }}, text)));
      const {runs} = mark === "before" && older ? older : diff;
      adapted.replaceChildren(...(shown.adapted ? runs.map(([w, is]) => is ? h("ins", {}, w) : w) : [shown.done ? "(it wrote nothing)" : ""]));
    }
    strip.show(shown?.tokens ?? null, !shown ? "" : shown.done ? (kept === 0 ? "With k = 0 nothing is added: the base speaks alone." : "") : "…");
    took.textContent = shown?.seconds ? `written in ${shown.seconds.toFixed(1)} s` : "";
    losses();
  }
  function losses() {
    if (!info) return;
    const {loss, score, rank} = info, now = +dial.value, at = now === rank ? null : now === 0 ? loss?.base : measured.get(now), pieces = [];
    if (loss) pieces.push(h("span", {title: `mean over ${loss.rows} held-out rows, nats a token`}, h("span", {class: "ll-muted"}, "held-out loss "), h("b", {class: "ll-base"}, loss.base.toFixed(2)), h("span", {"aria-label": "to"}, " → "),
      h("b", {class: "ll-warm ll-mid"}, (at ?? loss.adapted).toFixed(2)), now !== rank && at == null ? h("span", {class: "ll-muted"}, ` from k = ${rank} `) : null,
      now !== rank && at == null ? h("button", {class: "ll-link", type: "button", onclick: measure}, `measure at k = ${now}`) : null));
    if (score) pieces.push(h("span", {title: `over ${score.rows} held-out prompts`}, h("span", {class: "ll-muted"}, `${score.name} `), h("b", {class: "ll-base"}, score.base), h("span", {"aria-label": "to"}, " → "),
      h("b", {class: "ll-warm ll-mid"}, score.adapted), now !== rank ? h("span", {class: "ll-muted"}, ` from k = ${rank}`) : null));
    lossLine.replaceChildren(...pieces);
  }
  async function measure(e) {
    const now = +dial.value, run = state.run;
    e.target.disabled = true;
    e.target.textContent = "measuring…";
    try {
      const found = await post("loss", {run, k: now});
      if (run === state.run) { measured.set(now, found.loss); losses(); }
    } catch (error) { if (!(error instanceof Refused || error instanceof Away)) throw error; fault.textContent = error.message; losses(); }
  }

  on("run ended start", open);
  let stale = null;
  on("view", (v) => { const key = v && `${v.run}.${v.status}.${v.score?.adapted}`; if (key !== stale) { stale = key; if (v && info && v.run === info.run && (v.live !== info.live || v.adapter !== info.ready)) open(); } });
  on("back", () => { if (shown && !shown.done) { shown = null; paint(); } });
  on("tab", first);
  return {update(v) {
    if (!v || v.seq !== seq || v.run !== state.run) return;                 // an answer to an older question
    if (v.error) { fault.textContent = v.error; shown = before; paint(); return; }
    shown = {...shown, ...v, k: v.k ?? null};
    paint();
  }};
}
