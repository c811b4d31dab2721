/* Opening an adapter from elsewhere: files by a button or a drop, sent one after the other, then opened by the server.
 * What is not .safetensors, .json or .zip stays here; a pickle's name is sent, so that the server's refusal is shown. */
import {Away, Refused, post, h} from "./core.js";

const PART = /\.(safetensors|json|zip)$/i, PICKLE = /\.(bin|pt|pth|ckpt|pkl|pickle)$/i;

export function opener({onOpened, onFault, onNote}) {
  const input = h("input", {type: "file", multiple: true, class: "ll-hidden", tabindex: -1, "aria-label": "Files of an adapter", id: "open-files"});
  const button = h("button", {type: "button", class: "ll-button", id: "open-button", title: "An adapter from elsewhere: its folder's files, a .safetensors file (PEFT, kohya, diffusers), a .zip, or a whole fine-tuned model; or drop it here", onclick: () => input.click()}, "Open an adapter…");
  input.onchange = () => { take([...input.files]); input.value = ""; };

  /* The base of a whole model, which is found by its matrices or chosen here: a model of this machine, or a folder. */
  const known = h("datalist", {id: "known-bases"}), field = h("input", {class: "ll-field", id: "base-picker", list: "known-bases", placeholder: "a model here, or a folder", spellcheck: "false"});
  const base = h("label", {class: "ll-pick", hidden: true}, h("span", {}, "its base"), field, known);
  let last = null, set = null;                                     // what was sent last; the whole model that is open
  field.onchange = async () => {
    if (!field.value.trim()) return;
    if (!set) { if (last) take(...last, field.value.trim()); return; }
    onFault("");
    try { onOpened(await post("open", {set, base: field.value.trim()})); } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      onFault(error instanceof Refused ? error.message : "");
    }
  };
  /* of: {set, base} of the whole model that is open; null where an adapter is */
  function offer(of) { set = of?.set ?? null; field.value = of?.base ?? ""; base.hidden = !of; }

  async function take(files, folder = "", from = null) {
    onFault("");
    const config = files.find((f) => f.name === "adapter_config.json"), parts = files.filter((f) => PART.test(f.name)), pickles = files.filter((f) => PICKLE.test(f.name));
    const weights = parts.filter((f) => /\.(safetensors|zip)$/i.test(f.name)), sent = weights.length ? parts : [...pickles, ...files].slice(0, 1);
    if (!sent.length) return;
    let into = "";
    last = [files, folder];
    button.disabled = true;
    try {
      for (const [i, f] of sent.entries()) {
        onNote(`Reading ${f.name}${sent.length > 1 ? `, ${i + 1} of ${sent.length}` : ""}…`);
        ({set: into} = await send(f, into));
      }
      onNote("Opening…");
      const name = folder || (config && sent.length > 1 ? "the adapter" : weights[0].name);
      onOpened(await post("open", {set: into, name, base: from}));
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      onFault(error instanceof Refused ? error.message : "");
      if (error.field === "base") { offer({base: from}); field.focus(); }
    } finally { button.disabled = false; onNote(""); }
  }
  async function send(file, set) {
    const body = PICKLE.test(file.name) ? new Blob([]) : file;
    let response;
    try {
      response = await fetch(`lab/api/open-file?${new URLSearchParams({name: file.name, set})}`, {method: "POST", headers: {"Content-Type": "application/octet-stream"}, body});
    } catch { throw new Away("the server is away"); }
    const answer = await response.json();
    if (answer.error) throw new Refused(answer.error, "open");
    return answer;
  }

  /* A folder that is dropped: the files beside its adapter_config.json, else those at its top. */
  async function dropped(data) {
    const entries = [...data.items].map((i) => i.webkitGetAsEntry?.()).filter(Boolean);
    if (!entries.some((e) => e.isDirectory)) return take([...data.files]);
    const found = [];
    for (const e of entries) await walk(e, 0, found);
    const home = found.find(({file}) => file.name === "adapter_config.json")?.where ?? found.map((f) => f.where).sort((a, b) => a.split("/").length - b.split("/").length)[0];
    await take(found.filter((f) => f.where === home).map((f) => f.file), (home ?? "").split("/").at(-1));
  }
  async function walk(entry, depth, found) {
    if (found.length > 200 || depth > 3) return;
    if (entry.isFile) return void found.push({file: await new Promise((ok, no) => entry.file(ok, no)), where: entry.fullPath.split("/").slice(0, -1).join("/")});
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((ok, no) => reader.readEntries(ok, no));
      if (!some.length) return;
      for (const e of some) await walk(e, depth + 1, found);
    }
  }
  return {
    button, input, base, offer,
    bases(names) { known.replaceChildren(...names.map((value) => h("option", {value}))); },
    /* Files may be dropped anywhere on this element. */
    zone(element) {
      const has = (e) => [...e.dataTransfer?.types ?? []].includes("Files");
      element.addEventListener("dragover", (e) => { if (has(e)) { e.preventDefault(); element.classList.add("over"); } });
      element.addEventListener("dragleave", (e) => { if (!element.contains(e.relatedTarget)) element.classList.remove("over"); });
      element.addEventListener("drop", (e) => { if (has(e)) { e.preventDefault(); element.classList.remove("over"); dropped(e.dataTransfer); } });
    },
  };
}

/* What a file says of itself, as text. */
export function aboutSheet() {
  const sheet = h("dialog", {class: "ll-words sp-about", "aria-labelledby": "sp-about-h"});
  sheet.addEventListener("click", (e) => { if (e.target === sheet) sheet.close(); });
  return {
    node: sheet,
    show(name, {kind, metadata, remarks, base}) {
      const rows = Object.entries(metadata), kinds = {PEFT: "LoRA factors by PEFT's names", kohya: "LoRA factors by kohya's names", diffusers: "LoRA factors by diffusers' names", checkpoint: `a whole model; shown is its difference to ${base}`};
      sheet.replaceChildren(h("h2", {id: "sp-about-h"}, `What ${name} says of itself`), h("p", {class: "ll-note"}, `It holds ${kinds[kind]}.${base && kind !== "checkpoint" ? ` Its base model: ${base}.` : ""}`),
        remarks.length ? h("ul", {class: "dt-notes"}, remarks.map((r) => h("li", {}, r))) : "",
        h("div", {class: "ll-words-list", tabindex: 0, role: "region", "aria-label": "Metadata"}, rows.length ? h("dl", {}, rows.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])) : h("p", {}, "Nothing: it has no metadata.")),
        h("form", {method: "dialog"}, h("button", {class: "ll-button"}, "Close")));
      sheet.showModal();
    },
  };
}
