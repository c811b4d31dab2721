/* layer_map.js: one transformer layer, drawn to scale, as the control for a LoRA spec.
 *
 *   const map = LayerMap(root, {
 *     matrices: [{name: "q", title: "query", out: 576, in: 576, stage: 0, modules: 30, by_layer: [1, …]}, ...],
 *        // stage: 0 attention input, 1 attention output, 2 MLP input, 3 MLP output; modules: how many the model has, by_layer: in each layer
 *     layers: 30,                                    // how many such layers the model has
 *     ranks: [1, 2, 4, 8, 16, 32, 64],               // the stops of the dial
 *     state: {targets: ["q", "v"], layers: [0, 1, ...], rank: 8, alpha: 16, scaling: "alpha/r"},
 *     ids: {targets: "t", rank: "r", alpha: "a"},    // optional: ids of the drawing and of the labels of both numbers
 *     help: {rank: node, alpha: node, scaling: node, layers: node},   // optional: what stands behind a control's name
 *     onChange(state, settled) {},                   // settled is false while dragging
 *     onPick(name) {}                                // a matrix was clicked
 *   });
 *   map.set(state);   // from outside; redraws, does not call back
 *   map.mark(name, layer);   // the chosen matrix
 *   map.destroy();
 *
 * A matrix W0 (out x in) keeps its slate fill: it is frozen. When it is a target, B (out x r) stands at
 * its left and A (r x in) lies on top, so that their outer product covers W0. Matrices and the length of
 * the strips are to scale; the strips' thickness is widened (r^0.6), or r = 8 of 576 would be one pixel.
 * Every text is set with textContent: names from a model's config cannot inject markup.
 * Colours come from theme.css (.lm-*). No dependency, no global but LayerMap. */
