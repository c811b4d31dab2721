/* Step and Slow: one real step of training, walked in its four stages, with the numbers of the open run.
 * What was walked is kept, so that Back goes all the way; the server's adapter is gone when the walk is left. */
import {Away, Refused, h, on, post, state} from "./core.js";
import {cellmap} from "./cellmap.js";
import {absent} from "./formula.js";

const SLOW = 2600;                                                 // ms for each stage
const STAGES = [
  ["forward", "1 Forward", "h = W0·x + s·B·A·x"], ["gradient", "2 Gradient", "∂L/∂B = s·(∂L/∂h)·(A·x)ᵀ"],
  ["adam", "3 Adam", "B ← B − rate · m/(√v + ε)"], ["delta", "4 The new ΔW", "ΔW = s·B·A"]];
const short = (x) => x === 0 ? "0" : x >= 1e-3 && x < 1e4 ? String(+x.toPrecision(2)) : x.toExponential(1);

/* Bars of a few numbers on one scale, each with its name and value. */
function bars(rows) {
  const top = Math.max(...rows.map((r) => r[1]), 1e-30);
  return h("div", {class: "wk-bars", role: "list"}, rows.map(([name, value, cls, old]) => h("div", {role: "listitem"}, h("span", {class: "wk-name"}, name),
    h("span", {class: "wk-track", "aria-hidden": "true"}, h("i", {class: cls ?? "", style: {width: `${100 * value / top}%`}}), old == null ? null : h("b", {style: {left: `${100 * Math.min(1, old / top)}%`}})), h("b", {}, short(value)))));
}

