/* A participant's page: a nickname, the question with its choices, Play with a seed of one's own, cells of the grid. */
import {h} from "./core.js";
import {act, room} from "./room.js";
import {cells} from "./room_grid.js";
import {ownPlay} from "./room_play.js";
import {wall} from "./room_wall.js";

export const people = (n) => n === 1 ? "1 person is here" : `${n} people are here`;

export function participant() {
  const line = h("p", {class: "rm-line", role: "status"});
  const look = h("button", {type: "button", class: "ll-button small", onclick: () => room.look(!room.around)});
  const strip = h("div", {class: "rm-strip"}, h("b", {class: "rm-badge"}, "Room"), line, look);
  const body = h("div", {class: "rm-body"});
  const name = nickname();
  const board = wall({}), grid = cells(), play = ownPlay();
  let view = null, step = () => {};

  function lobby() {
    body.replaceChildren(h("div", {class: "rm-center"}, h("h2", {class: "rm-title"}, "You are in the room"),
      h("p", {class: "ll-say"}, "The presenter begins soon: a question comes here, you guess, and then everybody runs it."), name.node));
    return () => name.update(view);
  }
  function predict() {
    const q = view.question, said = h("p", {class: "ll-note rm-said", role: "status"});
    const buttons = q.choices.map((text, i) => h("button", {type: "button", class: "rm-choice", "aria-pressed": "false", onclick: () => choose(i)},
      h("span", {class: "rm-letter", "aria-hidden": "true"}, "ABCDE"[i]), h("span", {}, text)));
    const choose = async (i) => { mark(i); await act("guess", {round: view.round, choice: i}); };
    const mark = (guess) => {
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", i === guess));
      said.textContent = guess == null ? "Choose one; you can change it until the presenter goes on." : `Your guess is ${"ABCDE"[guess]}. You can change it until the presenter goes on.`;
    };
    body.replaceChildren(h("div", {class: "rm-center"}, h("h2", {class: "rm-title", tabindex: -1}, q.text), h("div", {class: "rm-choices", role: "group", "aria-label": "What do you expect?"}, buttons), said, name.node));
    return () => { mark(view.guess); name.update(view); };
  }
  function run() {
    const q = view.question;
    if (q.act === "play") {
      body.replaceChildren(play.node);
      play.begin(view);
      return () => {};
    }
    if (q.act === "grid") {
      body.replaceChildren(h("div", {class: "rm-center"}, h("h2", {class: "rm-title"}, q.text), guessed(view), grid.node));
      return () => grid.update(view);
    }
    const mine = own();
    body.replaceChildren(h("div", {class: "rm-center"}, h("h2", {class: "rm-title"}, q.text), guessed(view), h("p", {class: "ll-say"}, "Guessing is over. What is so comes with the next key."), mine.node));
    return mine.update;
  }
  /* What one has under way, be it of an earlier question. */
  function own() {
    const node = h("details", {class: "rm-mine", hidden: true}, h("summary", {}, view.question.act === "grid" ? "Cells and your runs" : "Your runs"), grid.node);
    return {node, update() { node.hidden = !view.grid; if (view.grid) grid.update(view); }};
  }
  function shown() {
    const mine = own();
    body.replaceChildren(board.node, mine.node);
    return () => { board.update(view); mine.update(); };
  }
  const steps = {lobby, predict, run, reveal: shown, discuss: shown};
  const lines = {
    lobby: () => people(view.here),
    predict: () => `${view.guessed} of ${view.here} have guessed`,
    run: () => ({play: `Play with your own seed ${view.seed}: ${view.curves} curve${view.curves === 1 ? "" : "s"} so far`, grid: "Take a cell of the grid", none: "Guessing is over"})[view.question.act],
    reveal: () => "Revealed",
    discuss: () => "Discuss: all tabs are open",
  };
  function update(now, fresh) {
    view = now;
    if (fresh) { play.end(); step = steps[view.stage](); }
    step();
    line.textContent = lines[view.stage]();
    look.textContent = room.around ? "Back to the room" : "Look around";
    look.hidden = view.stage === "predict";
    room.mode(true);
  }
  return {nodes: [strip, body], update};
}
const guessed = (view) => h("p", {class: "ll-note"}, view.guess == null ? "You did not guess this one." : `Your guess: ${view.question.choices[view.guess]}`);

/* A nickname of at most 24 letters; nobody needs one. */
function nickname() {
  const field = h("input", {class: "ll-field", id: "rm-name", maxlength: 24, autocomplete: "off", placeholder: "optional"});
  const save = h("button", {class: "ll-button small"}, "Save"), said = h("span", {class: "ll-note", role: "status"});
  const node = h("form", {class: "rm-name", onsubmit: async (e) => { e.preventDefault(); if (await act("name", {name: field.value.trim()})) said.textContent = "saved"; }},
    h("label", {for: "rm-name"}, "Your nickname"), field, save, said);
  let known = null;
  return {node, update(view) {
    if (known !== view.name && document.activeElement !== field) field.value = known = view.name;
    field.placeholder = `person ${view.number}`;
  }};
}
