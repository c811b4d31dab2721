"""The paper's questions: cells that survive a kill, verdicts on planted rows, every experiment on tiny models."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_core as lc
from lora_core.experiments import NAMES, Cell, Stopped, experiments, result_here, storage
from lora_core.experiments import subspace as subspace_file
from lora_core.experiments.alpha import best_rate, spec_for
from lora_core.experiments.cells import Cells
from lora_core.experiments.experiment import HOLDS, NOT, PARTLY, UNDECIDED, VERDICTS
from lora_core.experiments.nulls import gaussian_ninety, noise_edge
from lora_core.experiments.objective import pairs
from lora_core.experiments.verdicts import T, above, every, interval, median, paired, per_seed, verdict
from lora_core.experiments.which import equal_specs
from tests.model_folder import tiny_bert, tiny_llama
from tests.zoo import make

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("models")
    return {"encoder": str(tiny_bert(where / "bert")), "writer": str(tiny_llama(where / "llama"))}


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("lora_core.machine.measure", lambda dtype, on="cpu": 1e11)


# ---- the numbers behind verdicts -----------------------------------------------------------------------------------
def test_an_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert interval([5.0]) == (5.0, math.inf) and T == tuple(sorted(T, reverse=True))
    g = np.random.default_rng(0)
    hits = [abs(m) <= h for m, h in (interval(x) for x in g.standard_normal((4000, 3)))]
    assert 0.94 < np.mean(hits) < 0.96


def test_what_cannot_be_told_is_not_told() -> None:
    assert above([1.0, 1.1, 0.9]) is True and above([-1.0, -1.1, -0.9]) is False
    assert above([1.0, -1.0, 0.5]) is None and above([3.0]) is None
    assert every([True, True]) is True and every([True, None]) is None and every([None, False]) is False
    assert verdict([True, True]) == HOLDS and verdict([True, False]) == PARTLY and verdict([False]) == NOT
    assert verdict([True, None]) == verdict([False, None]) == UNDECIDED
    assert verdict([True, False, None]) == PARTLY, "it is that, whatever the third would be"
    middle, low, high = median(range(12))
    assert middle == 5.5 and (low, high) == (2, 9) and median([1.0, 2.0])[1:] == (-math.inf, math.inf)


def test_seeds_are_paired() -> None:
    rows = [{"seed": s, "of": of, "x": 10 * s + of} for s in (0, 1, 2) for of in (1, 3)]
    assert paired(per_seed(rows, "x", of=3), per_seed(rows, "x", of=1)) == [2.0, 2.0, 2.0]


def test_the_controls_are_noise() -> None:
    W = np.random.default_rng(3).standard_normal((60, 200)) * 7
    s = np.linalg.svd(W, compute_uv=False)
    assert s[0] == pytest.approx(noise_edge(float(np.linalg.norm(W)), 60, 200), rel=0.05)
    assert gaussian_ninety(60, 200) == pytest.approx(int((np.cumsum(s**2) < 0.9 * (s**2).sum()).sum()) + 1, abs=1)


# ---- cells ---------------------------------------------------------------------------------------------------------
def test_cells_are_kept_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "x" / "a.jsonl")
    cells.put("one", {"rows": (1, 2)}, 0.5)
    cells.put("two", [3], 0.25)
    with open(cells.file, "a") as f:
        f.write('{"key": "three", "val')
    again = Cells(cells.file)
    assert again.values == {"one": {"rows": [1, 2]}, "two": [3]} and sum(again.seconds.values()) == 0.75
    again.put("three", None, 0.1)
    assert list(Cells(cells.file).values) == ["one", "two", "three"]


def _lab(folders: dict[str, str], **more: Any) -> lc.Lab:
    torch.set_num_threads(1)
    return lc.Lab(**{"quick": True, "steps": 3, **folders, **more})


def test_stopped_it_goes_on_with_the_next_cell(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def run(lab: lc.Lab) -> list[dict[str, Any]]:
        def of(key: str) -> dict[str, Any]:
            made.append(key)
            return {"objective": key.split()[0], "seed": int(key[-1]), "before": 2.0, "after": 1.0, "steps": 1}

        keys = [f"{goal} {s}" for goal in ("lm", "classify", "preference") for s in (0, 1, 2)]
        return list(lab.run([Cell(k, lambda k=k: of(k)) for k in keys]).values())

    e = replace(lc.find_experiment("objective"), run=run)
    monkeypatch.setattr("lora_core.experiments.objective.EXPERIMENT", e)
    told: list[Any] = []
    with pytest.raises(Stopped):
        lc.run_experiment("objective", _lab(folders, tell=told.append, stop=lambda: len(made) >= 4))
    assert len(made) == 4 and result_here("objective") is None
    assert told[0].left_s is None and told[-1].left_s is not None and told[-1].done == pytest.approx(3 / 9)
    result = lc.run_experiment("objective", _lab(folders))
    assert len(made) == 9 == len(set(made)) and result.verdict == HOLDS
    lc.run_experiment("objective", _lab(folders))
    assert len(made) == 18, "a finished one begins anew"


def test_killed_it_goes_on(folders: dict[str, str], tmp_path: Path) -> None:
    """A process that dies without a word, in its second cell; the next one makes the others, and only those."""
    code = (
        "import os, sys, signal, lora_core as lc\n"
        "from lora_core.experiments import objective\n"
        "make = objective._train\n"
        "def train(lab, goal, seed):\n"
        "    print(goal, seed, flush=True)\n"
        "    if len(sys.argv) > 3 and seed == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return make(lab, goal, seed)\n"
        "objective._train = train\n"
        "r = lc.run_experiment('objective', lc.Lab(quick=True, steps=2, seeds=(0, 1), encoder=sys.argv[1],"
        " writer=sys.argv[2]))\n"
        "print(len(r.rows))\n"
    )
    words = [sys.executable, "-c", code, folders["encoder"], folders["writer"]]
    first = subprocess.run([*words, "die"], capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert first.returncode == -signal.SIGKILL and first.stdout.splitlines() == ["lm 0", "lm 1"]
    second = subprocess.run(words, capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert second.stdout.splitlines() == ["lm 1", "classify 0", "classify 1", "preference 0", "preference 1", "6"]
    assert not list((tmp_path / "home" / "experiments").glob("*.jsonl"))


# ---- every experiment ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_end_to_end(name: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"full": 900, "lora": 500}  # of processes of their own, which have a test of theirs
    monkeypatch.setattr("lora_core.experiments.storage._peak", lambda _, m: {"loaded": 400, "peak": peaks[m]})
    lab = _lab(folders)
    result = lc.run_experiment(name, lab)
    e = lc.find_experiment(name)
    assert result.verdict in VERDICTS and result.rows and result.sentence.endswith(".")
    assert "nan" not in result.sentence and result.quick and result.seconds > 0
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert json.loads(result.to_json()) == plain
    assert lc.Result.from_dict(plain).to_dict() == plain
    assert e.judge(plain["rows"]) == (result.verdict, result.sentence)
    kept = result_here(name)
    assert kept is not None and kept.to_dict() == plain
    assert result.command.startswith(f"lora-lab experiment run {name} --quick --")
    for model, _ in lab._models.values():  # what was shared is as it was: no adapter, no weight changed
        fresh, _ = lc.load_model(model.lora_lab.folder, dtype="float32", labels=model.lora_lab.labels or None)
        assert set(model.state_dict()) == set(fresh.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values()))


def test_the_peak_is_of_a_process_that_trains(folders: dict[str, str]) -> None:
    found = {m: storage._peak(folders["writer"], m) for m in ("full", "lora")}
    assert all(0 < f["loaded"] <= f["peak"] for f in found.values())


def test_every_experiment_can_be_shown() -> None:
    for e in experiments():
        d = json.loads(json.dumps(e.to_dict()))
        assert len(set(d["choices"])) == 3 and 0 <= d["answer"] < 3 and d["claim"].endswith((".", ")."))
        assert d["question"].endswith("?") and d["section"] and d["paper"]
    with pytest.raises(lc.UserError, match="did you mean 'rank'"):
        lc.find_experiment("rnak")


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_verdict_follows_from_the_stored_rows(name: str) -> None:
    result = lc.stored_result(name)
    if result is None:
        pytest.skip("no result is stored yet")
    e = lc.find_experiment(name)
    assert (result.name, result.question, result.claim) == (e.name, e.question, e.claim)
    assert e.judge(result.rows) == (result.verdict, result.sentence)
    assert result.command == f"lora-lab experiment run {name}" + (" --quick" if result.quick else "")


# ---- what each of them rests on --------------------------------------------------------------------------------------
def test_the_grid_is_phi() -> None:
    g = np.random.default_rng(1)
    A, B = g.standard_normal((8, 40)), g.standard_normal((32, 40))
    found = subspace_file.grid(*(subspace_file._directions(M) for M in (A, B)))
    for a, i in enumerate((1, 2, 4, 8)):
        for b, j in enumerate((1, 2, 4, 8, 16, 32)):
            assert found[a][b] == pytest.approx(lc.phi(A, B, i, j), abs=6e-5)


def test_adapters_that_are_compared_begin_apart(folders: dict[str, str]) -> None:
    """With one seed the first rows of A at r = 64 are those at r = 8, and φ would be 1 before any training."""
    model, _ = lc.load_model(folders["encoder"], dtype="float32", labels=("a", "b"))
    A: list[Any] = []
    for rank, seed in ((4, 0), (16, 0), (16, subspace_file.APART)):
        a = lc.attach(model, lc.LoraSpec(targets=("q",), rank=rank), seed=seed)
        A.append(a.factors(next(iter(a.sites))).A.detach().clone())
        a.detach()
    assert torch.equal(A[0], A[1][:4]) and not torch.equal(A[0], A[2][:4])


@pytest.mark.parametrize("family", ["bert", "llama", "distilbert"])
def test_budgets_are_equal(family: str) -> None:
    model = make(family, torch.float32)
    specs = equal_specs(model)
    numbers = {n: lc.budget(model, s).factors for n, s in specs.items()}
    assert "q,v" in specs and max(numbers.values()) == numbers["q"]
    least_cost = max(s.out + s.in_ for s in lc.find_sites(model)) * 2
    assert all(numbers["q"] - n < least_cost for name, n in numbers.items() if name not in ("k", "v")), numbers


def test_all_scalings_are_one_in_the_middle() -> None:
    assert [spec_for(s, 8).scale() for s in ("α/r", "α/√r", "fixed")] == pytest.approx([2, 2, 2])
    assert [spec_for(s, 32).scale() for s in ("α/r", "α/√r", "fixed")] == pytest.approx([0.5, 1, 2])


def test_the_bottom_of_a_valley_is_found() -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    rows = [{"lr": lr, "loss": 1 + (math.log10(lr) + 2.3) ** 2} for lr in rates]
    assert best_rate(rows)[0] == pytest.approx(-2.3)
    assert best_rate([{"lr": lr, "loss": lr} for lr in rates])[0] == -4, "at the edge it is the edge"


def test_a_worse_answer_is_anothers() -> None:
    task = pairs(lc.load_task("restaurant", train=5, test=2))
    assert [r.rejected for r in task.train] == [r.completion for r in (*task.train[1:], task.train[0])]


# ---- the rules, on rows that were planted ----------------------------------------------------------------------------
def _noisy(mean: float, spread: float = 0.002) -> list[float]:
    return [mean - spread, mean, mean + spread]


def _rank_rows(one: list[float], most: list[float]) -> list[dict[str, Any]]:
    return [{"task": "sentiment", "rank": k, "seed": s, "accuracy": v, "loss": 1 - v, "base_loss": 2.0,
             "stable_rank": k**0.25} for k, vs in ((1, one), (8, most), (64, most))
            for s, v in enumerate(vs)]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "most", "wanted"),
    [
        (_noisy(0.90), _noisy(0.90), HOLDS),
        (_noisy(0.80), _noisy(0.90), NOT),
        ([0.7, 0.9, 0.95], [0.9, 0.8, 0.95], UNDECIDED),
    ],
)
def test_the_rule_of_rank(one: list[float], most: list[float], wanted: str) -> None:
    found, words = lc.find_experiment("rank").judge(_rank_rows(one, most))
    assert found == wanted and "r^0.25 ± 0.00" in words


def test_of_what_learnt_nothing_nothing_is_said() -> None:
    rows = [{**r, "base_loss": r["loss"]} for r in _rank_rows(_noisy(0.5), _noisy(0.5))]
    found, words = lc.find_experiment("rank").judge(rows)
    assert found == UNDECIDED and words.startswith("Training did not take")


def test_the_rule_of_which() -> None:
    def rows(**loss: float) -> list[dict[str, Any]]:
        return [{"targets": n.replace("_", ","), "seed": s, "loss": v, "base_loss": 2.0, "best": True, "trainable": 100}
                for n, x in loss.items() for s, v in enumerate(_noisy(x))]  # fmt: skip

    judge = lc.find_experiment("which").judge
    assert judge(rows(q=0.5, k=0.6, v=0.3, q_v=0.3, up=0.1))[0] == HOLDS, "the MLP is no part of the claim"
    assert judge(rows(q=0.5, k=0.6, v=0.2, q_v=0.3))[0] == PARTLY
    assert judge(rows(q=0.2, k=0.2, v=0.2, q_v=0.3))[0] == NOT


def test_the_rule_of_latency() -> None:
    def rows(merged: float, spread: float, one: float, many: float) -> list[dict[str, Any]]:
        wave = [spread * (-1) ** i * (i % 5) for i in range(20)]
        return [{"batch": b, "length": 8, "way": w, "ms": [100 * f + x * (w == "merged") for x in wave]}
                for b, layers in ((1, one), (16, many))
                for w, f in (("base", 1.0), ("merged", merged), ("unmerged", 1.2), ("bottleneck", layers))]  # fmt: skip

    judge = lc.find_experiment("latency").judge
    cases = ((1.0, 0.2, 1.3, 1.1), (1.2, 0.2, 1.0, 1.1), (1.02, 5.0, 1.3, 1.1), (1.0, 0.2, 1.1, 1.3))
    assert [judge(rows(*x))[0] for x in cases] == [HOLDS, NOT, UNDECIDED, PARTLY]
    said = judge(rows(1.0, 0.0, 1.3, 1.1))[1]
    assert "adapter layers 1.10 (1.10–1.10, at 16 × 8) to 1.30 (1.30–1.30, at 1 × 8)" in said, said


def test_the_rule_of_switch() -> None:
    def rows(ms: float, changed: float) -> list[dict[str, Any]]:
        ways = ("subtract and add", "restore exactly", "unmerged")
        return [{"way": w, "dtype": d, "switches": 20, "ms": [ms + i for i in range(19)], "load_ms": 100.0,
                 "bytes_kept": 0, "entries_changed": changed, "drift": changed}
                for w in ways for d in ("float32", "bfloat16")]  # fmt: skip

    judge = lc.find_experiment("switch").judge
    found = [judge(rows(*x))[0] for x in ((5, 0.0), (5, 0.1), (200, 0.1), (90, 0.1))]
    assert found == [HOLDS, PARTLY, NOT, UNDECIDED]


def test_the_rule_of_amplify_and_its_random_column(folders: dict[str, str]) -> None:
    rows = [r for r in lc.run_experiment("amplify", _lab(folders, seeds=range(6))).rows if r["rank"] > 4]
    random, formula = (np.mean([r[c] for r in rows]) for c in ("of_random", "random_formula"))
    assert random == pytest.approx(formula, rel=0.05), "‖UᵀWV‖ of random directions is r·‖W‖/√(out·in)"
    for r in rows:
        assert r["amplification"] == pytest.approx(r["norm_delta"] / r["of_delta"])
