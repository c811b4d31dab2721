/* The run that is open: asked for once a second while it lives; whoever shows it listens to "view". Its pictures come less
 * often where drawing takes long: the training has the same processors. */
import {Away, Refused, address, asked, emit, get, on, state} from "./core.js";
import {spent} from "./plot.js";

const SHARE = 1 / 60, SOONEST = 1000, LATEST = 6000;             // of the time that drawing may take; ms between two pictures
let pictured = -Infinity, before = 0;                            // when the last pictures came, and what had been drawn until then
const pace = () => Math.min(LATEST, Math.max(SOONEST, (spent.ms - before) / SHARE));
let timer = 0, over = asked("over") ?? "auto", asking = 0, first = true;

/* Open a run: the address carries it, and (unless it is only looked at) the dials take its settings. */
export async function openRun(id, {refill = false, push = false} = {}) {
  const changed = id !== state.run;
  state.run = id;
  if (changed) { state.view = null; over = "auto"; }
  // a first visit shows the recorded run under a plain address; once it was chosen, its number is there
  address({run: id === 0 && first && asked("run") == null ? null : id, over: over === "auto" ? null : over}, push);
  first = false;
  emit("run", id);
  poll();
  if (refill && id != null) {
    try {
      const {facts, fault, form} = await get("form", {run: id});
      emit("refill", {facts, fault, form});
    } catch (error) { if (!(error instanceof Refused || error instanceof Away)) throw error; }
  }
}
export function overlay(ids) { over = ids.length ? ids.join(",") : "none"; address({over}); poll(); }
export const behind = () => over === "auto" ? state.view?.behind ?? [] : over.split(",").filter((n) => /^\d+$/.test(n)).map(Number);

export async function poll() {
  clearTimeout(timer);
  const id = state.run, mine = ++asking;
  if (id == null) { emit("view", null); return; }
  let wait = 0;
  try {
    const sameOver = state.view?.asked === over, seen = sameOver ? state.view?.version : null;
    const late = performance.now() - pictured >= (state.tab === "train" ? pace() - 50 : LATEST);
    const v = await get("run", {run: id, seen, over, light: seen && !late ? 1 : null});
    if (id !== state.run || mine !== asking) return;
    if (v.figure) [pictured, before] = [performance.now(), spent.ms];
    const was = state.view;
    state.view = {...was, ...v, asked: over};
    emit("view", state.view);
    if (was && was.run === id && was.live && !v.live) emit("ended", state.view);
    wait = v.live ? (document.hidden ? 4000 : state.tab === "train" ? 1000 : 2000) : 0;
  } catch (error) {
    if (error instanceof Refused) { state.run = null; state.view = null; address({run: null}); emit("lost", error.message); emit("view", null); return; }
    if (!(error instanceof Away)) throw error;
    return;                                                     // "back" asks again
  }
  if (wait && mine === asking) timer = setTimeout(poll, wait);
}
on("back", poll);
on("tab", (name) => { if (name === "train" && state.view?.live && performance.now() - pictured > SOONEST) { pictured = -Infinity; poll(); } });
document.addEventListener("visibilitychange", () => { if (!document.hidden && state.view?.live) poll(); });
