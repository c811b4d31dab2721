"""choose, forget and truncate: their scores against closed forms, their rules on planted rows, and a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_core as lc
from lora_core.experiments import choose, forget
from lora_core.experiments.experiment import HOLDS, NOT, PARTLY, UNDECIDED
from lora_core.experiments.inputs import RIDGE, directions, gradients, inputs, root
from lora_core.experiments.training import warm_head
from tests.model_folder import tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("models")
    return {"encoder": str(tiny_bert(where / "bert")), "writer": str(tiny_llama(where / "llama"))}


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("lora_core.machine.measure", lambda dtype, on="cpu": 1e11)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- scores, in float64 --------------------------------------------------------------------------------------------
def test_nfn_is_one_for_noise_and_knows_what_w_is_made_for() -> None:
    W, noise = _random(0, 30, 40), _random(1, 4000, 40)
    assert choose.nfn(W, _random(2, 4000, 40), noise) == pytest.approx(1, abs=0.02)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    X = Vh[:1].expand(4000, 40) * 3
    assert choose.nfn(W, X, noise) == pytest.approx(float(S[0] / (W.norm() / 40**0.5)), rel=0.03)
    assert choose.nfn(5 * W, 7 * X, noise) == pytest.approx(choose.nfn(W, X, noise)), "sizes do not matter"


def test_condition_and_explained_have_closed_forms() -> None:
    Q = torch.linalg.qr(_random(3, 50, 6))[0]
    P = torch.linalg.qr(_random(4, 6, 6))[0]
    s = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    X = Q * s @ P.T
    assert choose.condition(X) == pytest.approx(16)
    assert choose.explained(X, 2) == pytest.approx(80 / 86.25) and choose.explained(X, 6) == pytest.approx(1)


@given(st.lists(st.integers(0, 5), min_size=3, max_size=12), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_spearman_is_scipys(values: list[int], seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    other = np.random.default_rng(seed).integers(0, 4, len(values)).tolist()
    assert choose.ranks(values).tolist() == stats.rankdata(values).tolist()
    if len(set(values)) > 1 and len(set(other)) > 1:
        assert choose.spearman(values, other) == pytest.approx(stats.spearmanr(values, other).statistic)
    else:
        assert choose.spearman(values, other) == 0


def test_gradients_and_inputs_are_autograds(folders: dict[str, str]) -> None:
    model, tokenizer = lc.load_model(folders["encoder"], dtype="float32", labels=("negative", "positive"))
    goal = lc.Classification(model, tokenizer)
    rows = lc.load_task("sentiment", train=5, test=1).train
    sites = [s for s in lc.find_sites(model) if s.target in ("q", "up")]
    model.requires_grad_(False)
    found, X = gradients(goal, sites, rows), inputs(goal, sites, rows)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters()), "the model is as it was"
    tokens = sum(map(len, goal.encode(rows)))
    for s in sites:
        assert found[s.key].shape == (s.out, s.in_) and X[s.path].shape == (tokens, s.in_)
        W = model.get_submodule(s.path).weight.requires_grad_(True)
        loss = sum(goal.loss(goal.batch([e])) for e in goal.encode(rows)) / len(rows)
        (want,) = torch.autograd.grad(loss, W)  # pyright: ignore
        W.requires_grad_(False)
        assert torch.allclose(found[s.key].float(), want, atol=1e-6)


def test_a_weighted_cut_is_the_best_on_the_inputs() -> None:
    D, X = _random(5, 12, 20), _random(6, 300, 20) * torch.logspace(0, -2, 20, dtype=torch.float64)
    B, A = directions(D)
    assert torch.allclose(B @ A, D)
    roots = root(X)
    weighted, plain = directions(D, roots), (B, A)
    assert torch.allclose(weighted[0] @ weighted[1], D)
    assert torch.allclose(roots[0] @ roots[1], torch.eye(20, dtype=torch.float64), atol=1e-9)
    C = X.T @ X / len(X)
    C = C + RIDGE * torch.linalg.eigvalsh(C).mean() * torch.eye(20, dtype=torch.float64)

    def off(k: int, of: tuple[torch.Tensor, torch.Tensor]) -> float:
        E = D - of[0][:, :k] @ of[1][:k]
        return float(torch.trace(E @ C @ E.T))

    for k in (1, 3, 8):
        least = float((torch.linalg.svdvals(D @ roots[0])[k:] ** 2).sum())  # Eckart–Young
        assert off(k, weighted) == pytest.approx(least) and off(k, plain) > 1.05 * least


def test_intruders_are_planted_and_found() -> None:
    W, u, v = _random(7, 256, 256), _random(8, 256), _random(9, 256)
    U0, S0, _ = torch.linalg.svd(W)
    assert forget.intruders(U0, U0, S0) == (0, 0.0), "without an update there are none"
    D = 3 * S0[0] * torch.outer(u / u.norm(), v / v.norm())
    U, S, _ = torch.linalg.svd(W + D)
    count, energy = forget.intruders(U0, U, S)
    assert count == 1 and energy == pytest.approx(float(S[0] ** 2 / (S**2).sum()))
    own = 3 * S0[0] * torch.outer(U0[:, 40], v / v.norm())
    U, S, _ = torch.linalg.svd(W + own)
    assert abs(float(U[:, 0] @ U0[:, 40])) > 0.9, "a direction of W's own that becomes louder is none"
    assert forget.intruders(U0, U[:, :1], S[:1])[0] == 0


# ---- groups and the head -------------------------------------------------------------------------------------------
def test_groups_are_all_matrices_once_at_equal_cost(folders: dict[str, str]) -> None:
    model, _ = lc.load_model(folders["encoder"], dtype="float32", labels=("a", "b"))
    for parts in (1, 2):
        found = choose.groups(model, parts)
        keys = [s.key for mine in found.values() for s in mine]
        assert sorted(keys) == sorted({s.key for s in lc.find_sites(model) if s.target in choose.KINDS})
        specs = choose.equal_specs(found)
        costs = {g: lc.budget(model, s).factors for g, s in specs.items()}
        assert max(costs.values()) == costs["q" if parts == 1 else "q low"]
        for g, mine in found.items():
            assert max(costs.values()) - costs[g] < sum(s.out + s.in_ for s in mine), "not one rank more would fit"


def test_a_head_is_fitted_and_put_back(folders: dict[str, str]) -> None:
    model, tokenizer = lc.load_model(folders["encoder"], dtype="float32", labels=("negative", "positive"))
    goal = lc.Classification(model, tokenizer)
    task = lc.load_task("sentiment", train=64, test=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cold = lc.measure(goal, task.train)[None]["loss"]
    with warm_head(lc.Lab(), goal, task.train):
        assert lc.measure(goal, task.train)[None]["loss"] < cold
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed and all("classifier" in k for k in changed)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- the rules of the verdicts, on planted rows --------------------------------------------------------------------
def _choose_rows(loss: Sequence[float], score: Sequence[float], spread: float = 0.002) -> list[dict[str, Any]]:
    kinds = ("q", "k", "v", "o", "up", "down")
    rows: list[dict[str, Any]] = [{"kind": "score", "group": g, "rule": rule, "score": (v if rule == "gradient" else 1)}
                                  for g, v in zip(kinds, score) for rule in choose.RULES]  # fmt: skip
    return rows + [{"kind": "loss", "group": g, "seed": s, "base_loss": 2.0, "best": True, "loss": v + spread * (s - 1)}
                   for g, v in zip(kinds, loss) for s in range(3)]  # fmt: skip


def test_the_rule_of_choose() -> None:
    judge = lc.find_experiment("choose").judge
    loss = [0.5, 0.6, 0.3, 0.4, 0.2, 0.1]
    found, words = judge(_choose_rows(loss, [-v for v in loss]))
    assert found == HOLDS and "the gradient's norm 1.00 ± 0.00" in words and "down is the best group" in words
    assert judge(_choose_rows(loss, loss))[0] == NOT, "the wrong way round"
    assert judge(_choose_rows([0.1, 0.6, 0.1, 0.4, 0.5, 0.3], [3, 0, 1, 3, 0, 3]))[0] == PARTLY, "behind q and v"
    assert judge(_choose_rows([2.0] * 6, loss))[0] == UNDECIDED


def _forget_rows(lora: tuple[float, float], full: tuple[float, float], spread: float = 0.01) -> list[dict[str, Any]]:
    return [{"kind": "loss", "method": m, "seed": s, "task_before": 3.0, "task_after": 3.0 - gain + spread * s,
             "other_before": 4.0, "other_after": 4.0 + rise + spread * (s == 1)} for m, (gain, rise) in
            (("LoRA", lora), ("full", full)) for s in range(3)] + [
        {"kind": "intruders", "method": m, "seed": s, "intruders": 2, "random": 1, "energy": 0.1, "size": 0.01}
        for m in ("LoRA", "full") for s in range(3)]  # fmt: skip


def test_the_rule_of_forget() -> None:
    judge = lc.find_experiment("forget").judge
    assert judge(_forget_rows((1.0, 0.1), (1.5, 0.5)))[0] == HOLDS
    assert judge(_forget_rows((1.5, 0.1), (1.0, 0.5)))[0] == PARTLY
    assert judge(_forget_rows((1.5, 0.5), (1.0, 0.1)))[0] == NOT
    assert judge(_forget_rows((0.0, 0.5), (1.0, 0.1)))[1].startswith("Training did not take")


def test_a_cut_to_all_directions_does_what_it_did(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("lora_core.experiments.truncate.KS", (1, 8, 64))
    rows = lc.run_experiment("truncate", lc.Lab(quick=True, steps=3, seeds=(0,), encoder=folders["encoder"])).rows
    for kind in ("cut", "full cut"):
        mine = {r["k"]: r["loss"] for r in rows if r["kind"] == kind}
        assert mine[64] == pytest.approx(mine[max(k for k in mine if k != 64) if kind == "cut" else -1], abs=1e-5)
        weighted = {r["k"]: r["loss"] for r in rows if r["kind"] == f"{kind}, weighted"}
        assert weighted[64] == pytest.approx(mine[64], abs=1e-5) and set(weighted) == {1, 8, 64}
