"""The Play tab's arithmetic in JavaScript is that of lora_core.toy."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_core.toy import Toy, swaps, train

MODULE = Path(__file__).parent.parent / "app" / "static" / "playground.js"
SCRIPT = """
import {readFileSync} from "node:fs";
const js = await import(process.argv[1]);
const asked = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(asked.map(({toy, steps, swaps, options}) => {
  if (swaps) return js.swaps(toy, swaps, options).map((w) => [...w]);
  const film = js.train(toy, steps), t = film.loss.length - 1;
  const {sigma} = js.svd(js.productOf(film, t));
  return {loss: film.loss, held: film.held, full: film.full, fullHeld: film.fullHeld, sigma};
})));
"""


def binary() -> list[str]:
    spec = find_spec("playwright")
    found = Path(spec.origin).parent / "driver" / "node" if spec and spec.origin else Path()
    if not found.is_file():
        pytest.skip("no node here")
    return [str(found)]


def node(asked: list[dict[str, Any]]) -> list[Any]:
    command = [*binary(), "--input-type=module", "-e", SCRIPT, MODULE.as_uri()]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stable(count: int) -> list[Toy]:
    rng, out = np.random.default_rng(0), []

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    while len(out) < count:
        r = int(rng.integers(1, 17))
        toy = Toy(
            r=r, alpha=pick(r, r / 2, 4.0), rule=pick("r", "root"), init=pick("A", "B", "both", "none"),
            std=pick(0.02, 0.1, 0.2), opt=pick("sgd", "sgd", "adam"), rstar=int(rng.integers(1, 17)),
            spectrum=pick("halving", "flat", "linear"), top=pick(1.0, 4.0), noise=pick(0.1, 0.5),
            inputs=pick("plain", "stretched", "samples"), seed=int(rng.integers(1, 10**6)), rate=pick(0.01, 0.02, 0.05),
        )  # fmt: skip
        if toy.opt == "sgd" and toy.rate * max(1, toy.s) * toy.top * (1 if toy.inputs == "plain" else 4) > 0.5:
            continue
        out.append(toy)
    return out


def test_javascript_and_numpy_train_alike() -> None:
    toys = stable(50)
    theirs = node([{"toy": asdict(toy), "steps": 200} for toy in toys])
    worst = {"loss": 0.0, "sigma": 0.0}
    for toy, js in zip(toys, theirs):
        mine = train(toy, 200)
        for name in ("loss", "full"):
            worst["loss"] = max(worst["loss"], float(np.max(np.abs(np.array(js[name]) - getattr(mine, name)))))
        if toy.inputs == "samples":
            assert np.allclose(js["held"], mine.held, rtol=0, atol=1e-12)
            assert np.allclose(js["fullHeld"], mine.full_held, rtol=0, atol=1e-12)
        worst["sigma"] = max(worst["sigma"], float(np.max(np.abs(np.array(js["sigma"]) - mine.sigma(-1)))))
    print(worst)
    assert worst["loss"] < 1e-12 and worst["sigma"] < 1e-10


def test_swaps_alike() -> None:
    for options in ({"dtype": "bf16", "fresh": True}, {"dtype": "fp32", "fresh": False}):
        [js] = node([{"toy": asdict(Toy()), "swaps": 30, "options": options}])
        mine = swaps(Toy(), 30, **options)
        assert np.mean(np.array(js) == np.array(mine).reshape(31, -1)) > 0.99  # a tie may fall to either side


def test_exact_claims_hold_in_javascript_too() -> None:
    a = asdict(Toy(opt="adam", std=0.2, eps=0.0))
    b = {**a, "alpha": 16.0, "rate": a["rate"] / 2, "std": a["std"] / 2}
    first, second, none = node([{"toy": t, "steps": 100} for t in (a, b, asdict(Toy(init="none")))])
    assert first["loss"] == second["loss"]
    assert set(none["loss"]) == {1}


VALLEYS = """
const js = await import(process.argv[1]), out = [];
for (const [opt, rule, i] of JSON.parse(process.argv[2])) {
  const alpha = new Map(js.VALLEY_RULES).get(rule), r = js.VALLEY_RANKS[i];
  const at = Array.from({length: 20}, (_, seed) => js.bestRate({...js.DEFAULT, opt, eps: 0, seed}, rule, alpha, r));
  at.sort((a, b) => a - b);
  out.push([js.VALLEYS[opt][rule][i], [at[0], at[10], at[19]]]);
}
console.log(JSON.stringify(out));
"""


def test_the_stored_bands_are_what_twenty_seeds_give() -> None:
    """Least, middle and most of the best rates that are drawn behind one's own; here a few of the thirty."""
    cells = [("adam", "r", 0), ("adam", "one", 4), ("adam", "root", 2), ("sgd", "r", 4), ("sgd", "one", 1)]
    command = [*binary(), "--input-type=module", "-e", VALLEYS, MODULE.as_uri(), json.dumps(cells)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for stored, measured in json.loads(done.stdout):
        assert stored == measured
