/* A result that belongs to other settings than those on the dials is marked "from r = 8", never wiped. */
import {asked, h, layersOf, on, same, state} from "./core.js";

const MOST = 2;                                                  // differences that are named; the others are in the title
const SPEC = {rank: "r", alpha: "α", targets: "", layers: "layers", scaling: "", init: "start", train_A: "A trained", dropout: "dropout"};
const CONFIG = {steps: "steps", lr: "rate", batch_size: "batch", seed: "seed", schedule: "schedule", warmup: "warm-up", weight_decay: "weight decay", clip: "clipping",
  accumulate: "accumulation", max_tokens: "longest row", lr_ratio: "B's rate over A's", dtype: "numbers"};
/* Where the first card of results has its title, in the tabs that show the open run. */
const PLACES = ["#panel-train .tr-main .ll-head", "#panel-compare .cp-panes .ll-head", "#panel-spectra .ll-head"];

const say = (name, value) => name === "targets" ? value.join(" ") : name === "scaling" ? ({"alpha/r": "α/r", "alpha/sqrt(r)": "α/√r"})[value] : typeof value === "boolean" ? (value ? "yes" : "no") : value;
function layers(list) {
  if (list === "all") return "all";
  const whole = list.length > 2 && list.at(-1) - list[0] + 1 === list.length;
  return whole ? `${list[0]} to ${list.at(-1)}` : list.length > 4 ? `${list.length} layers` : list.join(" ");
}

/* ["r = 8", "α = 16"]: what the open run has that the dials have not. The recorded run is there unasked on a first visit:
 * then a setting that still is the usual one was not turned by anybody, and is not held against it. */
export function other({view, facts, spec, config, data} = state) {
  if (!view || !facts || !spec?.targets) return [];
  const found = [];
  if (view.model !== facts.name) found.push(view.model.split("/").at(-1));
  if (view.data && view.data !== (data.name ?? data.task)) found.push(view.data);
  for (const [name, text] of Object.entries(SPEC)) {
    const mine = spec[name], theirs = view.spec[name];
    if (theirs === undefined || same(mine, theirs) || name === "layers" && view.model === facts.name && same(layersOf(spec), layersOf(view.spec))) continue;
    const value = name === "layers" ? layers(theirs) : say(name, theirs);
    found.push(text ? `${text} = ${value}`.replace("layers = ", "layers ") : value);
  }
  const unasked = view.recorded && asked("run") == null;
  for (const [name, text] of Object.entries(CONFIG)) {
    if (view.config?.[name] !== undefined && view.config[name] !== config[name] && !(unasked && config[name] === facts.config[name])) found.push(`${text} = ${say(name, view.config[name])}`);
  }
  return found;
}

export function belongs() {
  const marks = PLACES.map((where) => [where, h("span", {class: "ll-badge ll-from", hidden: true})]);
  function paint() {
    const found = other(), text = found.length ? `from ${found.slice(0, MOST).join(", ")}${found.length > MOST ? ", …" : ""}` : "";
    for (const [where, mark] of marks) {
      const file = where.startsWith("#panel-spectra") && asked("open");    // a file has no settings of ours
      if (!mark.isConnected) document.querySelector(`${where} .ll-h, ${where} h2`)?.after(mark);
      mark.hidden = !text || Boolean(file);
      mark.textContent = text;
      mark.title = found.length ? `This result is from other settings than those on the dials: ${found.join(", ")}` : "";
    }
  }
  on("view spec config data facts refill tab opened", paint);
}
