/* Held-out loss against trainable parameters: every ended run on the same rows is a point, and the front is drawn. */
import {Away, Refused, get, h, on, state} from "./core.js";
import {draw} from "./plot.js";

export function pareto(onPick) {
  const plot = h("div", {class: "tr-plot", id: "pareto-plot"}), say = h("p", {class: "ll-note tr-pareto-say", role: "status"});
  const node = h("div", {class: "tr-pareto", hidden: true}, plot, say);
  let found = null, asking = 0;
  async function open() {
    if (node.hidden || state.run == null) return;
    const mine = ++asking;
    let a;
    try { a = await get("pareto", {run: state.run}); } catch (error) {
      if (error instanceof Away || error instanceof Refused) return;
      throw error;
    }
    if (mine !== asking || a.run !== state.run) return;
    found = a;
    say.textContent = a.say;
    plot.hidden = !a.figure;
    if (!a.figure) return;
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `Held-out loss by trainable parameters. ${a.say}`);
    await draw(plot, a.figure);
    plot.removeAllListeners?.("plotly_click");
    plot.on?.("plotly_click", (e) => { const run = e.points[0]?.customdata; if (run != null) onPick(run); });
  }
  on("run ended", open);
  return {node, show(is) { node.hidden = !is; open(); }, figure: () => found?.figure, rows: () => found?.rows};
}

/* The table of the runs that lie over each other: only the settings that differ, then what came of them. */
export function differs(table) {
  if (!table) return [];
  return [h("div", {class: "tr-differs", tabindex: 0, role: "region", "aria-label": "What differs between the runs drawn here"}, h("table", {},
    h("thead", {}, h("tr", {}, h("td"), table.names.map((n, i) => h("th", {scope: "col", class: i ? null : "warm"}, n)))),
    h("tbody", {}, table.rows.map(([label, ...values]) => h("tr", {}, h("th", {scope: "row"}, label), values.map((v) => h("td", {}, v)))))))];
}
