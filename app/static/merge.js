/* Two adapters as a pair: how well they would merge by their weights, and what their sum does on both tasks. */
import {Away, Refused, get, h, post, state} from "./core.js";
import {absent} from "./formula.js";
import {mark} from "./help.js";
import {draw, exports} from "./plot.js";

export function mergeView(ctx, add) {
  const say = h("p", {class: "ct-say"}), verdict = h("p", {class: "ct-say", role: "status"}), table = h("div", {class: "pr-table"});
  const spectra = h("div", {class: "pr-plot", role: "img", "aria-label": "Singular values of one matrix in both adapters"}), alike = h("div", {class: "pr-plot", role: "img", "aria-label": "How much of the inputs both adapters share, by layer"});
  const instead = h("p", {class: "ll-note"}), measure = h("button", {class: "ll-button small", type: "button", id: "pair-sum", onclick: sum}, "Measure their sum on both tasks"), column = h("button", {class: "ll-link", type: "button", onclick: add}, "write with their sum");
  const box = h("section", {class: "pr", hidden: true, "aria-label": "The pair"}, h("div", {class: "pr-words"}, h("div", {class: "ll-head"}, h("h2", {class: "ll-h"}, "Would they merge?"), mark("merge", "merging")), say, h("div", {class: "ct-acts"}, measure, column), verdict, table),
    h("div", {}, h("div", {class: "ll-head"}, h("h2", {class: "ll-h"}, "Spectra over each other")), spectra, instead),
    h("div", {}, h("div", {class: "ll-head"}, h("h2", {class: "ll-h"}, "Inputs that both read, by layer"), exports("the similarity", {name: () => `pair-${of}`, figure: () => fit?.figures.similarity, rows: () => fit?.rows})), alike));
  let of = null, fit = null, matrix = null, seq = 0;

  async function paint(pair) {
    box.hidden = !pair;
    if (!pair || of === pair.join() && matrix === state.matrix) return;
    if (of !== pair.join()) { verdict.textContent = ""; say.hidden = false; table.replaceChildren(); measure.disabled = false; seq++; }
    const mine = of = pair.join();
    matrix = state.matrix;
    try { fit = await get("fit", {run: pair[0], other: pair[1], m: matrix}); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      say.textContent = error.message;
      return;
    }
    if (mine !== of) return;
    say.textContent = fit.say;
    instead.textContent = fit.m ? absent(fit.m, "both") : "";
    for (const [div, name] of [[spectra, "spectra"], [alike, "similarity"]]) { div.parentNode.hidden = !fit.figures[name]; if (fit.figures[name]) draw(div, fit.figures[name]); }
  }
  async function sum() {
    const mine = ++seq, [run, other] = of.split(",").map(Number);
    measure.disabled = true;
    verdict.textContent = "Measuring the base, both and their sum…";
    try {
      const r = await post("sum", {run, other, page: ctx.page, seq: mine});
      if (mine !== seq || r.stale) return;
      verdict.textContent = r.say;
      say.hidden = true;
      table.replaceChildren(h("table", {}, h("caption", {class: "ll-hidden"}, "Held-out loss on both tasks"), h("thead", {}, h("tr", {}, h("th", {scope: "col"}, "loss on"), r.names.map((n) => h("th", {scope: "col"}, n)))),
        h("tbody", {}, r.tasks.map((t) => h("tr", {}, h("th", {scope: "row", title: `${t.rows} held-out rows, nats a token`}, t.data), t.losses.map((x) => h("td", {}, x.toFixed(2))))))));
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      verdict.textContent = error.message;
    }
    measure.disabled = false;
  }
  return {nodes: [box], paint};
}
