/* What a symbol or a setting is, what happens when it grows, and where the paper says so: one popover for all of them.
 * The words come from Python (app/pages/help.py); `mark(key)` gives the "?" that stands beside a control. */
import {h, state} from "./core.js";

const GAP = 8;
let sheet = null, opener = null;

/* A "?" for a key of the table. */
export function mark(key, name = key) {
  return h("button", {type: "button", class: "ll-q", "data-help": key, "aria-haspopup": "dialog", "aria-label": `What is ${name}?`,
    onclick: (e) => { e.preventDefault(); openHelp(key, e.currentTarget); }}, "?");
}

export function openHelp(key, anchor) {
  const found = state.boot?.help?.[key];
  if (!found) return;
  if (!sheet) {
    sheet = h("div", {class: "ll ll-help", popover: "auto", role: "dialog", "aria-labelledby": "ll-help-h", tabindex: -1});
    sheet.addEventListener("toggle", (e) => { if (e.newState === "closed") opener?.removeAttribute("aria-expanded"); });
    document.querySelector(".part-frame").append(sheet);
  }
  if (sheet.matches(":popover-open")) {
    const again = opener === anchor;
    sheet.hidePopover();
    if (again) return;
  }
  opener = anchor;
  sheet.replaceChildren(h("h2", {id: "ll-help-h"}, found.name), h("p", {}, found.what), h("p", {}, h("b", {}, "When it grows: "), found.grows),
    h("p", {class: "ll-note"}, found.paper));
  sheet.showPopover();
  anchor.setAttribute("aria-expanded", "true");
  place(anchor);
  sheet.focus({preventScroll: true});
}
/* Below its sign, or above it where there is no room; inside the window. */
function place(anchor) {
  const a = anchor.getBoundingClientRect(), {offsetWidth: w, offsetHeight: t} = sheet;
  const below = a.bottom + GAP + t <= innerHeight || a.top < t + GAP;
  sheet.style.left = `${Math.max(GAP, Math.min(innerWidth - w - GAP, a.left - 12))}px`;
  sheet.style.top = `${Math.max(GAP, below ? a.bottom + GAP : a.top - GAP - t)}px`;
}