export function walk() {
  const where = h("p", {class: "wk-where"}), fault = h("p", {class: "ll-fault", role: "alert"}), live = h("p", {class: "ll-hidden", role: "status"});
  const cards = STAGES.map(([id, name, formula]) => {
    const body = h("div", {class: "wk-body"}), say = h("p", {class: "wk-say"});
    return {id, body, say, node: h("section", {class: "wk-stage", "data-stage": id, "aria-label": name}, h("h3", {}, name), h("p", {class: "wk-formula"}, formula), body, say)};
  });
  const back = h("button", {type: "button", class: "ll-button", onclick: () => go(-1)}, "Back");
  const next = h("button", {type: "button", class: "ll-button go", id: "walk-next", onclick: () => go(1)}, "Next");
  const slow = h("button", {type: "button", class: "ll-button", "aria-pressed": "false", onclick: () => pace(!timer)}, "Slow");
  const sheet = h("dialog", {class: "ll-words wk", id: "walk", "aria-labelledby": "walk-h"}, h("div", {class: "ll-head"}, h("h2", {id: "walk-h", class: "ll-h"}, "One real step"), where),
    h("div", {class: "wk-stages", tabindex: 0, role: "region", "aria-label": "The four stages"}, cards.map((c) => c.node)), fault, live,
    h("div", {class: "wk-acts"}, h("p", {class: "ll-note"}, "Live, on the page's own model: an adapter of its own, taken off again after each stage."), back, next, slow,
      h("button", {type: "button", class: "ll-button", onclick: () => sheet.close()}, "Close")));
  sheet.addEventListener("close", () => { pace(false); post("walk-end", {page}).catch(() => {}); });
  sheet.addEventListener("keydown", (e) => { const d = {ArrowRight: 1, ArrowLeft: -1}[e.key]; if (d && !e.target.closest("[role=grid]")) { e.preventDefault(); go(d); } });

  let steps = [], at = {step: 0, stage: -1}, busy = false, timer = 0, of = null, turn = 0, page = "";  // page: who walks
  /* What is asked for: the open run's settings, or the form's where none is open. */
  const asks = () => state.run != null ? {run: state.run} : {model: state.facts?.name, spec: state.spec, config: state.config, data: state.data};

  async function ask(step, stage) {
    const mine = turn, a = await post("walk", {page, step: step + 1, stage, m: state.matrix, ...of});
    if (mine !== turn) throw new Away("another walk has begun");
    steps[step] = {...steps[step], ...a};
  }
  async function go(by) {
    if (busy) return;
    let {step, stage} = at;
    stage += by;
    if (stage > 3) { step += 1; stage = 0; }
    if (stage < 0) { if (!step) return; step -= 1; stage = 3; }
    const need = stage === 0 ? !steps[step]?.forward : !steps[step]?.delta;
    fault.textContent = "";
    try {
      if (need) {
        busy = true;
        waiting(stage);
        if (stage && coming) await coming;                         // it is on its way already
        if (stage === 0 || !steps[step].delta) await ask(step, stage === 0 ? "forward" : "finish");
      }
      at = {step, stage};
      draw();
      if (stage === 0 && !steps[step].delta && !coming) ahead(step);
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      fault.textContent = error instanceof Refused ? error.message : "";
      pace(false);
    } finally { busy = false; buttons(); }
  }
  /* While the first stage is read the others are computed. */
  let coming = null;
  function ahead(step) {
    const mine = coming = ask(step, "finish").catch((error) => { if (error instanceof Refused) fault.textContent = error.message; else if (!(error instanceof Away)) throw error; })
      .finally(() => { if (coming === mine) coming = null; });
  }
  function waiting(stage) { cards[stage].node.classList.add("wait"); buttons(); }
  function buttons() {
    back.disabled = busy || (at.step === 0 && at.stage <= 0);
    next.disabled = busy;
    next.textContent = busy ? "Computing…" : at.stage === 3 ? `Step ${at.step + 2}` : "Next";
  }
  function pace(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => { if (!busy) go(1); }, SLOW) : 0;
    slow.textContent = on ? "Pause" : "Slow";
    slow.setAttribute("aria-pressed", Boolean(on));
  }

  function draw() {
    const s = steps[at.step];
    where.textContent = `${state.run == null ? "the form's settings" : state.run === 0 ? "the recorded run's settings" : `run ${state.run}'s settings`}, step ${at.step + 1}${s.steps ? ` of ${s.steps}` : ""}${s.title ? `; ${s.title}` : ""}`;
    cards.forEach((c, i) => {
      const there = i <= at.stage;
      c.node.classList.remove("wait");
      c.node.classList.toggle("now", i === at.stage);
      c.node.classList.toggle("there", there);
      c.body.replaceChildren(...(there ? [bodies[c.id](s)].flat() : []));
      c.say.textContent = there ? (c.id === "forward" ? `${s.forward.say} ${s.forward.beside}` : `${c.id === "gradient" ? absent(s.m, "this run") : ""}${s[c.id].say}`) : "";
    });
    live.textContent = `${STAGES[at.stage][1]}. ${cards[at.stage].say.textContent}`;
    cards[at.stage].node.scrollIntoView({block: "nearest"});
    buttons();
  }
  const bodies = {
    forward: ({forward: f}) => [h("p", {class: "wk-big"}, h("b", {}, f.loss.toFixed(3)), " nats a token"), ...f.texts.map((row) => h("p", {class: "wk-text"}, row.map(([t, loss]) => loss == null
      ? h("span", {class: "ll-muted"}, t) : h("span", {class: "wk-tok", title: `${t.trim()}: ${loss.toFixed(2)} nats`, style: {"--d": Math.min(1, loss / 6)}}, t))))],
    gradient: ({gradient: g, m}) => {
      const names = Object.keys(g.map), top = Math.max(...names.flatMap((n) => g.map[n]).filter((x) => x != null), 1e-30);
      const map = cellmap(names, g.map[names[0]].length, {label: `‖∂L/∂B‖ by layer and matrix, up to ${short(top)}`, height: names.length > 2 ? 9 : 16});
      map.paint(g.map, 0, top, (l, t, x) => x == null ? `layer ${l} ${t} is frozen` : `layer ${l} ${t}: ‖∂L/∂B‖ = ${short(x)}`);
      map.mark(m);
      return [bars([["‖∂L/∂A‖", g.A], ["‖∂L/∂B‖", g.B]]), h("p", {class: "ll-note"}, "‖∂L/∂B‖ of every matrix:"), map.node];
    },
    adam: ({adam: a}) => [h("p", {class: "ll-note"}, "The size of the change:"), bars([["of A", a.A], ["of B", a.B]])],
    delta: ({delta: d}) => [bars([["‖ΔW‖", d.norms[1], "", d.norms[0]]]), h("p", {class: "ll-note"}, "Its singular values; the mark is where each was before:"),
      bars(d.after.slice(0, 8).map((x, i) => [`σ${"₁₂₃₄₅₆₇₈"[i]}`, x, "", d.before[i]]))],
  };

  function begin(on) {
    steps = [];
    at = {step: 0, stage: -1};
    of = asks();
    turn += 1;
    coming = null;
    page = `walk-${Math.random().toString(36).slice(2, 12)}`;
    busy = false;
    fault.textContent = "";
    cards.forEach((c) => { c.body.replaceChildren(); c.say.textContent = ""; c.node.classList.remove("now", "there"); });
    sheet.showModal();
    go(1).then(() => { if (on) pace(true); });
  }
  on("run", () => { if (sheet.open) sheet.close(); });
  const step = h("button", {type: "button", class: "ll-button tr-walk", id: "step-button", title: "Walk one real step, a stage at a time", onclick: () => begin(false)}, "Step");
  const slowly = h("button", {type: "button", class: "ll-button tr-walk", id: "slow-button", title: "Walk real steps by themselves, slowly", onclick: () => begin(true)}, "Slow");
  on("facts start", () => { step.disabled = slowly.disabled = !state.facts; });
  return {nodes: [step, slowly, sheet]};
}
