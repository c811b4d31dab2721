/* The microscope: one ΔW. Its spectrum is there at once; W0's part (its spectrum behind, overlap, tokens) follows. */
import {Away, Refused, address, asked, get, h, state} from "./core.js";
import {mark} from "./help.js";
import {draw, exports} from "./plot.js";

const LENSES = [["spectrum", "Spectrum"], ["beside", "Beside W0"], ["tokens", "Tokens"]];

export function microscope() {
  const title = h("h2", {class: "ll-h"}), word = h("span", {class: "ll-badge sp-word"}), plot = h("div", {class: "sp-plot", id: "spectrum-plot"}), say = h("p", {class: "ll-say"}), overSay = h("p", {class: "ll-note sp-over"});
  const facts = h("p", {class: "ll-note sp-facts"}), rule = h("p", {class: "ll-note"}), all = h("details", {class: "sp-more"}, h("summary", {}, "all measures of its rank"), h("dl", {}));
  const tabs = h("div", {class: "ll-tabs", role: "group", "aria-label": "What the microscope shows"}, LENSES.map(([id, text]) => h("button", {type: "button", "data-id": id, onclick: () => { lens = id; address({lens: id === "spectrum" ? null : id}); paint(); if (current && id === "spectrum") draw(plot, current.figure); wake(); }}, text)));
  const panes = {
    spectrum: h("div", {}, plot, say, overSay, facts, rule, all),
    beside: h("div", {class: "sp-beside"}),
    tokens: h("div", {class: "sp-tokens"}),
  };
  const inside = h("div", {class: "sp-inside", id: "inside-plot"});
  const node = h("section", {class: "ll-card sp-right", style: {"--span": 5}}, h("div", {class: "ll-head"}, title, word, mark("verdict", "this word"),
    exports("the spectrum", {name: () => `spectrum-${current?.m}`, figure: () => lens === "beside" ? current?.inside ?? current?.figure : current?.figure, rows: () => current?.rows})), tabs, Object.values(panes));
  const page = Math.random().toString(36).slice(2);
  let current = null, lens = LENSES.some(([id]) => id === asked("lens")) ? asked("lens") : "spectrum", heat = null, key = {}, seq = 0, looked = new Map();

  function paint() {
    tabs.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.id === lens));
    for (const [id, p] of Object.entries(panes)) p.hidden = id !== lens;
    if (!current) return;
    title.textContent = current.title;
    title.title = current.path;
    const grade = heat.grades[current.word], verdict = grade === current.word ? grade : `${grade}: ${current.word}`;
    word.textContent = verdict;
    word.dataset.word = current.word;
    word.title = heat.rules[current.word];
    say.textContent = current.say;
    overSay.textContent = current.overSay;
    facts.replaceChildren(...current.facts.map(([k, v]) => h("span", {}, `${k} `, h("b", {}, v))), current.overSay ? "" : h("span", {}, current.rankSay));
    rule.replaceChildren(h("b", {}, verdict), `, since ${heat.rules[current.word]}.`);
    all.lastChild.replaceChildren(...current.more.flatMap(([k, v, about]) => [h("dt", {}, k), h("dd", {}, h("b", {}, v), ` ${about}`)]));
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `Singular values of ΔW in ${current.title}. ${current.say}`);
    paintBeside();
    paintTokens();
  }

  function paintBeside() {
    const c = current;
    if (!c.table) return panes.beside.replaceChildren(waitFor(c));
    const most = Math.max(...c.table.map(([, x]) => x)), least = Math.min(...c.table.map(([, x]) => x).filter((x) => x > 0), most) / 3;
    const wide = (x) => x > 0 ? 100 * Math.log(x / least) / Math.log(most / least) : 0, number = (x) => x.toPrecision(3);
    panes.beside.replaceChildren(h("p", {class: "ll-note"}, "‖UᵀW0V‖: how much of W0 lies along, on a logarithmic scale"),
      h("dl", {class: "sp-bars"}, c.table.map(([name, x], i) => [h("dt", {}, name), h("dd", {}, h("i", {class: ["random", "warm", "base"][i], style: {width: `${wide(x)}%`}}), h("b", {}, number(x)))])),
      h("p", {class: "sp-said"}, c.besideSay), h("p", {class: "ll-note sp-facts"}, c.beside.map(([k, v]) => h("span", {}, `${k} `, h("b", {}, v)))),
      c.inside ? inside : "", c.insideSay ? h("p", {class: "ll-note"}, c.insideSay) : "");
    if (c.inside) {
      inside.setAttribute("role", "img");
      inside.setAttribute("aria-label", c.insideSay);
      if (lens === "beside") draw(inside, c.inside);
    }
  }

  function paintTokens() {
    const c = current;
    if (!c.tokens) return panes.tokens.replaceChildren(waitFor(c));
    const chip = ([text, z], chance) => h("span", {class: z > chance ? "sp-tok out" : "sp-tok", title: `${z.toFixed(1)} standard deviations above the mean of all tokens`}, text.replaceAll("\n", "↵").replaceAll(" ", "␣"));
    const end = (sign, tokens, chance) => h("div", {class: "sp-end"}, h("span", {class: "sp-sign"}, sign), h("span", {}, tokens.map((t) => chip(t, chance))));
    const side = (r) => [h("h3", {}, {reads: "reads", writes: "writes"}[r.side], r.through ? ` through ${r.through}` : ""),
      h("ol", {}, r.poles.map(([plus, minus], i) => h("li", {}, h("span", {class: "sp-dir"}, `σ${"₁₂₃"[i]} ${c.sigma[i].toPrecision(2)}`), end("+", plus, r.chance), end("−", minus, r.chance))))];
    panes.tokens.replaceChildren(h("p", {class: c.tokens.length ? "ll-note" : "ll-say"}, c.tokensSay), ...c.tokens.map((r) => h("div", {}, side(r))),
      c.tokens.length ? h("p", {class: "ll-note"}, "What is read at + is written at +, and at − the opposite. Good at the ends of a model, rough in its middle.") : "");
  }
  const waitFor = (c) => h("p", {class: "ll-note"}, c.away ? `W0 is needed for this: ${c.away}.` : "Comparing with W0…");

  /* W0's part of the lens that is open, a moment after the spectrum: whoever clicks on does not wait for it. */
  const has = {spectrum: (c) => c.baseSigma, beside: (c) => c.table, tokens: (c) => c.tokens};
  async function wake(after = 0) {
    if (!current || has[lens](current) || current.away || state.tab !== "spectra") return;
    const {m} = current, part = lens, mine = ++seq, place = `${m} ${part}`;
    if (after) await new Promise((go) => setTimeout(go, after));
    if (mine !== seq || current?.m !== m) return;
    let r = looked.get(place);
    if (!r) {
      try { r = await get("microscope", {...key, m, part, page, seq: mine}); } catch (error) {
        if (!(error instanceof Refused || error instanceof Away)) throw error;
        r = error instanceof Refused ? {away: error.message} : {stale: true};
      }
    }
    if (r.stale || current?.m !== m) return;
    looked.set(place, r);
    current = {...current, ...r, m};
    paint();
    if (part === "spectrum" && lens === part) await draw(plot, current.figure);
    globalThis.LoraLab.looks = [...(globalThis.LoraLab.looks ?? []), place].slice(-100);
  }

  return {
    node, wake,
    get current() { return current; },
    clear() { current = null; looked = new Map(); },
    forget() { looked = new Map(); },
    async show(r, from, where) {
      heat = from;
      key = where;
      current = {...r, m: r.m};
      for (const [id] of LENSES) Object.assign(current, looked.get(`${r.m} ${id}`));
      paint();
      if (lens === "spectrum") await draw(plot, current.figure);
      wake(120);
    },
    /* Another matrix's singular values, thin over these; null: none. */
    over(r) {
      if (!current) return;
      const line = r && {x: r.sigma.map((_, i) => i + 1), y: r.sigma, mode: "lines", type: "scatter", line: {color: "#0f172a", width: 1.5}, opacity: 0.55, hoverinfo: "skip", name: r.m};
      draw(plot, {data: line ? [...current.figure.data, line] : current.figure.data, layout: current.figure.layout});
    },
  };
}
