/* A room: asks once in a while where it stands, and shows that above the page, or in place of it.
 * body[data-room]: "full" hides the page, "strip" leaves one line above it. Loaded where there is a room, nowhere else. */
import {Away, Refused, asked, get, h, on, post} from "./core.js";
import {participant} from "./room_people.js";
import {presenter} from "./room_presenter.js";
import {wall} from "./room_wall.js";

const PRESENTER = 900, PARTICIPANT = 1400, HIDDEN = 5000;          // ms between two questions
const root = h("section", {class: "ll rm", "aria-label": "The room"});
const fault = h("p", {class: "ll-fault rm-fault", role: "alert"});
const onlyWall = asked("wall") != null;
let view = null, part = null, timer = 0, around = false, key = "";

/* Something that somebody does: what is refused is said, and the room is asked again at once. */
export async function act(name, body) {
  try {
    fault.textContent = "";
    const answer = await post(`room-${name}`, body);
    await poll();
    return answer;
  } catch (error) {
    if (error instanceof Refused) fault.textContent = error.message;
    else if (!(error instanceof Away)) throw error;
    return null;
  }
}
/* Whether the page is seen below one line, which the person may turn on and off; a new stage turns it off. */
export const room = {
  get around() { return around; },
  look(is) { around = is; draw(); },
  mode(full) { document.body.dataset.room = onlyWall || full && !around ? "full" : "strip"; },
};

function draw() {
  if (!view) return;
  const now = `${view.role}|${view.stage}|${view.round}`;
  if (now !== key) { fault.textContent = ""; if (view.stage !== "discuss") around = false; }   // Discuss calls nobody back
  const fresh = now !== key;
  key = now;
  if (!part) {
    part = onlyWall ? wall({alone: true}) : view.role === "presenter" ? presenter() : participant();
    root.append(...[].concat(part.nodes ?? part.node), fault);
    document.body.prepend(root);
    if (onlyWall) document.body.classList.add("rm-alone");
  }
  part.update(view, fresh);
  if (onlyWall) room.mode(true);
}
async function poll() {
  clearTimeout(timer);
  try {
    const {room: now} = await get("room", {seen: view?.version});
    if (now) { view = {...view, ...now, fresh: "stage" in now}; draw(); }
  } catch (error) {
    if (error instanceof Refused) { fault.textContent = error.message; document.body.prepend(root); root.append(fault); }
    else if (!(error instanceof Away)) throw error;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, document.hidden ? HIDDEN : view?.role === "presenter" || onlyWall ? PRESENTER : PARTICIPANT);
}
on("back", poll);
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
poll();
