/* A second adapter in Spectra: φ layer by layer as one more line below the map, and its spectrum over the first. */
import {Away, Refused, address, asked, get, h} from "./core.js";

/* key(): what is looked at; across: the line below the map; onChange: another one was chosen. */
export function secondAdapter({key, across, onChange, onFault}) {
  const pick = h("select", {class: "ll-field", id: "beside-picker"}), many = h("select", {class: "ll-field sp-many", "aria-label": "φ of how many first directions"});
  let other = asked("with"), phi = null, asking = 0;

  function list(groups) {
    pick.replaceChildren(h("option", {value: ""}, "nothing"), ...groups);
    pick.value = other ?? "";
    if (pick.selectedOptions.length) return;
    pick.value = "";
    if (other) { other = null; address({with: null}); pair(); }
  }
  pick.onchange = () => {
    other = pick.value || null;
    address({with: other});
    onChange();
    pair();
  };
  async function pair(there = true) {
    const mine = ++asking;
    phi = null;
    across.add("phi", null);
    if (!other || !there) return;
    let p;
    try { p = await get("pair", {...key(), with: other}); } catch (error) {
      if (error instanceof Refused && mine === asking) onFault(error.message);
      else if (!(error instanceof Away || error instanceof Refused)) throw error;
      return;
    }
    if (mine !== asking) return;
    phi = p;
    many.replaceChildren(...p.ks.map((k) => h("option", {value: k}, `first ${k === "1" ? "direction" : `${k} directions`}`)));
    if (p.ks.includes(asked("first"))) many.value = asked("first");
    line();
  }
  function line() {
    const m = phi.phi[many.value];
    across.add("phi", {short: "φ", title: `φ of the first ${many.value} directions with ${phi.name}`, values: m.values, control: m.control, top: 1, number: (x) => x.toPrecision(2).replace(/^1\.0$/, "1"), extra: many, say: (t) => `${m.say[t] ?? `${t} is not in both.`} ${phi.note}`});
  }
  many.onchange = () => { address({first: many.value === phi.ks[0] ? null : many.value}); line(); };
  return {node: h("label", {class: "ll-pick"}, h("span", {}, "beside"), pick), list, pair, get other() { return other; }};
}
