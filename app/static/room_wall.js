/* The wall: what was guessed beside what is so, to be read from the back row. Everybody's after Reveal. */
import {Away, Refused, fmt, get, h, show} from "./core.js";
import {open} from "./room_grid.js";
import {room} from "./room.js";
import {draw, drawn, exports} from "./plot.js";

const TURN = 15000;                                                 // ms after which a wall that nobody touches shows its other page
export const qrCode = (qr, label) => h("svg", {viewBox: `0 0 ${qr.size} ${qr.size}`, class: "rm-qr", role: "img", "aria-label": label, "shape-rendering": "crispEdges"},
  h("rect", {width: qr.size, height: qr.size, fill: "#ffffff"}), h("path", {d: qr.path, fill: "#000000"}));

/* alone: the address /?wall, on a screen of its own: it also shows what comes before Reveal. */
export function wall({alone = false}) {
  const node = h("div", {class: `rm-wall${alone ? " alone" : ""}`});
  const title = h("h2", {class: "rm-title", tabindex: -1}), count = h("p", {class: "rm-count", role: "status"}), pages = h("div", {class: "ll-tabs rm-pages", role: "group", "aria-label": "What the wall shows"});
  const top = h("div", {class: "rm-top"}, title, count, pages), main = h("div", {class: "rm-main"});
  node.append(top, main);
  let seen = "", found = null, asking = 0, page = 0, plots = [], shape = "", turning = 0;

  const figure = (key, name, say, label) => {
    const plot = h("div", {class: "rm-plot", role: "img", id: `rm-${key}${alone ? "-alone" : ""}`});
    const line = h("p", {class: "rm-say"});
    plots.push({plot, get: () => say().figure, say: () => say().text, line, label});
    return h("section", {class: "ll-card rm-card"}, h("div", {class: "ll-head"}, h("h3", {class: "rm-h"}, name), exports(name, {name: () => `room-${key}`, figure: () => drawn(plot), rows: () => rowsOf(drawn(plot))})), plot, line);
  };
  function bars(g) {
    const most = Math.max(1, ...g.counts);
    return h("section", {class: "ll-card rm-card rm-guesses"}, h("h3", {class: "rm-h"}, "Guesses (people)"), h("ul", {class: "rm-bars"}, g.choices.map((text, i) =>
      h("li", {class: i === g.right ? "right" : null}, h("span", {class: "rm-bar-text"}, h("b", {"aria-hidden": "true"}, `${"ABCDE"[i]} `), text, i === g.right && h("i", {}, g.card ? " ❝ the claim" : " ✓")),
        h("span", {class: "rm-track"}, h("span", {style: {width: `${100 * g.counts[i] / most}%`}})), h("b", {class: "rm-n"}, String(g.counts[i]))))), h("p", {class: "rm-say"}, g.say));
  }
  const card = (a) => h("section", {class: "ll-card rm-card"}, h("h3", {class: "rm-h"}, "What was measured"), h("p", {class: "rm-verdict"}, h("b", {}, a.verdict ?? "Nothing is stored yet")),
    h("p", {class: "rm-say"}, a.sentence ?? ""), h("p", {class: "ll-note rm-claim"}, `The paper: ${a.claim}`),
    h("button", {type: "button", class: "ll-button rm-open", onclick: () => { room.look(true); history.pushState(null, "", `?tab=questions&q=${a.name}`); show("questions"); dispatchEvent(new PopStateEvent("popstate")); }}, "Open its card"));
  function table(r) {
    const rank = (x) => x.loss ?? 1e9;
    return h("div", {class: "rm-table", tabindex: 0, role: "region", "aria-label": "Who ran what"}, h("table", {},
      h("thead", {}, h("tr", {}, ["cell", "who", "loss", "time"].map((t) => h("th", {scope: "col"}, t)))),
      h("tbody", {}, [...r.rows].sort((a, b) => rank(a) - rank(b)).map((x) => h("tr", {class: r.front?.includes(x.run) ? "front" : null},
        h("td", {}, x.run != null && x.status === "done" ? h("button", {type: "button", class: "ll-link", title: "Open this run", onclick: () => open(x.run)}, x.says) : x.says), h("td", {}, x.who, x.guess && h("span", {class: "ll-muted"}, ` guessed ${x.guess}`)),
        h("td", {}, x.loss?.toFixed(2) ?? (x.status === "started" ? `${x.step}/${x.steps}` : x.status)), h("td", {}, x.train_s ? fmt.time(x.train_s) : "–"))))));
  }
  const curves = () => figure("curves", `Everybody's Play: ${found.play.count} device${found.play.count === 1 ? "" : "s"}`, () => ({figure: found.play.figure, text: found.play.say}), "Loss by step on every device");
  const losses = () => figure("losses", "Losses", () => ({figure: found.runs.losses, text: found.runs.say_losses}), "Training loss by step");
  const spectra = () => figure("spectra", "Spectra of the largest ΔW", () => ({figure: found.runs.spectra, text: found.runs.say_spectra}), "Singular values by direction");
  const pareto = () => found.runs.pareto ? figure("pareto", "Held-out loss against size", () => ({figure: found.runs.pareto, text: found.runs.say}), "Held-out loss by trainable parameters")
    : h("section", {class: "ll-card rm-card"}, h("h3", {class: "rm-h"}, "Held-out loss against size"), h("p", {class: "rm-say"}, found.runs.say));
  const ran = () => h("section", {class: "ll-card rm-card rm-who-ran"}, h("h3", {class: "rm-h"}, "Who ran what"), table(found.runs));
  const guessed = () => bars(found.guesses), answered = () => card(found.answer);
  /* [name, how it is laid out, its parts] of every page that the wall has now. */
  function sheets(w) {
    const first = w.guesses ? [guessed] : [];
    if (!w.runs) { const parts = [...first, ...(w.answer ? [answered] : []), ...(w.play ? [curves] : [])]; return [["", parts.length > 1 ? "two" : "one", parts]]; }
    return [["Results", w.guesses ? "runs" : "two", [...first, pareto, ran]], ...(w.runs.losses ? [["Curves", "two", [losses, ...(w.runs.spectra ? [spectra] : [])]]] : []),
      ...(w.answer ? [["Recorded", "two", [...first, answered]]] : [])];
  }
  function build() {
    plots = [];
    const [, kind, parts] = sheets(found)[page];
    main.dataset.kind = kind;
    main.replaceChildren(...parts.map((f) => f()));
  }
  function paint() {
    for (const p of plots) {
      const f = p.get();
      if (f) draw(p.plot, f).then(() => { p.plot.removeAllListeners?.("plotly_click"); p.plot.on?.("plotly_click", (e) => { const run = e.points[0]?.customdata; if (run != null) open(run); }); });
      p.line.textContent = p.say() ?? "";
      p.plot.setAttribute("aria-label", `${p.label}. ${p.line.textContent}`);
    }
  }
  function turn(to) { page = to; shape = ""; redraw(); }
  function redraw() {
    const all = found ? sheets(found).map(([n]) => n) : [], names = all.length > 1 ? all : [];
    page = Math.min(page, Math.max(0, names.length - 1));
    pages.replaceChildren(...names.map((n, i) => h("button", {type: "button", "aria-pressed": String(i === page), onclick: () => { turn(i); clearInterval(turning); }}, n)));
    if (alone && names.length && !turning && !matchMedia("(prefers-reduced-motion: reduce)").matches) turning = setInterval(() => turn((page + 1) % names.length), TURN);
    pages.hidden = !names.length;
    if (!found) return;
    const now = JSON.stringify([page, found.guesses, found.answer, Boolean(found.play), found.play?.count, found.runs?.rows, Boolean(found.runs?.pareto), Boolean(found.runs?.losses)]);
    if (now !== shape) { shape = now; build(); }
    paint();
  }
  /* Before Reveal, on a wall of its own: the way in, the question, how many have guessed. */
  function before(view) {
    const q = view.question;
    main.dataset.kind = "one";
    if (!q) {
      main.replaceChildren(h("div", {class: "rm-door"}, view.qr ? qrCode(view.qr, "The participants' link as a QR code") : "", h("p", {class: "rm-link"}, view.link ?? "The presenter begins soon.")));
      return;
    }
    main.replaceChildren(h("ul", {class: "rm-asked"}, q.choices.map((text, i) => h("li", {}, h("b", {class: "rm-letter"}, "ABCDE"[i]), text))));
  }
  async function update(view) {
    const q = view.question;
    title.textContent = q?.text ?? "Come in";
    count.textContent = counted(view);
    const live = ["reveal", "discuss"].includes(view.stage) || view.stage === "run" && view.role === "presenter" && q.act !== "none";
    if (!live) { found = null; shape = ""; seen = ""; pages.hidden = true; const key = `before|${view.stage}|${view.round}`; if (main.dataset.key !== key) { main.dataset.key = key; before(view); } return; }
    main.dataset.key = "";
    if (seen === view.version) return;
    const mine = ++asking, version = view.version;
    let answer;
    try { answer = await get("room-wall"); } catch (error) { if (error instanceof Away || error instanceof Refused) return; throw error; }
    if (mine !== asking) return;
    seen = version;
    found = answer.wall;
    redraw();
  }
  return {node, update};
}
/* What moves while one waits, in a few words. */
function counted({stage, here, guessed, curves, question: q, grid: g}) {
  if (stage === "predict") return `${guessed} of ${here} have guessed`;
  if (stage === "run" && q.act === "play") return `${curves} of ${here} curves are here`;
  if (g && q?.act === "grid") return `${g.cells.filter((c) => c.status === "done").length} of ${g.cells.length} runs are done`;
  return `${here} here`;
}
const rowsOf = (figure) => figure && [["line", "x", "y"], ...figure.data.flatMap((d) => (d.x ?? []).map((x, i) => [d.name, x, d.y[i]]))];
