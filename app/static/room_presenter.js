/* The presenter's page: four keys that drive everybody's page, what is asked next, the grid, the way in. */
import {Away, Refused, get, h, on} from "./core.js";
import {PRESETS} from "./playground.js";
import {act, room} from "./room.js";
import {cells} from "./room_grid.js";
import {gridForm, ownForm} from "./room_forms.js";
import {qrCode, wall} from "./room_wall.js";

const KEYS = [["predict", "Predict", "P", "Ask the next question"], ["run", "Run", "R", "Guessing ends, and everybody runs it"],
  ["reveal", "Reveal", "V", "Show what was guessed, and what is so"], ["discuss", "Discuss", "D", "All tabs are open to everybody"]];

export function presenter() {
  const buttons = Object.fromEntries(KEYS.map(([stage, name, letter, about]) => [stage, h("button", {type: "button", class: "ll-button rm-key", title: `${about} (${letter})`, "aria-keyshortcuts": letter, onclick: () => press(stage)},
    name, h("kbd", {"aria-hidden": "true"}, letter))]));
  const next = h("select", {class: "ll-field rm-next", "aria-label": "The next question", onchange: () => acts()});
  const runs = h("select", {class: "ll-field rm-acts", "aria-label": "What Run does"}, h("option", {value: "none"}, "Run: nothing"), h("option", {value: "grid"}, "Run: the grid"));
  const sheets = {own: ownForm(), grid: gridForm(), link: link()};
  const sheet = h("div", {class: "rm-sheet", hidden: true});
  const opener = (name, text) => h("button", {type: "button", class: "ll-button small", "data-sheet": name, "aria-expanded": "false", onclick: () => toggle(name)}, text);
  const openers = [opener("own", "Your own"), opener("grid", "Grid"), opener("link", "Link")];
  const look = h("button", {type: "button", class: "ll-button small", onclick: () => room.look(!room.around)});
  const strip = h("div", {class: "rm-strip rm-desk"}, h("div", {class: "rm-keys", role: "group", "aria-label": "The four keys"}, Object.values(buttons)), next, runs, h("div", {class: "rm-tools"}, openers, look, more()));
  const board = wall({}), grid = cells(), under = h("div", {class: "rm-under", hidden: true}, grid.node), body = h("div", {class: "rm-body"}, board.node, under);
  let view = null, cards = [], open = null;

  async function list() {
    try { ({cards} = await get("questions")); } catch (error) { if (!(error instanceof Away || error instanceof Refused)) throw error; return; }
    const group = (label, items) => h("optgroup", {label}, items);
    const was = next.value;
    next.replaceChildren(group("Play, on every device", PRESETS.map((p) => h("option", {value: `play:${p.id}`}, p.chip))),
      group("Questions of the paper", cards.map((c) => h("option", {value: `card:${c.name}`}, c.title))), group("Yours", [h("option", {value: "own:"}, "Your own question")]));
    if (was) next.value = was;
    acts();
  }
  function acts() { runs.hidden = next.value.startsWith("play:"); }
  function question() {
    const [kind, name] = next.value.split(":");
    if (kind === "play") { const p = PRESETS.find((x) => x.id === name); return {kind, name, text: p.q, choices: p.answers, right: p.right, act: "play"}; }
    if (kind === "own") { const own = sheets.own.read(); return own && {kind, ...own, act: runs.value}; }
    return {kind, name, act: runs.value};
  }
  async function press(stage) {
    if (buttons[stage].disabled) return;
    if (stage !== "predict") { toggle(null); await act("step", {stage}); return; }
    const asked = question();
    if (!asked) { toggle("own", true); return; }
    if (asked.act === "grid" && !view.grid) { toggle("grid", true); return; }
    if (await act("step", {stage, question: asked})) {
      toggle(null);
      if (asked.kind === "own") sheets.own.clear();
      else if (next.selectedIndex + 1 < next.options.length) { next.selectedIndex += 1; acts(); }
    }
  }
  function toggle(name, is) {
    open = name && (is || open !== name) ? name : null;
    openers.forEach((b) => b.setAttribute("aria-expanded", String(b.dataset.sheet === open)));
    sheet.hidden = !open;
    sheet.replaceChildren(...(open ? [sheets[open].node] : []));
    if (open) { sheets[open].update(view); sheet.querySelector("input, textarea, button")?.focus({preventScroll: true}); if (open === "own") next.value = "own:"; acts(); }
  }
  addEventListener("keydown", (e) => {
    if (e.key === "Escape" && open) { const name = open; toggle(null); openers.find((b) => b.dataset.sheet === name).focus(); return; }
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest?.("input, textarea, select, [contenteditable], dialog[open]")) return;
    const key = KEYS.find(([, , letter]) => letter === e.key.toUpperCase());
    if (key && view) { e.preventDefault(); press(key[0]); }
  });

  function link() {
    const node = h("div", {class: "rm-invite"});
    let shown = null;
    return {node, update(v) {
      if (!v?.link || shown === v.link) return;
      shown = v.link;
      const copied = h("span", {class: "ll-note", role: "status"});
      node.replaceChildren(v.qr ? qrCode(v.qr, "The participants' link as a QR code") : "", h("div", {}, h("h3", {class: "rm-h"}, "Participants come in by"), h("p", {class: "rm-link"}, v.link),
        h("button", {type: "button", class: "ll-button small", onclick: async () => { try { await navigator.clipboard.writeText(v.link); copied.textContent = "copied"; } catch { copied.textContent = "select it and copy"; } }}, "Copy the link"), " ", copied,
        h("p", {class: "ll-note"}, "The wall on a second screen: ", h("a", {href: "?wall", target: "_blank", rel: "noopener"}, "open the wall"), ". It needs no keys.")));
    }};
  }
  function more() {
    const anew = h("button", {type: "button", class: "ll-button small", onclick: () => { if (confirm("Begin anew? People, questions and guesses go; runs stay.")) act("step", {stage: "lobby"}); }}, "Begin anew");
    return h("details", {class: "ll-export rm-more"}, h("summary", {"aria-label": "Take the wall along, or begin anew", title: "Take the wall along, or begin anew"}, "⋯"), h("div", {class: "ll-export-items"},
      h("a", {class: "ll-button small", href: "lab/api/room.csv", download: "room.csv"}, "CSV"), h("a", {class: "ll-button small", href: "lab/api/room.ipynb", download: "room.ipynb"}, "Notebook"), anew));
  }
  function update(now) {
    view = now;
    const {stage, question: q} = view;
    for (const [name, b] of Object.entries(buttons)) b.setAttribute("aria-current", String(name === stage));
    buttons.run.disabled = stage !== "predict";
    buttons.reveal.disabled = !["predict", "run", "discuss"].includes(stage);
    buttons.discuss.disabled = stage === "lobby" || stage === "discuss";
    look.textContent = room.around ? "Room" : "Page";
    look.title = room.around ? "Back to the room" : "The page behind the room";
    sheets.grid.update(view);
    sheets.link.update(view);
    board.update(view);
    under.hidden = q?.act !== "grid" || stage !== "run";
    if (!under.hidden) grid.update(view);
    room.mode(true);
  }
  on("start", list);
  list();
  return {nodes: [strip, sheet, body], update};
}
