/* Where Compare's dials stand, in words, and the held-out loss of what stands there. `of` gives what is known:
 * info (the run), dials (their ticks), held (losses along them). */
import {fmt} from "./core.js";

export function makeDial(of) {
  const measured = new Map();                                   // settings off the dials' ticks -> {loss, rows, of}
  const dial = {by: "k", at: null, strength: 1, off: new Set()};      // at null: the last tick, all of ΔW
  const ticks = (by = dial.by) => of.dials?.ticks[by] ?? [];
  const at = () => Math.min(dial.at ?? Infinity, ticks().length - 1);
  const full = () => at() === ticks().length - 1;
  const whole = () => !of.dials || full() && dial.strength === 1 && !dial.off.size;
  const nothing = () => Boolean(of.dials) && (dial.strength === 0 || ticks()[at()]?.most === 0 || dial.off.size >= of.dials.matrices);
  const setting = () => whole() ? null : {by: dial.by, at: full() ? null : at(), strength: dial.strength, off: [...dial.off].sort()};
  /* A setting in words; null is all of ΔW. */
  function saying(s) {
    const t = s && s.at != null ? ticks(s.by)[s.at] : null, parts = [];
    if (t) parts.push(s.by === "k" ? `${t.x} of ${of.dials.rank} directions` : s.by === "mb" ? `the best ${(t.bytes / 1e6).toFixed(2)} MB` : `${fmt.pct(t.x)} of each matrix's energy`);
    if (s?.off.length) parts.push(`${of.dials.matrices - s.off.length} of ${of.dials.matrices} matrices`);
    if (s && s.strength !== 1) parts.push(`ΔW × ${s.strength}`.replace("-", "−"));
    return parts.join(", ");
  }
  const said = () => saying(setting());
  /* The held-out loss of what is on the dials: off a curve that is measured, or measured for itself. */
  function lossNow() {
    const {info, held, dials} = of;
    if (!info || !info.loss && !held) return null;
    const tick = (name, i) => held?.families[name] && {loss: held.families[name].loss[i], rows: held.families[name].rows, of: held.of};
    if (nothing()) return info.loss ? {loss: info.loss.base} : tick("k", 0);
    if (whole()) return info.loss ? {loss: info.loss.adapted} : null;
    if (dial.strength === 1 && !dial.off.size && tick(dial.by, at())) return tick(dial.by, at());
    const i = full() && !dial.off.size ? dials.strengths.indexOf(dial.strength) : -1;
    return i >= 0 && tick("strength", i) || measured.get(JSON.stringify(setting())) || null;
  }
  function reset() { measured.clear(); Object.assign(dial, {by: "k", at: null, strength: 1}); dial.off.clear(); }
  return {dial, measured, ticks, at, full, whole, nothing, setting, said, saying, lossNow, reset};
}
