/* Take it with you: the open run's adapter, its merged model, its curve; one menu in the frame. */
import {Away, Refused, fmt, h, on, post, state} from "./core.js";

export function take() {
  const said = h("p", {class: "ll-note tk-said", role: "status"}), title = h("h2", {class: "ll-h"});
  const link = (text, about, file) => h("a", {class: "tk-item", download: "", "data-file": file}, h("b", {}, text), h("span", {class: "ll-note"}, about));
  const adapter = link("Adapter folder (.zip)", "in PEFT's format: lc.load_adapter and PEFT read it", "adapter.zip");
  const curve = link("Curve (.csv)", "losses, rate and tokens by step", "take/curve.csv");
  const board = link("Curve for TensorBoard", "an event file: put it into a folder of its own", "take/tensorboard");
  const merged = h("button", {type: "button", class: "tk-item", onclick: merge}, h("b", {}, "Merged model (.zip)"), h("span", {class: "ll-note"}, "base and adapter as one transformers folder, float32; takes some seconds to make"));
  const summary = h("summary", {class: "ll-icon", "aria-label": "Take this run with you", title: "Take this run with you"},
    h("svg", {viewBox: "0 0 24 24", width: 20, height: 20, fill: "none", stroke: "currentColor", "stroke-width": 1.8, "stroke-linecap": "round", "stroke-linejoin": "round", "aria-hidden": "true"}, h("path", {d: "M12 4v11m-5-5l5 5 5-5M5 20h14"})));
  const menu = h("details", {class: "tk", id: "take-menu", hidden: true}, summary, h("div", {class: "tk-sheet"}, title, adapter, merged, curve, board, said));
  addEventListener("click", (e) => { if (menu.open && !menu.contains(e.target)) menu.open = false; });
  menu.addEventListener("keydown", (e) => { if (e.key === "Escape") { menu.open = false; summary.focus(); } });

  let run = null, busy = false;
  on("view", (v) => {
    menu.hidden = !v;
    if (!v) return;
    title.textContent = `Take ${v.name} with you`;
    adapter.hidden = merged.hidden = !v.adapter;
    merged.disabled = busy;
    if (run !== v.run) { run = v.run; said.textContent = ""; }
    for (const a of [adapter, curve, board]) a.href = `lab/api/${a.dataset.file}?run=${v.run}`;
  });
  async function merge() {
    const mine = state.run;
    busy = merged.disabled = true;
    said.textContent = "Merging: W = W0 + s·B·A, matrix by matrix…";
    try {
      const {file, bytes} = await post("merge", {run: mine});
      said.textContent = `Merged: ${fmt.bytes(bytes)}.`;
      h("a", {href: `lab/api/${file}`, download: ""}).click();
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      said.textContent = error instanceof Away ? "" : error.message;   // away: the frame says so
    } finally { busy = merged.disabled = false; }
  }
  return menu;
}
