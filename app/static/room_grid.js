/* Second act: the grid's cells with their estimates, and one's own runs with their place in the queue. */
import {fmt, h, on, show, state} from "./core.js";
import {act, room} from "./room.js";
import {openRun} from "./run.js";

/* Opens a run in the page below, once that is there. */
let wanted = null;
export function open(run) {
  if (!state.boot) { wanted = run; return; }
  room.look(true);
  openRun(run, {refill: true, push: true});
  show("train");
}
on("start", () => { if (wanted != null) setTimeout(() => open(wanted)); });

export function cells() {
  const say = h("p", {class: "ll-say rm-grid-say"}), table = h("div", {class: "rm-grid"}), mine = h("ul", {class: "rm-runs", "aria-label": "Runs"}), left = h("p", {class: "ll-note"});
  const node = h("div", {class: "rm-cells"}, say, table, left, mine);
  let drawn = "";

  function place(p, i, g, over) {
    const about = [p.taken ? `${p.taken} ran it` : null, `≈ ${fmt.time(p.estimate_s)}`.replaceAll(" ", "\u00a0")].filter(Boolean).join(" · ");
    return h("button", {type: "button", class: `rm-cell${p.dealt ? " dealt" : ""}`, disabled: over, onclick: () => act("take", {place: i}),
      "aria-label": `r ${p.rank}, ${p.set}: ${about}${p.dealt ? "; handed to you" : ""}`},
    h("b", {}, `r ${p.rank}`), h("span", {}, about), p.dealt && h("i", {}, g.team ? `for team ${g.team}` : "for you"));
  }
  function line(c) {
    const how = c.status === "waiting" ? `number ${c.position} in the queue, starts in ≈ ${fmt.time(c.starts_s)}`
      : c.status === "started" ? c.step ? `step ${c.step} of ${c.steps}` : "is starting"
        : c.status === "failed" ? c.error ?? "did not end well" : c.loss != null ? `held-out loss ${c.loss.toFixed(2)}` : c.status;
    const live = ["waiting", "started"].includes(c.status);
    return h("li", {class: "rm-run", "data-status": c.status}, h("b", {}, c.says, c.earlier ? ", of an earlier question" : ""), h("span", {class: "rm-who"}, c.mine ? "yours" : c.who), h("span", {class: "rm-how"}, how),
      live && c.steps ? h("progress", {max: c.steps, value: c.step, "aria-label": "How far it is"}) : "",
      live && c.may ? h("button", {type: "button", class: "ll-button small", "aria-label": `Cancel ${c.says}`, onclick: () => act("cancel", {cell: c.id})}, "Cancel") : "",
      c.run != null && c.status === "done" ? h("button", {type: "button", class: "ll-button small", "aria-label": `Open ${c.says}`, onclick: () => open(c.run)}, "Open") : "");
  }
  function update(view) {
    const g = view.grid;
    if (!g) { say.textContent = "The presenter sets the grid first."; return; }
    const key = JSON.stringify([g, view.stage]);
    if (key === drawn) return;
    drawn = key;
    const focus = document.activeElement?.getAttribute?.("aria-label"), own = g.cells.filter((c) => c.mine), now = own.filter((c) => !c.earlier), presenter = view.role === "presenter";
    const sets = [...new Set(g.places.map((p) => p.set))];
    const count = g.cells.filter((c) => !c.earlier).length, asks = view.question?.act === "grid" || presenter;
    table.hidden = left.hidden = !asks;
    say.textContent = presenter ? `${count} run${count === 1 ? "" : "s"} on ${g.task}, ${g.steps} steps each.`
      : !asks ? "Your runs of an earlier question go on meanwhile." : now.length ? "Your run is below. Take another when it is done." : `Press a cell: it trains the real model on ${g.task}, ${g.steps} steps, and the loss goes to the wall.`;
    table.replaceChildren(...sets.map((set) => h("div", {class: "rm-row", role: "group", "aria-label": set}, h("span", {class: "rm-set"}, set),
      g.places.map((p, i) => [p, i]).filter(([p]) => p.set === set).map(([p, i]) => place(p, i, g, false)))));
    left.textContent = `${g.spent_min.toFixed(1)} of ${g.minutes} minutes of training are taken. What waits together is trained together.`;
    mine.replaceChildren(...(!asks ? own : presenter ? g.cells : [...own, ...g.cells.filter((c) => !c.mine && ["waiting", "started"].includes(c.status))]).map((c) => line({...c, may: c.mine || presenter})));
    if (focus) node.querySelector(`[aria-label="${CSS.escape(focus)}"]`)?.focus();
  }
  return {node, update};
}