globalThis.LayerMap = (() => {
  "use strict";
  const NS = "http://www.w3.org/2000/svg";
  const el = (tag, attrs = {}, ...kids) => {
    const svg = /^(svg|g|rect|path|text|circle|line)$/.test(tag);
    const node = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
    for (const [k, v] of Object.entries(attrs)) node.setAttribute(k, v);
    for (const kid of kids) node.append(kid);
    return node;
  };
  const copy = (x) => JSON.parse(JSON.stringify(x));     // a state is plain JSON
  let count = 0;
  const thick = (rank) => Math.min(20, 1.5 * Math.max(0, rank) ** 0.6);
  const CAPTION = 19, RAIL = 12, TOP = 40;                                  // pixels

  /* Where everything goes. Stages of a row stand side by side; a stage stacks its matrices unless that
   * would be taller than the tallest single one. One scale for all, the largest that fits. */
  function layout(matrices, width, height) {
    const stages = [0, 1, 2, 3].map((s) => matrices.filter((m) => m.stage === s)).filter((s) => s.length);
    const tallest = Math.max(...matrices.map((m) => m.out));
    const stacked = stages.map((s) => s.reduce((sum, m) => sum + m.out, 0) <= 1.2 * tallest);
    const narrow = width < 620;
    const [ROOM, SIDE, GAP] = narrow ? [21, 17, 17] : [25, 28, 24];           // for the strips, at the ends, between
    const rows = narrow ? [stages.filter((s) => s[0].stage < 2), stages.filter((s) => s[0].stage > 1)].filter((r) => r.length) : [stages];
    const flat = (i) => stacked[stages.indexOf(i)];
    const units = (row) => row.reduce((sum, s) => sum + (flat(s) ? Math.max(...s.map((m) => m.in)) : s.reduce((a, m) => a + m.in, 0)), 0);
    const fixed = (row) => row.reduce((sum, s) => sum + (flat(s) ? ROOM : ROOM * s.length + 6 * (s.length - 1)) + GAP, 0)
      + 2 * SIDE + (narrow ? 0 : GAP);
    const scale = Math.min(...rows.map((row) => (width - fixed(row)) / units(row)), (narrow ? 150 : height) / tallest);
    const size = (m) => ({w: Math.max(8, m.in * scale), h: Math.max(8, m.out * scale)});
    const boxes = [], groups = [];
    let top = TOP;
    for (const row of rows) {
      const heights = row.map((s) => s.map((m) => ROOM + size(m).h + CAPTION));
      const tall = Math.max(...row.map((s, i) => (flat(s) ? heights[i].reduce((a, b) => a + b) : Math.max(...heights[i]))));
      const used = fixed(row) + units(row) * scale;
      let x = SIDE + GAP / 2 + (narrow ? 0 : Math.max(0, (width - used) / 2)), group = null;
      row.forEach((s, i) => {
        const block = s[0].stage < 2 ? "attention" : "MLP";
        if (!group || group.name !== block) {
          if (group) x += GAP;
          groups.push(group = {name: block, x0: x, y: top + tall / 2, top, stages: []});
        }
        const total = heights[i].reduce((a, b) => a + b), left = x;
        let y = top + (tall - (flat(s) ? total : Math.max(...heights[i]))) / 2;
        s.forEach((m, j) => {
          const {w, h} = size(m);
          boxes.push({m, x: x + ROOM, y: y + ROOM, w, h});
          if (flat(s)) y += heights[i][j]; else x += ROOM + w + 6;
        });
        x = flat(s) ? left + ROOM + Math.max(...s.map((m) => size(m).w)) : x - 6;
        group.stages.push({x0: left, x1: x});
        group.x1 = x;
        x += GAP;
      });
      top += tall + (narrow ? TOP : 4);
    }
    return {boxes, groups, width, height: top - (narrow ? TOP - 8 : 0), narrow, ROOM, SIDE};
  }

  return function LayerMap(root, options) {
    const {matrices, layers, ranks = [1, 2, 4, 8, 16, 32, 64], ids = {}, help = {}, onChange = () => {}, onPick = () => {}} = options;
    const id = `lm${++count}`, named = (name) => ids[name] ? {id: ids[name]} : {};
    let state = copy(options.state), marks = new Map(), paint = null, picked = {};
    root.classList.add("lm");
    root.replaceChildren();
    const figure = el("div", {class: "lm-figure", ...named("targets")});
    const strip = el("div", {class: "lm-strip", role: "group", "aria-label": "Layers to adapt. Arrow keys move, Space switches one, Shift with an arrow paints."});
    const said = el("span", {class: "lm-said"});
    // The slider steps over the usual ranks; the number beside it takes any. Both numbers stand inside their label.
    const dial = el("input", {type: "range", id: `${id}-dial`, min: 0, max: ranks.length - 1, step: 1, "aria-label": "rank r, usual values"});
    const number = el("input", {type: "number", class: "lm-number", min: 1, step: 1, inputmode: "numeric", "aria-label": "rank r"});
    const alpha = el("input", {type: "number", min: 0, step: "any", inputmode: "decimal", "aria-label": "alpha"});
    const scaling = el("select", {class: "lm-scaling", "aria-label": "scaling of B·A"}, el("option", {value: "alpha/r"}, "α/r"), el("option", {value: "alpha/sqrt(r)"}, "α/√r"));
    const scale = el("span", {class: "lm-said lm-scale"});
    const quick = (text, pick) => {
      const b = el("button", {type: "button", class: "ll-link"}, text);
      b.onclick = () => { state.layers = [...Array(layers).keys()].filter(pick); changed(true); };
      return b;
    };
    const about = el("p", {class: "lm-about"});
    root.append(figure, about,
      el("div", {class: "lm-row"}, el("span", {class: "lm-label"}, "layers", help.layers ?? ""), strip, said),
      el("div", {class: "lm-row lm-quick"}, el("span", {class: "lm-label"}), quick("all", () => true),
        quick("first half", (i) => i < layers / 2), quick("last half", (i) => i >= layers / 2), quick("every other", (i) => i % 2)),
      el("div", {class: "lm-row lm-dials"}, el("span", {class: "lm-label lm-r"}, el("label", {for: `${id}-dial`}, "rank r"), help.rank ?? ""), dial, el("label", {...named("rank"), class: "lm-r"}, number),
        el("label", {class: "lm-alpha", ...named("alpha")}, "α ", alpha), help.alpha ?? "", el("span", {class: "lm-pair"}, scaling, scale, help.scaling ?? "")));

    const cells = [...Array(layers).keys()].map((i) => {
      const b = el("button", {type: "button", class: "lm-cell", tabindex: i ? -1 : 0, "aria-label": `layer ${i}`, "data-i": i});
      strip.append(b);
      return b;
    });

    function changed(settled) { refresh(); onChange(copy(state), settled); }
    function toggle(name) {
      const on = new Set(state.targets);
      on.has(name) ? on.delete(name) : on.add(name);
      state.targets = matrices.map((m) => m.name).filter((n) => on.has(n));
      changed(true);
    }
    function layer(i, on) {
      const now = new Set(state.layers);
      on ? now.add(i) : now.delete(i);
      state.layers = [...now].sort((a, b) => a - b);
    }

    /* Built once per width; refresh() afterwards only touches attributes. */
    function draw() {
      const {boxes, groups, width, height, narrow, ROOM, SIDE} = layout(matrices, figure.clientWidth || 640, options.height || 216);
      root.classList.toggle("lm-narrow", narrow);
      const focused = root.contains(document.activeElement) && document.activeElement.dataset.name;
      const svg = el("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "One layer; choose the matrices to adapt"});
      const wire = (d) => svg.append(el("path", {d, class: "lm-wire"}));
      marks = new Map();
      const rails = narrow ? groups.map((g) => [g]) : [groups];
      for (const on of rails) {                       // the residual stream, and each block's detour from it
        const y = on[0].top - TOP + RAIL;
        wire(`M18 ${y}H${width - 2}m-6 -4l6 4l-6 4`);
        svg.append(el("text", {x: 2, y: y + 5, class: on[0] === groups[0] ? "lm-text lm-x" : "lm-text"}, on[0] === groups[0] ? "x" : "…"));
        for (const g of on) {
          wire(`M${g.x0 - 12} ${y}V${g.y}H${g.x0 + 1}m-5 -4l5 4l-5 4`);
          g.stages.slice(1).forEach((s, i) => wire(`M${g.stages[i].x1 + 3} ${g.y}H${s.x0 + 1}m-5 -4l5 4l-5 4`));
          wire(`M${g.x1 + 3} ${g.y}H${g.x1 + 13}V${y + 7}`);
          svg.append(el("circle", {cx: g.x1 + 13, cy: y, r: 7, class: "lm-add lm-h"}), el("path", {d: `M${g.x1 + 9} ${y}h8m-4 -4v8`, class: "lm-wire"}),
            el("text", {x: g.x0, y: y + 19, class: "lm-text lm-block"}, g.name));
        }
      }
      for (const {m, x, y, w, h} of boxes) {
        const b = el("rect", {class: "lm-ba lm-b", y, height: h, rx: 1}), a = el("rect", {class: "lm-ba lm-a", x, width: w, rx: 1});
        const g = el("g", {class: "lm-m", role: "button", tabindex: 0, "data-name": m.name},
          el("rect", {class: "lm-hit", x: x - ROOM + 2, y: y - ROOM + 2, width: w + ROOM, height: h + ROOM + CAPTION - 3, rx: 5}),
          el("rect", {class: "lm-w", x, y, width: w, height: h, rx: 2}), b, a,
          el("text", {class: h < 20 ? "lm-name lm-small" : "lm-name", x: x + w / 2, y: y + h / 2 + (h < 20 ? 5 : 6)}, m.name),
          el("text", {class: "lm-text", x: x + w / 2, y: y + h + 15, "text-anchor": "middle"}, 9.2 * `${m.out}×${m.in}`.length < w + ROOM ? `${m.out}×${m.in}` : `${m.out}`));
        g.addEventListener("click", () => { toggle(m.name); explain(m); onPick(m.name); });
        for (const [kind, who] of [["pointerenter", m], ["focus", m], ["pointerleave", null], ["blur", null]]) g.addEventListener(kind, () => explain(who));
        g.addEventListener("keydown", (e) => {
          if (e.key === " " || e.key === "Enter") { e.preventDefault(); toggle(m.name); onPick(m.name); }
        });
        svg.append(g);
        marks.set(m.name, {m, g, a, b, x, y});
      }
      figure.replaceChildren(svg);
      if (focused) marks.get(focused)?.g.focus();
      refresh();
    }

    /* One line under the drawing: what the pointed matrix is, and what B and A would be. */
    let pointed = null;
    const thousands = (n) => n.toLocaleString("en");
    function explain(m = pointed) {
      pointed = m;
      const r = state.rank, n = m && r * (m.out + m.in);
      about.textContent = !m ? `h = W0·x + s·B·A·x with s = ${say(scaleOf())}. B stands at the left of its matrix, A lies on top; r is their thickness.`
        : `${m.name}${m.title && m.title !== m.name ? ` (${m.title})` : ""}: ${hits(m)} of ${m.modules ?? layers} adapted. W0 ${thousands(m.out * m.in)} numbers; B ${m.out}×${r} and A ${r}×${m.in} ${thousands(n)}` +
          (n < m.out * m.in ? `, ${+(m.out * m.in / n).toPrecision(2)} times fewer.` : ": no saving at this rank.");
    }
    const hits = (m) => state.targets.includes(m.name) ? state.layers.reduce((n, l) => n + (m.by_layer?.[l] ?? 1), 0) : 0;
    const scaleOf = () => state.scaling === "alpha/sqrt(r)" ? state.alpha / Math.sqrt(state.rank) : state.alpha / state.rank;
    const say = (x) => Number.isFinite(x) ? `${+x.toPrecision(3)}` : "–";

    function refresh() {
      explain();
      const t = thick(state.rank), on = new Set(state.targets), chosen = new Set(state.layers);
      for (const {m, g, a, b, x, y} of marks.values()) {
        const is = on.has(m.name);
        g.setAttribute("aria-pressed", is);
        g.setAttribute("aria-label", `${m.name}, ${m.title || "matrix"}, ${m.out} by ${m.in}` +
          (is ? `, adapted, ${thousands(state.rank * (m.out + m.in))} parameters a layer, in ${hits(m)} modules` : ", frozen"));
        b.setAttribute("x", x - 3 - t); b.setAttribute("width", t);
        a.setAttribute("y", y - 3 - t); a.setAttribute("height", t);
      }
      for (const [name, {g}] of marks) g.classList.toggle("picked", name === picked.name);
      cells.forEach((c, i) => { c.setAttribute("aria-pressed", chosen.has(i)); c.classList.toggle("picked", i === picked.layer); });
      const n = state.layers.length, first = state.layers[0], last = state.layers[n - 1];
      said.textContent = n === layers ? `all ${n}` : !n ? "none" : last - first + 1 === n ? `${first} to ${last} (${n})` : `${n} of ${layers}`;
      const stop = ranks.findIndex((r) => r >= state.rank);
      dial.value = stop < 0 ? ranks.length - 1 : stop;
      dial.setAttribute("aria-valuetext", `rank ${state.rank}`);
      if (document.activeElement !== number) number.value = state.rank;
      if (document.activeElement !== alpha) alpha.value = state.alpha;
      scaling.value = state.scaling || "alpha/r";
      scale.textContent = `= ${say(scaleOf())}`;
    }

    /* What was typed goes out as it is, 0 and 1.5 included: whoever listens knows what a rank may be. */
    const typed = (input, name) => { if (input.value !== "" && Number.isFinite(+input.value)) { state[name] = +input.value; changed(true); } };
    dial.oninput = () => { state.rank = ranks[dial.value]; changed(false); };
    dial.onchange = () => changed(true);
    number.oninput = () => typed(number, "rank");
    alpha.oninput = () => typed(alpha, "alpha");
    number.onblur = alpha.onblur = () => refresh();
    scaling.onchange = () => { state.scaling = scaling.value; changed(true); };

    /* The brush: press decides on or off, moving paints; one tab stop, arrows inside. */
    const at = (e) => document.elementFromPoint(e.clientX, e.clientY)?.closest?.(".lm-cell");
    strip.addEventListener("pointerdown", (e) => {
      const c = at(e);
      if (!c || !strip.contains(c)) return;
      e.preventDefault(); c.focus(); strip.setPointerCapture(e.pointerId);
      paint = {on: c.getAttribute("aria-pressed") !== "true", from: +c.dataset.i, before: [...state.layers]};
      move(e);
    });
    function move(e) {
      const c = at(e);
      if (!paint || !c || !strip.contains(c)) return;
      const [lo, hi] = [paint.from, +c.dataset.i].sort((a, b) => a - b);
      state.layers = [...paint.before];
      for (let i = lo; i <= hi; i++) layer(i, paint.on);
      changed(false);
    }
    strip.addEventListener("pointermove", move);
    const release = () => { if (paint) { paint = null; changed(true); } };
    strip.addEventListener("pointerup", release);
    strip.addEventListener("pointercancel", release);
    strip.addEventListener("keydown", (e) => {
      const i = +e.target.dataset.i;
      const to = {ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: layers - 1}[e.key];
      if (e.key === " " || e.key === "Enter") { e.preventDefault(); layer(i, !state.layers.includes(i)); changed(true); }
      if (to === undefined || !cells[to]) return;
      e.preventDefault();
      cells.forEach((c, j) => c.setAttribute("tabindex", j === to ? 0 : -1));
      cells[to].focus();
      if (e.shiftKey) { layer(to, state.layers.includes(i)); changed(true); }
    });

    let width = 0;
    const watch = new ResizeObserver(() => { if (figure.clientWidth && figure.clientWidth !== width) { width = figure.clientWidth; draw(); } });
    watch.observe(figure);
    draw();
    return {
      set(next) { state = copy(next); refresh(); },
      mark(name, layer) { picked = {name, layer}; refresh(); },
      get: () => copy(state),
      destroy() { watch.disconnect(); root.replaceChildren(); },
    };
  };
})();
