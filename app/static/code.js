/* The exact form as code: the command line, the Python lines, a notebook; to copy or to take along. */
import {Away, Refused, h, on, post, state} from "./core.js";
import {save} from "./plot.js";

const KINDS = [["command", "Command line", "train.sh", "text/x-shellscript"], ["python", "Python", "train.py", "text/x-python"],
  ["notebook", "Notebook", "train.ipynb", "application/x-ipynb+json"]];

/* The button in the frame, and its dialog. */
export function code() {
  const tabs = h("div", {class: "ll-tabs", role: "group", "aria-label": "As what"}), text = h("pre", {class: "cd-text", tabindex: 0, role: "region", "aria-label": "The code"});
  const note = h("p", {class: "ll-note"}), copied = h("span", {class: "ll-note", role: "status"});
  const copy = h("button", {type: "button", class: "ll-button go", onclick: take}, "Copy"), file = h("button", {type: "button", class: "ll-button", onclick: () => save(now()[2], content(), now()[3])});
  const sheet = h("dialog", {class: "ll-words cd", "aria-labelledby": "cd-h"}, h("h2", {id: "cd-h"}, "This form as code"),
    h("p", {class: "ll-note"}, "Each makes the same adapter, to the last digit on the same machine."), tabs, text, note,
    h("form", {method: "dialog", class: "cd-acts"}, copied, copy, file, h("button", {class: "ll-button"}, "Close")));
  const button = h("button", {class: "ll-icon", type: "button", id: "as-code", disabled: true, "aria-label": "This form as code", title: "This form as code", onclick: open},
    h("span", {"aria-hidden": "true", class: "cd-sign"}, "</>"));
  let kind = "command", found = null;
  const now = () => KINDS.find(([id]) => id === kind);
  const content = () => kind === "notebook" ? `${JSON.stringify(found.notebook, null, 1)}\n` : `${found[kind].trimEnd()}\n`;
  KINDS.forEach(([id, name]) => tabs.append(h("button", {type: "button", "data-id": id, onclick: () => { kind = id; paint(); }}, name)));
  sheet.addEventListener("click", (e) => { if (e.target === sheet) sheet.close(); });

  async function open() {
    found = null;
    text.textContent = "…";
    note.textContent = copied.textContent = "";
    copy.disabled = file.disabled = true;
    paint();
    sheet.showModal();
    const {facts, spec, config, data} = state;
    try { found = await post("code", {model: facts?.name, spec, config, data}); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      text.textContent = "";
      note.textContent = error instanceof Away ? "The server is away." : error.message;
      return;
    }
    paint();
  }
  function paint() {
    tabs.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.id === kind));
    file.textContent = `Save ${now()[2]}`;
    copied.textContent = "";
    if (!found) return;
    copy.disabled = file.disabled = false;
    note.textContent = found.note;
    /* A notebook is shown as it reads, and copied and saved as it is stored. */
    text.textContent = kind === "notebook" ? found.notebook.cells.map((c) => c.cell_type === "code" ? c.source : c.source.split("\n").map((l) => `# ${l}`).join("\n")).join("\n\n")
      : kind === "command" ? found.command.replaceAll(" --", " \\\n    --") : found.python;
  }
  async function take() {
    try {
      await navigator.clipboard.writeText(kind === "command" ? found.command : content());
      copied.textContent = "Copied.";
    } catch {                                                    // no permission: it is marked, to be copied by hand
      getSelection().selectAllChildren(text);
      copied.textContent = "Marked: press Ctrl+C.";
    }
  }
  on("start facts refill", () => { button.disabled = !state.facts; });
  return {button, sheet};
}
