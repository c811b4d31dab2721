/* The page's start: asks the server for what it needs, then mounts each part into the element that Gradio made for it.
 * A part is a function (root, {props, send}) that builds its DOM and listens to the bus; some give {update(value)}. */
import {Away, asked, address, emit, get, h, on, show, state} from "./core.js";
import {frame} from "./frame.js";
import {playground} from "./playground.js";
import {adapt} from "./adapt.js";
import {train} from "./train.js";
import {compare} from "./compare.js";
import {spectra} from "./spectra.js";
import {questions} from "./questions.js";
import {follow, keeping, read, sync} from "./link.js";
import {openRun} from "./run.js";
import {prefetch} from "./plot.js";

const parts = {frame, play, adapt, train, compare, spectra, questions};
const names = Object.keys(parts), free = ["frame", "play"];       // free: drawn at once, without a word from the server
const here = () => names.includes(asked("tab")) && asked("tab") !== "frame" ? asked("tab") : "play";
state.tab = here();
const mounted = new Set();

/* What a part is built from; it waits for the server, however long that takes, and says so after a moment. */
const boot = (async () => {
  for (;;) {
    try { return await get("boot", Object.fromEntries(new URLSearchParams(location.search))); } catch (error) {
      if (!(error instanceof Away)) throw error;
      await new Promise((go) => setTimeout(go, 1500));
    }
  }
})();
function begin(b) {
  if (state.boot) return;
  state.boot = b;
  state.facts = b.facts;
  ({spec: state.spec, config: state.config, data: state.data} = read(b.form));
  state.run = b.run;
}

async function mount(name, element, {props, trigger, watch}) {
  const root = h("div", {class: `ll part-${name}`});
  if (name !== "frame") {
    Object.entries({class: `ll ll-panel part-${name}`, id: `panel-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}`, tabindex: -1})
      .forEach(([k, v]) => root.setAttribute(k, v));
    root.hidden = name !== state.tab;
    root.append(h("p", {class: "ll-wait"}, "Starting: the first time this takes some seconds."));
  }
  element.replaceChildren(root);
  if (name === "frame") document.getElementById("ll-first")?.remove();   // what stood there until now
  if (!free.includes(name)) begin(await boot);
  if (name !== "frame") root.replaceChildren();
  const part = parts[name](root, {value: JSON.parse(JSON.stringify(props.value ?? {})),
    send(value, event) { props.value = value; trigger(event); }}) || {};
  if (part.update) watch("value", () => part.update(JSON.parse(JSON.stringify(props.value))));
  if (free.includes(name)) emit("tab", state.tab);
  mounted.add(name);
  if (mounted.size === names.length) start();
}

/* Play: it knows nothing of the server; here it gets the address, and what comes after its last question. */
function play(root) {
  const part = playground(root, {query: () => new URLSearchParams(location.search), next: () => show("adapt"),
    address: (change) => { if (state.tab === "play") address({tab: "play", ...change}); }});
  on("tab", (name) => name === "play" ? part.begin() : part.pause());
}

/* All parts are there: the tab and the run that the address names. */
function start() {
  state.matrix = asked("m");
  follow(state.boot.base, state.boot.usual, state.run);
  show(state.tab, false);
  emit("start");
  dispatchEvent(new Event("lora-lab"));                             // see app/pages/shell.py
  openRun(state.run);
  if (state.boot.note) { address({run: null}); emit("lost", state.boot.note); }
  (globalThis.requestIdleCallback ?? setTimeout)(() => setTimeout(prefetch, 800));
}
addEventListener("popstate", () => {
  const run = asked("run");
  show(here(), false);
  const id = run && /^\d+$/.test(run) ? Number(run) : state.boot?.run ?? null;
  if (id !== state.run) keeping(() => openRun(came = id, {refill: run != null})); else sync();
  state.matrix = asked("m");
});
let came = null;                                                  // the run that going back or forward opened, with the form of that address
on("refill", ({form}) => {
  if (form) ({spec: state.spec, config: state.config, data: state.data} = came === state.run ? read(form) : form);
  came = null;
});

const {waiting} = globalThis.LoraLab;
globalThis.LoraLab.mount = mount;
globalThis.LoraLab.state = state;
waiting.splice(0).forEach((part) => mount(...part));
