/* The spectrum of the chosen ΔW while it grows: its singular values over the steps, and a slider to see it again. */
import {Away, Refused, address, asked, emit, get, h, on, state} from "./core.js";
import {absent} from "./formula.js";
import {draw, exports} from "./plot.js";

const FRAME = 110;                                                 // ms between two pictures when it plays
const SUB = "₀₁₂₃₄₅₆₇₈₉", sub = (n) => String(n).replace(/\d/g, (d) => SUB[d]);
const short = (x) => x === 0 ? "0" : x >= 100 ? String(Math.round(x)) : String(+x.toPrecision(2));
const still = matchMedia("(prefers-reduced-motion: reduce)");

/* How many of the directions hold so much of Σσ². */
export function holding(sigma, share = 0.9) {
  const total = sigma.reduce((a, s) => a + s * s, 0);
  let sum = 0;
  for (let i = 0; i < sigma.length; i++) { sum += sigma[i] ** 2; if (sum >= share * total * (1 - 1e-9)) return i + 1; }
  return sigma.length;
}
/* The sentence of one picture, from its numbers and those of the last. */
export function sayFilm({steps, sigma}, at) {
  const now = sigma[at], end = sigma.at(-1), step = steps[at];
  if (!now.length || now[0] === 0) return `Step ${step}: B = 0, so every σ is 0 and the model is still the base model.`;
  const n = holding(now), text = `Step ${step}: σ₁ = ${short(now[0])}; ${n} of ${now.length} direction${now.length === 1 ? "" : "s"} hold${n === 1 ? "s" : ""} 90 % of ΔW`;
  if (at < sigma.length - 1) return `${text}, ${holding(end)} at the end.`;
  const half = (i) => steps[sigma.findIndex((s) => s[i] >= end[i] / 2)], last = end.length - 1;
  return last > 0 && half(0) !== half(last) ? `${text}. σ₁ was half grown at step ${half(0)}, σ${sub(last + 1)} at step ${half(last)}.` : `${text}.`;
}

export function live() {
  const title = h("h2", {class: "ll-h"}, "ΔW while it grows"), plot = h("div", {class: "tr-film", id: "film-plot"});
  const say = h("p", {class: "ll-note tr-film-say", role: "status"}), at = h("span", {class: "tr-film-at"});
  const slide = h("input", {type: "range", min: 0, value: 0, step: 1, id: "film", "aria-label": "The step whose spectrum is shown", disabled: true});
  const play = h("button", {type: "button", class: "ll-button small", onclick: toggle}, "Play");
  const bar = h("div", {class: "tr-film-bar"}, play, slide, at);
  const badge = h("span", {class: "ll-badge", hidden: true}, "recorded");
  const node = h("section", {class: "ll-card tr-live", style: {"--span": 4}, "aria-label": "The spectrum of the chosen update while it grows"},
    h("div", {class: "ll-head"}, title, badge, exports("the spectrum over the steps", {name: () => `film-run${state.run}-${film?.m}`, figure: () => film && moved(), rows: () => rows()})), plot, bar, say);

  let linked = asked("film");                                      // the step that the address names, until its run is here
  let film = null, index = null, asking = 0, version = "", timer = 0;  // index: null follows the newest picture
  const here = () => index ?? film.steps.length - 1;
  const rows = () => film && [["step", ...film.sigma.at(-1).map((_, i) => `sigma ${i + 1}`)], ...film.steps.map((s, i) => [s, ...film.sigma[i]])];

  /* The figure with its cursor and its points at another picture. */
  function moved() {
    const {data, layout} = film.figure, i = here(), y = film.sigma[i].slice(0, data.at(-1).x.length);
    return {data: [...data.slice(0, -1), {...data.at(-1), y}], layout: {...layout, shapes: [{...layout.shapes[0], x0: film.steps[i], x1: film.steps[i]}]}};
  }
  async function show() {
    const began = performance.now(), i = here();
    slide.max = film.steps.length - 1;
    slide.value = i;
    slide.disabled = film.steps.length < 2;
    play.hidden = still.matches || slide.disabled;
    slide.setAttribute("aria-valuetext", `step ${film.steps[i]}`);
    at.textContent = `step ${film.steps[i]}`;
    say.textContent = `${absent(film.m, state.view?.name)}${sayFilm(film, i)}`;
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `Singular values of ΔW in ${film.title} by step. ${say.textContent}`);
    await draw(plot, moved());
    globalThis.LoraLab.filmed = [...(globalThis.LoraLab.filmed ?? []), performance.now() - began].slice(-100);
  }
  async function open(force = false) {
    const v = state.view, key = v && `${v.run}.${v.version}`;
    if (!v) { blank("The singular values of one ΔW will grow here while it trains."); version = ""; return; }
    if (!force && key === version) return;
    version = key;
    const mine = ++asking;
    let found;
    try { found = await get("film", {run: v.run, m: state.matrix}); } catch (error) {
      if (error instanceof Away || error instanceof Refused) { if (mine === asking) version = ""; return; }
      throw error;
    }
    if (mine !== asking || found.run !== state.run) return;
    if (!found.steps.length) return blank(found.say);
    if (film?.run !== found.run) { index = null; halt(); }
    film = found;
    if (linked != null) { index = film.steps.indexOf(+linked); linked = null; }
    if (index != null && !(index >= 0 && index < film.steps.length - 1)) index = null;
    title.textContent = `ΔW of ${film.title.replace(/ \(.*/, "")}`;
    title.title = `${film.title}: ${film.path}`;
    bar.hidden = false;
    badge.hidden = !v.recorded;
    emit("film", film.m);
    show();
  }
  function blank(text) {
    film = null;
    badge.hidden = true;
    halt();
    title.textContent = "ΔW while it grows";
    bar.hidden = true;
    say.textContent = text;
    plot.replaceChildren();
    delete plot.dataset.drawn;
  }
  function toggle() {
    if (timer) return halt();
    index = here() === film.steps.length - 1 ? 0 : here();
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (++index >= film.steps.length) { index = null; halt(); }
      show();
    }, FRAME);
    show();
  }
  function halt() { clearInterval(timer); timer = 0; play.textContent = "Play"; }
  slide.addEventListener("input", () => { halt(); index = +slide.value === film.steps.length - 1 ? null : +slide.value; address({film: index == null ? null : film.steps[index]}); show(); });
  let tall = 0;                                                    // the room below it may have changed
  new ResizeObserver(() => { if (film && plot.clientHeight && plot.clientHeight !== tall) { tall = plot.clientHeight; show(); } }).observe(plot);
  on("view", () => open());
  on("matrix", () => open(true));
  on("run", (id) => { if (film && film.run !== id) address({film: null}); index = null; halt(); });
  return node;
}
