/* Which words: where the adapter speaks, in what it wrote, in the held-out answer, or in a text of one's own. */
import {Away, Refused, address, asked as linked, h, post, state} from "./core.js";
import {mark} from "./help.js";
import {brief} from "./link.js";
import {tokenStrip} from "./tokens.js";

const TEXTS = [["written", "what it wrote"], ["answer", "the held-out answer"], ["own", "any text"]], COLOURS = [["d", "probability of this token"], ["kl", "KL, all tokens"]];
const named = (list, name) => list.some(([id]) => id === linked(name)) ? linked(name) : list[0][0];

export function wordsView(ctx) {
  let what = named(TEXTS, "words"), by = named(COLOURS, "colour"), tokens = null, seq = 0, timer = 0, asked = null, wait = "";
  const strip = tokenStrip(), note = h("p", {class: "ll-note", role: "status"}), say = h("p", {class: "ct-say"});
  const which = h("div", {class: "ll-tabs", role: "group", "aria-label": "Which text"}, TEXTS.map(([id, text]) =>
    h("button", {type: "button", "data-id": id, "aria-pressed": String(id === what), onclick: () => choose(id)}, text)));
  const measure = h("div", {class: "ll-tabs", role: "group", "aria-label": "What the colour shows"}, COLOURS.map(([id, text]) =>
    h("button", {type: "button", "data-id": id, "aria-pressed": String(id === by), onclick: () => { by = id; link(); draw(); }}, text)));
  const own = h("textarea", {class: "ll-field wd-own", rows: 2, hidden: what !== "own", "aria-label": "Any text", placeholder: "type or paste any text: both models read it", oninput: () => { clearTimeout(timer); timer = setTimeout(() => { link(); read(); }, 350); }});
  own.value = linked("text") ?? "";
  const link = () => address({words: what === "written" ? null : what, colour: by === "d" ? null : by, text: what === "own" ? brief(own.value) : null});

  function choose(id) {
    what = id;
    which.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.id === id));
    own.hidden = id !== "own";
    if (id === "own" && !own.value) own.value = ctx.shown?.texts?.[1] || ctx.prompt;
    if (id === "own") own.focus();
    asked = null;
    link();
    show();
  }
  const text = () => what === "own" ? own.value : ctx.reference() ?? "";
  /* What it wrote comes with the texts; everything else is read by both models in one pass. */
  function show() {
    which.querySelector('[data-id="answer"]').disabled = !ctx.reference();
    if (what !== "written") { if (own.checkVisibility() || which.checkVisibility()) read(); return; }
    tokens = ctx.shown?.tokens ?? null;
    wait = !ctx.shown ? "" : !ctx.shown.done ? "…" : ctx.shown.nothing ? "Nothing of ΔW is left: the base speaks alone." : "";
    draw();
  }
  async function read() {
    const now = JSON.stringify([text(), what === "answer" ? ctx.prompt : null, ctx.setting(), state.run]);
    if (now === asked || state.run == null) return;
    asked = now;
    const mine = ++seq;
    if (!text().trim()) { tokens = []; wait = "A text of two tokens or more is needed."; return draw(); }
    try {
      const r = await post("speaks", {run: state.run, text: text(), prompt: what === "answer" ? ctx.prompt : null, setting: ctx.setting(), page: ctx.page, seq: mine});
      if (mine !== seq || what === "written") return;
      tokens = r.tokens ?? [];
      wait = r.base ? "Nothing of ΔW is left: the base speaks alone." : r.cut ? `The last ${r.cut} tokens were left out.` : tokens.length ? "" : "A text of two tokens or more is needed.";
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      asked = null;
      tokens = [];
      wait = error.message;
    }
    draw();
  }
  function draw() {
    const kl = tokens?.length ? tokens.every((t) => t.kl != null) : true, shown = kl ? by : "d";
    measure.querySelectorAll("button").forEach((b) => { b.setAttribute("aria-pressed", b.dataset.id === shown); b.disabled = b.dataset.id === "kl" && !kl; });
    strip.show(tokens, wait, shown);
    note.textContent = tokens?.length ? wait : "";
    say.textContent = tokens?.length ? sentence(shown) : "";
  }
  function sentence(by) {
    const n = tokens.length, visible = (t) => `“${t.t.trim() || "space"}”`;
    if (by === "kl") {
      const total = tokens.reduce((a, t) => a + t.kl, 0), most = tokens.reduce((a, t) => t.kl > a.kl ? t : a), ordered = tokens.map((t) => t.kl).sort((a, b) => b - a);
      let sum = 0, few = 0;
      while (sum < total / 2) sum += ordered[few++];
      return `KL is ${(total / n).toFixed(2)} nats a token; ${few} of ${n} tokens hold half of it, most of all the place of ${visible(most)} (${most.kl.toFixed(1)}).`;
    }
    const up = tokens.filter((t) => t.d > 0.1).length, down = tokens.filter((t) => t.d < -0.1).length, first = tokens.filter((t) => t.base[0]?.[0] !== t.adapted[0]?.[0]).length;
    return `${up} of ${n} tokens became likelier, ${down} less likely; at ${first} places the most probable token is another one.`;
  }
  return {nodes: [h("div", {class: "wd-row"}, which, measure, mark("kl", "KL"), note), own, ...strip.nodes.slice(0, 1), say, strip.nodes[1]], show, paint() { if (what !== "written") show(); }, look: show,
    open() { asked = null; }};
}
