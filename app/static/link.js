/* The address restores every control: what the form has that the open run's settings (or the usual ones) have not.
 *   ?run=14&tab=adapt&s.rank=4&s.targets=q+v+o&c.steps=12&task=pirate */
import {address, copy, on, same, state} from "./core.js";

const WAIT = 250;                                                // ms after the last change
const PARTS = {spec: "s.", config: "c."};
let base = null, run = null, timer = 0, kept = false;

/* A text of one's own goes into the address up to this length; browsers and mail cut longer ones. */
const LONGEST = 2000;
export const brief = (words) => words && words.length <= LONGEST ? words : null;

const text = (value) => Array.isArray(value) ? value.join(" ") : String(value);
const plain = (value) => value === null || typeof value !== "object" || Array.isArray(value);
/* A value out of the address, in the kind of the one that it stands for; undefined when it is none. */
function value(words, like, name) {
  if (name === "layers") { const n = words.split(" ").map(Number); return words === "all" ? "all" : n.every(Number.isInteger) ? n : undefined; }
  if (Array.isArray(like)) return words.split(" ").filter(Boolean);
  if (typeof like === "boolean") return words === "true";
  if (typeof like === "number") return words.trim() !== "" && Number.isFinite(+words) ? +words : undefined;
  return words;
}

/* The form with what the address says of it. */
export function read(form) {
  const made = copy(form), query = new URLSearchParams(location.search);
  for (const [part, prefix] of Object.entries(PARTS)) {
    for (const name of Object.keys(made[part] ?? {})) {
      const words = query.get(prefix + name), found = words === null || !plain(made[part][name]) ? undefined : value(words, made[part][name], name);
      if (found !== undefined) made[part][name] = found;
    }
  }
  if (query.has("task")) made.data = {task: query.get("task")};
  if (query.has("file")) made.data = {file: query.get("file"), name: query.get("name") ?? "a file"};
  return made;
}

function write() {
  clearTimeout(timer);
  const {spec, config, data, facts} = state, change = {};
  if (!base || !spec || !facts) return;
  for (const [part, prefix] of Object.entries(PARTS)) {
    for (const [name, now] of Object.entries(state[part] ?? {})) if (plain(now)) change[prefix + name] = same(now, base[part]?.[name]) ? null : text(now);
  }
  const own = same([data.task, data.file], [base.data?.task, base.data?.file]);
  change.task = own ? null : data.task ?? null;
  change.file = own ? null : data.file ?? null;
  change.name = own || !data.file ? null : data.name;
  change.model = facts.name === base.model ? null : facts.name;
  address(change);
}
function clear() {
  const query = new URLSearchParams(location.search);
  address(Object.fromEntries([...query.keys()].filter((k) => /^[sc]\./.test(k) || ["task", "file", "name", "model"].includes(k)).map((k) => [k, null])));
}
export const sync = () => { clearTimeout(timer); timer = setTimeout(write, WAIT); };

/* form: the open run's settings, or the usual ones; state has what the address made of them. */
export function follow(form, model, of) {
  base = {...copy(form), model};
  run = of;
  on("spec config data facts", sync);
  sync();                                                        // the address names a run from now on: what it says is beside that
  /* Another run is open. Its settings come with "refill"; without that it was started from this very form. */
  on("run", (id) => {
    if (id === run) return;
    run = id;
    if (kept) return;                                            // the address was there first: it has its own form
    base = {spec: copy(state.spec), config: copy(state.config), data: copy(state.data), model: state.facts?.name};
    clear();
  });
  on("refill", ({form: filled, facts}) => {
    if (!filled) return;
    base = {...copy(filled), model: facts?.name ?? state.facts?.name};
    sync();
  });
}
/* While `act` runs, a run that is opened keeps the form that the address has. */
export function keeping(act) { kept = true; try { act(); } finally { kept = false; } }
