/* The run that is open: asked for once a second while it lives; whoever shows it listens to "view". */
import {Away, Refused, address, asked, emit, get, on, state} from "./core.js";

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
    const sameOver = state.view?.asked === over;
    const v = await get("run", {run: id, seen: sameOver ? state.view?.version : null, over});
    if (id !== state.run || mine !== asking) return;
    const was = state.view;
    state.view = {...was, ...v, asked: over};
    emit("view", state.view);
    if (was && was.run === id && was.live && !v.live) emit("ended", state.view);
    wait = v.live ? (document.hidden ? 4000 : 1000) : 0;
  } catch (error) {
    if (error instanceof Refused) { state.run = null; state.view = null; address({run: null}); emit("lost", error.message); emit("view", null); return; }
    if (!(error instanceof Away)) throw error;
    return;                                                     // "back" asks again
  }
  if (wait && mine === asking) timer = setTimeout(poll, wait);
}
on("back", poll);
document.addEventListener("visibilitychange", () => { if (!document.hidden && state.view?.live) poll(); });
