"""The experiments on the compared methods: what is trained at which rate, and the rules on rows that were planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_core as lc
from lora_core.experiments import methods as methods_file
from lora_core.experiments import rivals as rivals_file
from lora_core.experiments.experiment import HOLDS, NOT, PARTLY, UNDECIDED
from lora_core.experiments.methods import EQUAL, RATES, SIZED, TRIED, front
from lora_core.experiments.rivals import Rival, compare
from lora_core.methods import METHODS, method_spec
from tests.model_folder import tiny_bert


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lc.Lab:
    torch.set_num_threads(1)
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    lab = lc.Lab(quick=False, steps=2, seeds=(0, 1), encoder=str(tiny_bert(tmp_path / "bert")))
    lab.begin(lc.find_experiment("methods"))
    return lab


def test_each_runs_at_the_rate_that_was_best_on_another_seed(lab: lc.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"lora": 1e-3, "bottleneck": 1e-2}
    asked: list[tuple[int, float, tuple[str, ...]]] = []

    def train(lab: lc.Lab, group: Any, seed: int, lr: float, steps: int, part: Any) -> dict[str, Any]:
        asked.append((seed, lr, tuple(group)))
        return {n: {"loss": abs(lr - best[n]), "accuracy": 0.5, "base_loss": 1.0, "train_loss": 0.0, "trainable": 1}
                for n in group}  # fmt: skip

    monkeypatch.setattr(rivals_file, "_train", train)
    rivals = {n: Rival(method_spec(n), rates, {"method": n})
              for n, rates in (("lora", (1e-4, 1e-3, 1e-2)), ("bottleneck", (1e-3, 1e-2)))}  # fmt: skip
    rows = compare(lab, lambda: rivals, (1e-4, 1e-3, 1e-2), 2)
    assert {(r["method"], r["seed"]): (r["lr"], r["edge"]) for r in rows} == {
        ("lora", 0): (1e-3, False), ("lora", 1): (1e-3, False),
        ("bottleneck", 0): (1e-2, True), ("bottleneck", 1): (1e-2, True)}  # fmt: skip
    tuned = [(lr, names) for seed, lr, names in asked if seed not in lab.seeds]
    assert tuned == [(1e-4, ("lora",)), (1e-3, ("lora", "bottleneck")), (1e-2, ("lora", "bottleneck"))]


def test_what_is_compared_has_equal_numbers(lab: lc.Lab) -> None:
    rivals = methods_file.rivals(lab)
    assert {r.says["method"] for r in rivals.values()} == set(METHODS)
    assert all(r.rates == TRIED[r.says["method"]] and set(r.rates) <= set(RATES) for r in rivals.values())
    model, _ = lab.encoder()
    wanted = lc.budget(model, method_spec("lora", EQUAL)).trainable
    for r in rivals.values():
        if r.says["budget"] == EQUAL:
            one = lc.budget(model, method_spec(r.says["method"], 1)).trainable
            assert abs(lc.budget(model, r.spec).trainable - wanted) <= one / 2, r.says
    assert {n for n, r in rivals.items() if r.alone} == {"full"}


def test_a_heads_numbers_are_not_counted(lab: lc.Lab) -> None:
    model, _ = lab.encoder()
    rivals = {n: Rival(method_spec(n), (1e-3,), {}) for n in ("lora", "full")}
    rows = rivals_file._train(lab, rivals, 0, 1e-3, 2, (0.0, 1.0))
    assert rows["lora"]["trainable"] == lc.budget(model, method_spec("lora")).trainable
    assert rows["full"]["trainable"] == sum(p.numel() for p in model.parameters())


# ---- the rules -------------------------------------------------------------------------------------------------------
def _noisy(mean: float, spread: float = 0.002) -> list[float]:
    return [mean - spread, mean, mean + spread]


def _methods(**loss: float) -> list[dict[str, Any]]:
    cost = {"full": 1000, "bitfit": 20, "bottleneck": 30, "prefix": 28, "lora": 29, "lora-prefix": 31}
    return [{"method": n, "budget": EQUAL if n in SIZED else None, "size": None, "seed": s, "loss": v,
             "base_loss": 1.0, "trainable": cost[n]} for n, x in ((k.replace("_", "-"), v) for k, v in loss.items())
            for s, v in enumerate(_noisy(x))]  # fmt: skip


def test_the_rule_of_methods() -> None:
    judge = lc.find_experiment("methods").judge
    others = {"bitfit": 0.5, "bottleneck": 0.31, "prefix": 0.4, "lora_prefix": 0.3}
    found, words = judge(_methods(full=0.3, lora=0.3, **others))
    assert found == HOLDS and "full fine-tuning 0.300 ± 0.005 (1,000)" in words
    assert judge(_methods(full=0.1, lora=0.3, **others))[0] == PARTLY
    assert judge(_methods(full=0.1, lora=0.3, **{**others, "bottleneck": 0.2}))[0] == NOT
    assert judge(_methods(full=0.3, lora=0.99, **others))[0] == UNDECIDED, "it has not learnt"
    wide = _methods(full=0.3, lora=0.3, **others)
    for r, v in zip([r for r in wide if r["method"] == "full"], (0.0, 0.3, 0.6)):
        r["loss"] = v
    assert judge(wide)[0] == UNDECIDED


def test_the_front_is_what_no_other_beats() -> None:
    rows = _methods(full=0.25, lora=0.3, bitfit=0.5, bottleneck=0.31, prefix=0.6)
    assert [n for n, _, _ in front(rows)] == ["bitfit", "lora", "full"]


@pytest.mark.parametrize(
    ("one", "top", "wanted"), [(0.4, 0.305, HOLDS), (0.3, 0.3, HOLDS), (0.5, 0.4, PARTLY), (0.3, 0.5, NOT)]
)
def test_the_rule_of_generalises(one: float, top: float, wanted: str) -> None:
    def rows(kind: str, size: int | None, loss: float) -> list[dict[str, Any]]:
        return [{"kind": kind, "size": size, "seed": s, "loss": v, "train_loss": v, "base_loss": 1.0}
                for s, v in enumerate(_noisy(loss))]  # fmt: skip

    found, words = lc.find_experiment("generalises").judge([
        *rows("full", None, 0.3), *rows("lora", 1, one), *rows("lora", 384, top), *rows("bottleneck", 64, 0.3),
        *rows("prefix", 16, 0.5)])  # fmt: skip
    assert found == wanted and "at rank 384" in words and "a prefix of 16 tokens 0.200" in words
