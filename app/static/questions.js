/* Questions: each is asked first; what was found comes after the guess is locked, and can be measured again here.
 * A guess stays in this browser, and what was found is not asked of the server before there is one. */
import {Away, Refused, address, asked, get, h, on, post, state} from "./core.js";
import {draw, drawn, exports} from "./plot.js";
import {restacked} from "./restack.js";

const SIGNS = {"holds": "✓", "holds partly": "◐", "does not hold here": "✗", "undecided": "?"};
const memory = {};
function guessOf(name, value) {                                   // a browser may refuse to remember: then the page does
  if (value !== undefined) memory[name] = value;
  try {
    if (value !== undefined) localStorage.setItem(`ll-guess-${name}`, value);
    return localStorage.getItem(`ll-guess-${name}`) ?? memory[name] ?? null;
  } catch { return memory[name] ?? null; }
}

export function questions(root) {
  const fault = h("p", {class: "ll-fault", role: "alert"}), list = h("nav", {class: "qs-list", "aria-label": "The paper's questions"});
  const main = h("div", {class: "qs-main"});
  root.append(fault, h("div", {class: "qs"}, list, main));
  let cards = [], states = {}, open = null, found = null, timer = 0, opening = 0;

  async function calm(work) {                                     // what is refused is said; away is the frame's to say
    try { fault.textContent = ""; return await work(); } catch (error) {
      if (error instanceof Refused) fault.textContent = error.message;
      else if (!(error instanceof Away)) throw error;
    }
  }
  let loading = false;
  async function load() {
    if (loading) return;
    loading = true;
    try { await begin(); } finally { loading = false; }
  }
  const begin = () => calm(async () => {
    ({cards, states} = await get("questions"));
    list.replaceChildren(...cards.map((c) => h("button", {type: "button", class: "qs-item", "data-name": c.name, title: c.question, onclick: () => choose(c.name)},
      h("span", {class: "qs-dot", "aria-hidden": "true"}), h("span", {class: "qs-name"}, c.title), h("span", {class: "qs-sec"}, c.section), h("span", {class: "ll-hidden qs-state"}))));
    await choose(cards.some((c) => c.name === asked("q")) ? asked("q") : open ?? cards[0].name, false);
    poll();
  });
  function marks() {
    list.querySelectorAll(".qs-item").forEach((b) => {
      const name = b.dataset.name, how = states[name]?.live ? "is being run" : guessOf(name) != null ? "answered" : "not answered yet";
      name === open ? b.setAttribute("aria-current", "true") : b.removeAttribute("aria-current");
      b.dataset.how = how;
      b.querySelector(".qs-state").textContent = `, ${how}`;
    });
  }
  async function choose(name, told = true) {
    open = name;
    found = null;
    marks();
    if (told) address({q: name});
    const item = list.querySelector("[aria-current]");
    if (item && list.scrollWidth > list.clientWidth) list.scrollLeft = item.offsetLeft - 20;
    guessOf(name) == null ? ask(card()) : await reveal(told);
  }
  const card = () => cards.find((c) => c.name === open);
  const heading = (c) => h("div", {class: "qs-head"}, h("h2", {class: "qs-q", id: "qs-q", tabindex: -1}, c.question),
    h("span", {class: "ll-note"}, `section ${c.section}`));

  /* ---- before: three answers, and nothing else */
  function ask(c) {
    const lock = h("button", {class: "ll-button go", disabled: true}, "Lock my guess");
    const form = h("form", {class: "ll-card qs-ask", onsubmit: (e) => { e.preventDefault(); const i = new FormData(form).get("guess"); if (i != null) settle(i); },
      onchange: () => { lock.disabled = false; }}, heading(c),
      h("fieldset", {class: "qs-choices"}, h("legend", {class: "ll-hidden"}, "What do you expect?"), c.choices.map((text, i) =>
        h("label", {class: "qs-choice"}, h("input", {type: "radio", name: "guess", value: i}), h("span", {}, text)))),
      h("div", {class: "qs-act"}, lock, h("button", {type: "button", class: "ll-link", title: "Escape", onclick: () => settle("skip")}, "skip the guess"),
        h("span", {class: "ll-note"}, "What the paper says and what was measured come after it.")));
    form.addEventListener("keydown", (e) => { if (e.key === "Escape") settle("skip"); });
    main.replaceChildren(form);
  }
  function settle(guess) {
    guessOf(open, guess);
    marks();
    reveal(true);
  }

  /* ---- after: the guess that was made, the paper's claim, what was found */
  const runBar = h("div", {class: "qs-run"}), paperBox = h("section", {class: "ll-card qs-paper"}), results = h("div", {class: "qs-results"});
  async function reveal(focus) {
    const mine = ++opening, c = card(), a = await calm(() => get("question", {name: c.name}));
    if (!a || mine !== opening || c.name !== open) return;
    found = a;
    const guess = guessOf(c.name), next = cards[cards.indexOf(c) + 1];
    const choices = h("ul", {class: "qs-choices", "aria-label": "The three answers"}, c.choices.map((text, i) => h("li", {class: `qs-choice${i === a.answer ? " right" : ""}${String(i) === guess ? " guess" : ""}`},
      h("span", {}, text), String(i) === guess && h("b", {class: "qs-tag"}, "your guess"), i === a.answer && h("b", {class: "qs-tag paper"}, "the claim"))));
    const verdict = a.results[0];
    main.replaceChildren(h("section", {class: "ll-card qs-ask"}, heading(c), choices,
      h("div", {class: "qs-act"}, runBar, h("span", {class: "qs-gap"}), h("button", {type: "button", class: "ll-link", onclick: () => { forget(c.name); }}, "ask me again"),
        next && h("button", {type: "button", class: "ll-button small", onclick: () => choose(next.name)}, `Next: ${next.title}`))),
      h("div", {class: `qs-found${a.results.length > 1 ? " many" : ""}`}, a.results.length > 1 ? [paperBox, results] : [results, paperBox]));
    paperSays(a);
    results.replaceChildren(...(verdict ? a.results.map((r) => result(c, r)) : [h("section", {class: "ll-card"}, h("p", {class: "ll-say"}, "No result is stored yet. Run it here: the quick version answers in about two minutes."))]));
    bar();
    if (focus) (results.querySelector(".qs-verdict") ?? main.querySelector("#qs-q")).focus({preventScroll: true});
  }
  function forget(name) {
    delete memory[name];
    try { localStorage.removeItem(`ll-guess-${name}`); } catch { /* nothing was kept */ }
    marks();
    ask(card());
    main.querySelector("input").focus();
  }
  function paperSays(a) {
    paperBox.replaceChildren(h("div", {}, h("h3", {class: "ll-h"}, "The paper says"), h("p", {class: "qs-claim"}, a.claim)),
      h("div", {}, a.paper.table.length ? table(a.paper.table, "The paper's numbers") : "",
        h("dl", {class: "qs-lines"}, a.paper.lines.map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, v))))));
  }
  function result(c, r) {
    const plot = h("div", {class: "qs-plot", role: "img", "aria-label": `${r.title}. ${r.say} ${r.sentence}`});
    const name = `${c.name}-${r.where === "recorded" ? "recorded" : "here"}${r.quick ? "-quick" : ""}`;
    let wide = null;
    new ResizeObserver(() => {
      if (!plot.clientWidth) return;
      const {figure, height, columns} = restacked(r.figure, plot.clientWidth);
      if (columns !== wide) { wide = columns; plot.style.height = `${height}px`; draw(plot, figure); }
    }).observe(plot);
    return h("section", {class: "qs-result", "data-where": r.where, "aria-label": `${r.where}${r.quick ? ", quick" : ""}`}, h("div", {class: "ll-card qs-words"},
      h("p", {class: "qs-verdict", tabindex: -1, "data-verdict": r.verdict}, h("b", {}, h("span", {"aria-hidden": "true"}, `${SIGNS[r.verdict]} `), r.verdict),
        h("span", {class: `ll-badge${r.where === "recorded" ? "" : " live"}`}, r.where), r.quick && h("span", {class: "ll-badge"}, "quick version")),
      h("p", {class: "qs-sentence"}, r.sentence), h("p", {class: "ll-note qs-facts"}, r.facts.map(([k, v]) => h("span", {}, `${k} `, h("b", {}, v)))), h("code", {class: "qs-command"}, r.command)),
      h("div", {class: "ll-card qs-picture"}, h("div", {class: "ll-head"}, h("h3", {class: "ll-h"}, r.title), exports("the figure", {name: () => name, figure: () => drawn(plot), rows: () => r.table})),
      plot, h("p", {class: "tr-say"}, r.say), h("p", {class: "ll-note ll-fineprint"}, "Small dots: each seed or part of the rows. Bars: 95 % interval."),
      r.table.length > 1 && h("details", {class: "qs-more"}, h("summary", {}, "the numbers"), table(r.table, r.title))));
  }
  const table = ([head, ...rows], label) => h("div", {class: "qs-table", tabindex: 0, role: "region", "aria-label": label}, h("table", {},
    h("thead", {}, h("tr", {}, head.map((t) => h("th", {scope: "col"}, t)))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map((t) => h("td", {}, t)))))));

  /* ---- running it here */
  function bar() {
    if (!found) return;
    const s = states[found.name], other = Object.values(states).find((x) => x.live && x.name !== found.name);
    const kind = s?.live ? "live" : "idle", key = `${kind}|${found.name}|${other?.name}|${s?.status}`;
    if (kind === "live") {
      if (runBar.dataset.key !== key) {
        runBar.replaceChildren(h("progress", {max: 1, "aria-label": "How far it is"}), h("span", {class: "qs-says", role: "status"}),
          h("button", {type: "button", class: "ll-button small", id: "qs-stop", onclick: stop, disabled: s.status === "stopping"}, "Stop, keep what is done"));
      }
      runBar.firstChild.value = s.done;
      runBar.querySelector(".qs-says").textContent = s.says;
    } else if (runBar.dataset.key !== key || !runBar.firstChild) {
      const begin = (quick, words) => h("button", {type: "button", class: "ll-button small", id: quick ? "qs-quick" : "qs-full", disabled: Boolean(other), onclick: () => start(quick)}, words);
      const goesOn = (quick) => s && s.quick === quick && ["stopped", "interrupted"].includes(s.status);
      runBar.replaceChildren(begin(true, goesOn(true) ? "Go on with the quick version" : `Run it here, quick (${found.takes.quick})`),
        begin(false, goesOn(false) ? "Go on with the full version" : `full (${found.takes.full})`),
        h("span", {class: `qs-says${s?.status === "failed" ? " ll-fault" : ""}`}, other ? `${titleOf(other.name)} is being run; one at a time.` : s && s.status !== "done" ? s.says : ""));
    }
    runBar.dataset.key = key;
  }
  const titleOf = (name) => cards.find((c) => c.name === name)?.title ?? name;
  const start = (quick) => calm(async () => { ({states} = await post("experiment", {name: found.name, quick})); after(); });
  const stop = () => calm(async () => { ({states} = await post("experiment-stop", {name: found.name})); after(); });
  function after() {
    const had = runBar.contains(document.activeElement);
    bar();
    marks();
    if (had && !runBar.contains(document.activeElement)) runBar.querySelector("button:not(:disabled)")?.focus();
    poll();
  }
  /* Once a second while something is going on and somebody looks. */
  function poll() {
    clearTimeout(timer);
    if (state.tab !== "questions" || !Object.values(states).some((s) => s.live)) return;
    timer = setTimeout(async () => {
      const before = states;
      try { ({states} = await get("experiments")); } catch (error) { if (!(error instanceof Away || error instanceof Refused)) throw error; return poll(); }
      const over = Object.keys(states).filter((n) => before[n]?.live && !states[n].live);
      marks();
      bar();
      if (over.includes(open) && found && states[open].status === "done") {
        const had = document.activeElement === document.body || runBar.contains(document.activeElement);
        await reveal(had);
      }
      poll();
    }, 1000);
  }
  on("start back", load);
  on("tab", (name) => { if (name === "questions" && !cards.length) load(); else if (name === "questions") { if (open) address({q: open}); calm(async () => { ({states} = await get("experiments")); marks(); bar(); poll(); }); } else if (name !== "questions") address({q: null}); });
  addEventListener("popstate", () => { if (state.tab === "questions" && asked("q") && asked("q") !== open && cards.some((c) => c.name === asked("q"))) choose(asked("q"), false); });
}
