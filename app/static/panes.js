/* Compare's two texts beside each other, with what is marked in the second, and the line of losses below them. */
import {h} from "./core.js";
import {changed} from "./diff.js";

export function panes(ctx) {
  const base = h("p", {class: "cp-text", id: "base-output"}), adapted = h("p", {class: "cp-text", id: "adapted-output"}), badge = h("span", {class: "ll-badge", hidden: true}, "recorded");
  const head = h("h2", {class: "ll-h ll-warm"}), since = h("div", {class: "ll-tabs cp-since", role: "group", "aria-label": "What is marked", hidden: true});
  const node = h("div", {class: "ll-grid cp-panes"}, h("section", {class: "ll-card", style: {"--span": 6}}, h("h2", {class: "ll-h ll-base"}, "base"), base),
    h("section", {class: "ll-card", style: {"--span": 6}}, h("div", {class: "ll-head"}, head, badge, since), adapted));
  const line = h("div", {class: "cp-loss", role: "status"});
  let mark = "base";

  function heading() {
    const {info, shown} = ctx, now = shown?.said ?? ctx.said();
    head.textContent = !info ? "adapted" : shown?.nothing ? "adapted, nothing of ΔW left: the base again" : `adapted by ${info.name}${now ? `, ${now}` : ""}`;
  }
  function busy(is) { for (const p of [base, adapted]) { p.classList.toggle("busy", is); p.setAttribute("aria-busy", is); } }
  function paint(waits) {
    const {info, shown, before} = ctx;
    badge.hidden = !shown?.recorded;
    heading();
    busy(waits);
    if (!shown) {
      base.replaceChildren(h("span", {class: "ll-note"}, info?.note ?? "Press the button: both models write at once."));
      adapted.replaceChildren();
      return;
    }
    const [plain, mine] = shown.texts, old = before?.texts[1];
    base.textContent = plain || (shown.done ? "(it wrote nothing)" : "");
    const diff = changed(plain ?? "", mine ?? ""), older = before && old !== mine ? changed(old, mine ?? "") : null;
    since.hidden = !(older && shown.done && shown.key !== before.key);
    if (since.hidden) mark = "base";
    else since.replaceChildren(...[["base", "unlike base"], ["before", "unlike before"]].map(([id, text]) => h("button", {type: "button", title: id === "before" ? `marked is what differs from ${before.said || "all of ΔW"}` : "marked is what the base did not write", "aria-pressed": String(id === mark), onclick: () => { mark = id; paint(waits); }}, text)));
    const {runs} = mark === "before" && older ? older : diff;
    adapted.replaceChildren(...(mine ? runs.map(([w, is]) => is ? h("ins", {}, w) : w) : [shown.done ? "(it wrote nothing)" : ""]));
  }
  function losses() {
    const {info} = ctx;
    if (!info) return;
    const {loss, score} = info, now = ctx.lossNow(), pieces = [], moved = !ctx.whole(), to = () => h("span", {"aria-label": "to"}, " → ");
    if (loss) pieces.push(h("span", {title: `mean over ${loss.rows} held-out rows, nats a token`}, h("span", {class: "ll-muted"}, "held-out loss "), h("b", {class: "ll-base"}, loss.base.toFixed(2)), to(),
      h("b", {class: "ll-warm ll-mid", id: "cp-loss-now"}, (now?.loss ?? loss.adapted).toFixed(2)),
      moved ? h("span", {class: "ll-muted"}, now ? now.rows != null && now.rows < now.of ? ` on ${now.rows} of ${now.of} rows` : "" : " from all, measuring…") : null));
    if (score) pieces.push(h("span", {title: `over ${score.rows} held-out prompts`}, h("span", {class: "ll-muted"}, `${score.name} `), h("b", {class: "ll-base"}, score.base), to(),
      h("b", {class: "ll-warm ll-mid"}, score.adapted), moved ? h("span", {class: "ll-muted"}, " from all") : null));
    line.replaceChildren(...pieces);
  }
  /* Nothing to compare: what will be here. */
  function blank(text) {
    base.replaceChildren(h("span", {class: "ll-note"}, text));
    adapted.replaceChildren();
    head.textContent = "adapted";
    line.replaceChildren();
  }
  return {node, line, heading, busy, paint, losses, blank};
}
