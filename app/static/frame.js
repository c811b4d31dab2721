/* The frame: one status line whose pieces lead to their tabs, the tabs, the words of the paper, light and dark. */
import {h, icon, on, saySpec, show, state} from "./core.js";
import {belongs, other} from "./belongs.js";
import {code} from "./code.js";
import {finger} from "./finger.js";
import {formula} from "./formula.js";
import {take} from "./take.js";

export function frame(root, {value}) {
  const sentence = h("p", {class: "ll-sentence"});
  const words = h("dialog", {class: "ll-words", "aria-labelledby": "ll-words-h"});
  const away = h("p", {class: "ll-away", role: "status"});
  const tabs = value.tabs.map(([id, text]) => h("button", {type: "button", role: "tab", id: `tab-${id}`, "data-tab-id": id,
    "aria-controls": `panel-${id}`, "aria-selected": "false", tabindex: -1, onclick: () => show(id)}, text));
  const list = h("div", {role: "tablist", class: "ll-path", "aria-label": "The reading path"}, tabs);
  list.addEventListener("keydown", (e) => {
    const i = tabs.indexOf(e.target);
    const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1}[e.key];
    if (to === undefined || !tabs[to]) return;
    e.preventDefault();
    show(tabs[to].dataset.tabId);
    tabs[to].focus();
  });
  const dark = () => document.body.classList.contains("dark");
  const themes = h("button", {class: "ll-icon", type: "button", "aria-label": "Light or dark", title: "Light or dark", onclick: () => {
    document.body.classList.toggle("dark");
    keep("ll-theme", dark() ? "dark" : "light");
  }}, icon("M20.5 14.5A8.5 8.5 0 0 1 9.5 3.5a8.5 8.5 0 1 0 11 11z"));
  const help = h("button", {class: "ll-icon", type: "button", "aria-label": "What the words mean", title: "What the words mean", onclick: () => words.showModal()},
    icon("M9.1 9a3 3 0 1 1 4.6 2.5c-1 .7-1.7 1.3-1.7 2.5M12 17.5v.01"));
  const asCode = code();
  root.append(h("header", {class: "ll-status"}, h("h1", {class: "ll-brand"}, mark(), "LoRA Lab"), sentence, h("div", {class: "ll-tools"}, take(), asCode.button, themes, help)),
    h("div", {class: "ll-nav"}, list, formula()), away, words, asCode.sheet, finger());
  belongs();
  words.addEventListener("click", (e) => { if (e.target === words) words.close(); });

  const saved = keep("ll-theme");
  if (saved && !new URLSearchParams(location.search).has("__theme")) document.body.classList.toggle("dark", saved === "dark");

  /* "smollm2-135m · q v in 30 layers · rank 8, α 16 · run 14 ✓ · loss 1.67 (was 3.14)" */
  function say() {
    const {spec, facts, view} = state, pieces = [];
    if (!state.boot) return;
    const piece = (tab, text, cls, act) => pieces.push(h("button", {type: "button", class: cls, title: `Go to ${tab[0].toUpperCase()}${tab.slice(1)}`,
      onclick: () => { show(tab); act?.(); }}, text));
    piece("adapt", facts ? short(facts.name) : "no model", "wide", () => document.querySelector("#model-picker select")?.focus());
    if (facts && spec.targets) {
      piece("adapt", saySpec(spec, facts));
      if (spec.targets.some((t) => t !== "bias")) piece("adapt", `rank ${spec.rank}, α ${spec.alpha}`, "wide");
    }
    if (!view) piece("train", "not trained yet");
    else {
      const [differs] = other();
      const name = view.recorded ? "recorded run" : `run ${view.run}`;
      const how = {queued: " waits", running: " is training", done: " ✓"}[view.status] ?? ` ${view.status}`;
      piece("train", name + (view.recorded ? "" : how) + (differs && !view.live ? ` (from ${differs})` : ""));
      if (view.loss != null && view.base_loss != null && view.loss !== view.base_loss)
        pieces.push(h("button", {type: "button", onclick: () => show("compare"), title: "Go to Compare"}, h("span", {class: "warm"}, `loss ${view.loss.toFixed(2)}`), ` (was ${view.base_loss.toFixed(2)})`));
    }
    sentence.replaceChildren(...pieces.flatMap((p, i) => i ? [h("i", {class: wide(pieces[i]) || pieces.slice(0, i).every(wide) ? "wide" : null, "aria-hidden": "true"}, "·"), p] : [p]));
    document.title = view && !view.recorded ? `run ${view.run} · LoRA Lab` : "LoRA Lab";
  }
  on("start spec facts view refill", say);
  on("start", () => {
    words.replaceChildren(h("h2", {id: "ll-words-h"}, "What the words mean"),
      h("div", {class: "ll-words-list", tabindex: 0, role: "region", "aria-label": "Words and their meaning"},
        h("dl", {}, state.boot.glossary.map(([t, d]) => [h("dt", {}, t), h("dd", {}, d)]))),
      h("form", {method: "dialog"}, h("button", {class: "ll-button"}, "Close")));
  });
  on("tab", (name) => tabs.forEach((t) => {
    const is = t.dataset.tabId === name;
    t.setAttribute("aria-selected", is);
    t.tabIndex = is ? 0 : -1;
    if (is) t.scrollIntoView({block: "nearest", inline: "nearest"});
  }));
  on("away", (is) => { away.classList.toggle("on", is); away.textContent = is ? "The server is away. Trying again; nothing that was trained is lost, and a run goes on without it." : ""; });
  let gone = 0;
  on("lost", (text) => { away.classList.add("on"); away.textContent = text; clearTimeout(gone); gone = setTimeout(() => { away.classList.remove("on"); away.textContent = ""; }, 12000); });
}

const wide = (piece) => piece.className === "wide";        // left out where the page is narrow
const short = (name) => name.split("/").at(-1);
const mark = () => h("svg", {viewBox: "0 0 32 32", width: 22, height: 22, "aria-hidden": "true", class: "ll-mark"},
  h("rect", {x: 9, y: 9, width: 20, height: 20, rx: 3, class: "w"}), h("rect", {x: 3, y: 9, width: 4, height: 20, rx: 1.5}), h("rect", {x: 9, y: 3, width: 20, height: 4, rx: 1.5}));
/* What this browser remembers; it may refuse to. */
function keep(name, value) {
  try { return value === undefined ? localStorage.getItem(name) : localStorage.setItem(name, value); } catch { return null; }
}
