/* The row above the drawing: which model, which task or file; and what is trained on, token by token. */
import {Away, Refused, copy, emit, fmt, get, h, on, state, upload} from "./core.js";

export function dataRow(root) {
  const models = h("select", {class: "ll-field"}), tasks = h("select", {class: "ll-field"});
  const file = h("input", {type: "file", accept: ".txt,.tsv,.csv,.jsonl", class: "ll-hidden", tabindex: -1, "aria-label": "A file of your own"});
  const own = h("button", {type: "button", class: "ll-button", title: "Rows of your own: .txt with prompt||completion, .tsv, .csv, .jsonl; or drop a file here", onclick: () => file.click()}, "Your file…");
  const note = h("p", {class: "ll-note dt-note"}), look = h("button", {type: "button", class: "ll-link", onclick: () => open()}, "what is trained on");
  const other = h("form", {class: "dt-other", hidden: true}, h("input", {class: "ll-field", "aria-label": "Another model", placeholder: "a folder on this machine, or a hub id such as owner/name", required: true}),
    h("button", {class: "ll-button"}, "Load it"));
  const fault = h("p", {class: "ll-fault", role: "alert"});
  const sheet = h("dialog", {class: "ll-words dt-sheet", "aria-labelledby": "dt-h"});
  sheet.addEventListener("click", (e) => { if (e.target === sheet) sheet.close(); });
  const row = h("div", {class: "ll-row dt-row"},
    h("label", {id: "model-picker", class: "ll-pick"}, h("span", {}, "model"), models),
    h("label", {id: "task-picker", class: "ll-pick"}, h("span", {}, "task"), tasks), own, file, note, look);
  root.append(row, other, fault, sheet);

  /* ---- model */
  function listModels() {
    const {boot, facts} = state, names = boot.models.map((m) => m.name);
    models.replaceChildren(...boot.models.map((m) => h("option", {value: m.name}, `${m.name} · ${fmt.millions(m.parameters)}${m.cached || m.source === "embedded" ? "" : " · from the hub"}`)),
      ...(facts && !names.includes(facts.name) ? [h("option", {value: facts.name}, facts.name.split("/").at(-1))] : []),
      h("option", {value: "…"}, "another one…"));
    models.value = facts ? facts.name : "";
  }
  let loading = 0;
  async function load(name) {
    const mine = ++loading, entry = state.boot.models.find((m) => m.name === name);
    say(fault, "");
    say(note, `${entry && !entry.cached && entry.source === "hub" ? `Fetching and loading` : "Loading"} ${name.split("/").at(-1)}…`);
    models.disabled = true;
    try {
      const facts = await get("model", {name});
      if (mine !== loading) return;
      state.facts = facts;
      if (!state.spec.targets) [state.spec, state.config] = [copy(facts.spec), copy(facts.config)];   // the first model
      other.hidden = true;
      emit("facts");
      about();
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      refused(error);
    } finally { models.disabled = false; listModels(); }
  }
  models.onchange = () => {
    other.hidden = models.value !== "…";
    if (models.value === "…") other.querySelector("input").focus(); else load(models.value);
  };
  other.onsubmit = (e) => { e.preventDefault(); load(other.querySelector("input").value.trim()); };

  /* ---- task or file */
  const files = new Map();
  function listTasks() {
    const {data} = state;
    if (data.file) files.set(data.file, data.name);
    tasks.replaceChildren(...state.boot.tasks.map((t) => h("option", {value: `task:${t.name}`}, t.name)),
      ...[...files].map(([id, name]) => h("option", {value: `file:${id}`}, name)));
    tasks.value = data.file ? `file:${data.file}` : `task:${data.task}`;
  }
  async function choose(data) {
    const was = state.data;
    state.data = data;
    if (!await about()) { state.data = was; files.delete(data.file); }
    listTasks();
    emit("data");
  }
  tasks.onchange = () => {
    const [kind, id] = tasks.value.split(/:(.*)/);
    choose(kind === "task" ? {task: id} : {file: id, name: files.get(id)});
  };
  async function take(f) {
    if (!f) return;
    say(fault, "");
    say(note, `Reading ${f.name}…`);
    try {
      const {file: id, name} = await upload(f);
      files.set(id, name);
      await choose({file: id, name});
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      refused(error);
    } finally { file.value = ""; }
  }
  file.onchange = () => take(file.files[0]);
  row.addEventListener("dragover", (e) => { e.preventDefault(); row.classList.add("over"); });
  row.addEventListener("dragleave", () => row.classList.remove("over"));
  row.addEventListener("drop", (e) => { e.preventDefault(); row.classList.remove("over"); take(e.dataTransfer.files[0]); });

  /* ---- what is known of the rows: how many, how long, which were cut */
  let asking = 0, answered = 0;
  async function about() {
    if (!state.facts) return false;
    const mine = ++asking, {data, config} = state;
    try {
      const found = await get("data", {model: state.facts.name, task: data.task, file: data.file, seed: config.seed, max_tokens: config.max_tokens});
      if (mine !== asking) return true;
      answered = mine;
      say(fault, "");
      state.about = found;
      emit("about", found);
      return true;
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      if (mine === asking) { answered = mine; refused(error); }
      return false;
    }
  }
  on("about", (a) => {
    if (!a) return;
    note.replaceChildren(`${fmt.int(a.train_rows)} rows, ${fmt.int(a.held_rows)} held out`, " · ", a.notes.length ? h("b", {}, a.notes.length === 1 ? a.notes[0] : `${a.notes.length} remarks`) : a.about);
    note.title = [a.about, ...a.notes].join("\n");
    if (sheet.open) fill(a);
  });

  /* ---- the sheet: rows as the model sees them */
  function open() {
    if (!state.about) return;
    fill(state.about);
    sheet.showModal();
  }
  function fill(a) {
    const close = h("form", {method: "dialog"}, h("button", {class: "ll-button"}, "Close"));
    if (answered !== asking) {                                // what is known is of other rows than those chosen
      sheet.replaceChildren(h("h2", {id: "dt-h"}, "What is trained on"), h("p", {class: "ll-note"}, "Reading the rows…"), close);
      return;
    }
    const text = (p) => h("span", {class: p.trained ? "dt-on" : "dt-off"}, p.text.replaceAll("\n", "↵"));
    sheet.replaceChildren(h("h2", {id: "dt-h"}, `What is trained on: ${a.name}`), h("p", {class: "ll-note"}, a.about),
      h("p", {class: "dt-key"}, h("span", {class: "dt-off"}, "given"), " the model reads this; ", h("span", {class: "dt-on"}, "trained"),
        " it learns to write this, token by token. A prompt stands in the template ", h("code", {}, a.template), "."),
      h("div", {class: "ll-words-list", tabindex: 0, role: "region", "aria-label": "Rows as tokens"},
        h("ol", {class: "dt-rows"}, a.rows.map((r) => h("li", {class: r.cut ? "cut" : null}, h("p", {class: "dt-text"}, r.pieces.map(text)),
          h("p", {class: "ll-note"}, `${r.line ? `line ${r.line}, ` : ""}${r.tokens} tokens${r.cut ? `; longer than ${a.max_tokens}, so it was cut` : ""}`))))),
      a.notes.length ? h("ul", {class: "dt-notes"}, a.notes.map((n) => h("li", {}, n))) : "", close);
  }

  const say = (node, text) => { node.textContent = text; };
  function refused(error) {                                   // away: the frame says so
    say(fault, error instanceof Away ? "" : error.message);
    emit("about", state.about);
  }
  on("back", () => { if (!state.about) about(); });
  on("refill", ({facts, fault: why}) => {
    if (facts) { state.facts = facts; emit("facts"); }
    say(fault, why || "");
    listModels();
    listTasks();
    about();
  });
  let rows = "";
  on("config", () => { const now = `${state.config.max_tokens}/${state.config.seed}`; if (now !== rows) { rows = now; clearTimeout(wait); wait = setTimeout(about, 400); } });
  let wait = 0;
  rows = `${state.config?.max_tokens}/${state.config?.seed}`;
  listModels();
  listTasks();
  if (state.boot.fault) say(fault, state.boot.fault);
  about();
}
