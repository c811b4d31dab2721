/* A figure of several panels for the room that there is: as Python laid them out, or one below the other.
 * Every panel has axes of its own (app/figures_experiments/panels.py), so only their domains are changed. */
const NARROW = 270, ROW = 300, BELOW = 86;                        // px: least width of a panel, height of a row, axis and title between two

export function restacked({data, layout}, width) {
  const {panels, rows} = layout.meta, many = Math.ceil(panels / rows);
  const columns = many > 1 && width / many < NARROW ? 1 : many, lines = Math.ceil(panels / columns);
  let line = 0, more = 0;                                          // further lines of the legend, in px
  for (const t of layout.showlegend ? data.filter((t) => t.showlegend !== false) : []) {
    const each = 58 + 7.6 * t.name.length;
    if (line && line + each > width - 8) { more += 23; line = 0; }
    line += each;
  }
  more += more ? 14 : 0;                                     // lines that wrap stand a little wider
  const top = layout.margin.t + layout.margin.b + more;
  const height = top + lines * (ROW - (lines > 1 ? BELOW : 60)) + (lines - 1) * BELOW, inner = height - top, gap = BELOW / inner;
  const made = {...layout, margin: {...layout.margin, t: layout.margin.t + more}, uirevision: `${columns}`}, tall = (1 - gap * (lines - 1)) / lines;
  for (let i = 0; i < panels; i++) {
    const n = i ? i + 1 : "", x = layout[`xaxis${n}`], y = layout[`yaxis${n}`], high = 1 - Math.floor(i / columns) * (tall + gap);
    made[`xaxis${n}`] = {...x, domain: columns === 1 ? [0, 1] : x.domain};
    made[`yaxis${n}`] = {...y, domain: [Math.max(0, high - tall), high]};
  }
  return {figure: {data, layout: made}, height, columns};
}
