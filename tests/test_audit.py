"""How much of each rank is used: against planted spectra, noise, gradience's numbers, and measured losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import filled, tiny

import lora_core as lc
from lora_core.audit import _core, noise_edge, noise_quotient
from lora_core.registry import book_of
from lora_core.spectra import batched_singular_values
from lora_core.tasks import Row
from tests.tokenizer_fixture import tiny_tokenizer

RECORDED = Path(__file__).parents[1] / "app" / "recorded" / "adapter"


def planted(sigma: list[list[float]], alpha: float = 8.0, **spec: Any) -> lc.Adapter:
    """An adapter of the MLP's matrices (48×32) with these singular values of ΔW, one list a matrix."""
    model, r = tiny("llama"), len(sigma[0])
    keys = tuple(f"model.layers.{i // 2}.mlp.{('gate', 'up')[i % 2]}_proj" for i in range(len(sigma)))
    a = lc.attach(model, lc.LoraSpec(targets=keys, rank=r, alpha=alpha, **spec))
    g = np.random.default_rng(3)
    with torch.no_grad():
        for key, s in zip(keys, sigma, strict=True):
            U, V = (np.linalg.qr(g.standard_normal((n, r)))[0] for n in (48, 32))
            a.factors(key).B.copy_(torch.tensor(U * s / a.factors(key).scaling))
            a.factors(key).A.copy_(torch.tensor(V.T))
    return a


def test_planted_spectra_and_their_words(tmp_path: Path) -> None:
    a = planted([[3.0, 2.0, 1.0, 0.02], [5.0, 0.1, 0.1, 0.1], [1e-4, 1e-4, 1e-4, 1e-4], [1.0, 1.0, 1.0, 1.0]])
    one, two, three, four = (found := lc.audit(a)).matrices
    assert (one.rank, one.energy_rank_90, one.energy_rank_95, one.energy_rank_99) == (4, 2, 3, 3)
    assert one.stable_rank == pytest.approx(14.0004 / 9, rel=1e-5) and one.norm == pytest.approx(14.0004**0.5)
    assert one.utilization == pytest.approx(one.stable_rank / 4) and one.used == 0.75 and one.mp_rank == 1
    assert (one.shape, one.target, one.layer) == ((48, 32), "gate", 0)
    assert [m.word for m in found.matrices] == ["partly used", "collapsed", "dead", "full"]
    assert two.mp_rank == 1 and four.mp_rank == 0, "an even spectrum has nothing that stands out"
    assert three.energy_rank_99 == 4
    total = 14.0004 + 25.03 + 4e-8 + 4
    kept = [0, (9 + 25 + 1) / total, (9 + 4 + 25.01 + 2) / total, (14 + 25.02 + 3) / total, 1]
    np.testing.assert_allclose(found.kept_energy, kept, rtol=1e-5)
    assert found.suggested_rank == 3 and kept[2] < 0.95 <= kept[3]
    a.save(tmp_path)
    again = lc.audit(lc.read_adapter(tmp_path))
    assert again.suggested_rank == 3 and [m.to_dict().keys() for m in again.matrices]
    np.testing.assert_allclose([m.norm for m in again.matrices], [m.norm for m in found.matrices], rtol=1e-6)


def test_an_untrained_adapter_and_a_single_direction() -> None:
    fresh = lc.audit(lc.attach(tiny("llama"), lc.LoraSpec(rank=4)))
    assert fresh.suggested_rank == 0 and {m.word for m in fresh.matrices} == {"dead"}
    assert all(m.energy_rank_95 == m.mp_rank == 0 == m.mp_edge for m in fresh.matrices)
    single = lc.audit(planted([[2.0], [1.0]]))
    assert all((m.mp_edge, m.mp_rank, m.word) == (None, 1, "full") for m in single.matrices)
    assert single.suggested_rank == 1
    norms = lc.attach(tiny("llama"), lc.LoraSpec(targets=("norm",)))
    with pytest.raises(lc.UserError, match="no low-rank updates"):
        lc.audit(norms)


def test_dora_is_looked_at_without_its_magnitudes(tmp_path: Path) -> None:
    a = planted([[3.0, 2.0, 1.0]], dora=True)
    a.save(tmp_path)
    for found in (lc.audit(a), lc.audit(lc.read_adapter(tmp_path))):
        np.testing.assert_allclose(found.matrices[0].singular_values, [3, 2, 1], rtol=1e-5)


# ---- noise -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("out", "in_", "r"), [(576, 192, 8), (100, 60, 16), (64, 64, 32), (12, 40, 20), (50, 50, 2)])
def test_noise_is_below_its_edge(out: int, in_: int, r: int) -> None:
    """Of pure noise, drawn as whole matrices, about one in twenty has a direction above the edge."""
    g = np.random.default_rng(1)
    above = 0
    draws = {str(i): (g.standard_normal((out, r)), 3.0 * g.standard_normal((r, in_)), 0.1) for i in range(200)}
    for s in batched_singular_values(draws).values():
        above += int(s[0] > (noise_edge(s, out, in_, r) or 0))
    assert above <= 24, f"{above} of 200; 10 are expected, more than 24 once in 30,000 times"


@pytest.mark.parametrize(("r", "k"), [(8, 0), (8, 1), (8, 3), (16, 5), (64, 10)])
def test_planted_directions_in_noise_are_counted(r: int, k: int) -> None:
    """k directions of three times the size of the noise's largest, r − k of noise."""
    g = np.random.default_rng(k + r)
    right = 0
    for _ in range(10):
        core = np.linalg.svd(g.standard_normal((300, r)) @ g.standard_normal((r, 200)), compute_uv=False)[: r - k]
        s = np.concatenate([3 * core[0] * np.linspace(2, 1, k), core])
        right += int((s > (noise_edge(s, 300, 200, r) or 0)).sum() == k)
    assert right >= 8


def test_the_edge_is_that_of_marchenko_and_pastur() -> None:
    """The law of R, and for large matrices the edge of the product of two Marchenko–Pastur laws."""
    g = np.random.default_rng(0)
    R = _core(g, 4000, 9, 4)
    np.testing.assert_allclose((R.transpose(0, 2, 1) @ R).mean(0), 9 * np.eye(4), atol=0.3)
    assert (np.tril(R, -1) == 0).all() and _core(g, 5, 3, 6).shape == (5, 3, 6)
    z = np.linspace(0.01, 30, 100_000)
    for out, in_, r in ((512, 512, 128), (1024, 256, 128)):
        s = np.linalg.svd(_core(g, 4, out, r) @ _core(g, 4, in_, r).transpose(0, 2, 1), compute_uv=False)
        edge = np.sqrt(((1 + z) * (1 + z * r / out) * (1 + z * r / in_) / z).min())
        size = np.sqrt((s**2).mean(1))
        assert (s[:, 0] / size).mean() == pytest.approx(edge, rel=0.03)
        assert noise_quotient(out, in_, r) == pytest.approx(edge * (size / np.median(s, 1)).mean(), rel=0.05)
    assert noise_quotient(10**6, 10**6, 4) == pytest.approx(1, abs=0.01), "thin factors are orthogonal"


# ---- another tool's numbers --------------------------------------------------------------------------------------
def test_gradience_has_the_same_numbers() -> None:
    """`gradience audit` 0.11.0 on the shipped adapter: (stable rank, energy ranks 90/95/99, ‖ΔW‖_F, ‖ΔW‖₂)."""
    theirs = {
        "model.layers.0.self_attn.q_proj": (1.7170464625980821, (3, 4, 7), 3.0872054644310527, 2.355995793449665),
        "model.layers.0.self_attn.v_proj": (1.8506581933892259, (3, 4, 7), 1.366416261049484, 1.0044305526233823),
        "model.layers.1.self_attn.q_proj": (1.4154281732364808, (2, 4, 6), 3.488045760445499, 2.931826432806057),
        "model.layers.1.self_attn.v_proj": (1.7712651251105458, (3, 4, 5), 1.4001530395872026, 1.0520435586611359),
        "model.layers.9.self_attn.q_proj": (1.9282134751937707, (3, 3, 7), 2.9662313944529686, 2.136128972119548),
        "model.layers.9.self_attn.v_proj": (1.1145252288535286, (2, 2, 4), 1.645534791516981, 1.558698498723353),
    }
    ours = {m.path: m for m in lc.audit(lc.read_adapter(RECORDED)).matrices}
    for path, (stable, energies, norm, top) in theirs.items():
        m = ours[path]
        assert (m.energy_rank_90, m.energy_rank_95, m.energy_rank_99) == energies
        np.testing.assert_allclose((m.stable_rank, m.utilization, m.norm, m.singular_values[0]),
                                   (stable, stable / 8, norm, top), rtol=1e-9)  # fmt: skip


def test_needs_no_torch() -> None:
    code = ("import sys, lora_core as lc; a = lc.audit(lc.read_adapter(sys.argv[1]));"
            "assert len(a.matrices) == 60 and not {'torch', 'transformers'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(RECORDED)], check=True)


# ---- measured ----------------------------------------------------------------------------------------------------
ROWS = tuple(Row(f"name : Place {i}", f"Place {i} serves good food.") for i in range(12))


def taught(rank: int, steps: int = 25, **spec: Any) -> tuple[lc.Adapter, Any]:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    a = lc.attach(model, lc.LoraSpec(rank=rank, alpha=2 * rank, **spec), name="taught")
    task = lc.Task(name="t", about="", train=ROWS, test=ROWS, score_name="", scorer=lambda *_: {})
    if steps:
        for _ in lc.train(a, task, lc.TrainConfig(steps=steps, batch_size=6, lr=0.02), tokenizer=tokenizer):
            pass
    return a, tokenizer


def test_cuts_are_measured_as_by_hand() -> None:
    a, tokenizer = taught(6, targets=("q", "v", "norm"))
    told: list[int] = []
    found = lc.measure_cuts(a, lambda x: lc.CausalLM(x.model, tokenizer, "{prompt} ->"), ROWS,
                            tell=lambda k, loss: told.append(k))  # fmt: skip
    assert {0, 1, 2, 4, 6} <= set(found.cuts) == set(told) and list(found.cuts) == sorted(found.cuts)
    by_hand = lc.evaluate(a.model, tokenizer, ROWS, adapters=[None, "taught"])
    assert found.base["loss"] == pytest.approx(by_hand[None].loss, rel=1e-5)
    assert found.cuts[6]["loss"] == pytest.approx(by_hand["taught"].loss, rel=1e-5)
    assert found.gain == pytest.approx(by_hand[None].loss - by_hand["taught"].loss, rel=1e-4)
    assert found.cuts[0]["loss"] != found.base["loss"], "the norms are trained too"
    kept = {k: found.base["loss"] - v["loss"] for k, v in found.cuts.items()}
    assert found.suggested_rank == min(k for k, v in kept.items() if v >= 0.99 * found.gain)
    assert found.suggested_rank - 1 in found.cuts or found.suggested_rank == 0
    assert list(book_of(a.model).adapters) == ["taught"] and a.on, "what was attached for it is gone"
    with torch.no_grad():
        deltas = a.deltas()
        for k, d in deltas.items():
            f = a.factors(k)
            t = d.truncate(2)
            f.A.zero_()
            f.B.zero_()
            f.A[:2], f.B[:, :2] = t.A, t.B / f.scaling
    assert lc.evaluate(a.model, tokenizer, ROWS, adapters=["taught"])["taught"].loss == pytest.approx(
        found.cuts[2]["loss"], rel=1e-5)  # fmt: skip


def test_cuts_of_a_useless_adapter_and_of_none() -> None:
    a, tokenizer = taught(4, steps=0)
    filled(a, std=0.5)

    def objective(x: lc.Adapter) -> lc.CausalLM:
        return lc.CausalLM(x.model, tokenizer, "{prompt} ->")

    found = lc.measure_cuts(a, objective, ROWS)
    assert found.gain < 0 and found.suggested_rank == 0 and found.cuts[0] == found.base
    with pytest.raises(lc.UserError, match="no held-out rows"):
        lc.measure_cuts(a, objective, [])
    norms = lc.attach(tiny("llama"), lc.LoraSpec(targets=("norm",)))
    with pytest.raises(lc.UserError, match="no low-rank updates"):
        lc.measure_cuts(norms, objective, ROWS)


@given(st.integers(0, 6), st.integers(1, 6), st.floats(0.0, 0.9))
@settings(max_examples=25, deadline=None)
def test_the_least_rank_is_found_by_halving(least: int, most: int, short: float) -> None:
    """With a loss that falls with k, the suggestion is the first k within 1 % of the gain, as if all were measured."""
    least = min(least, most)
    a = planted([[float(most - i) for i in range(most)]])

    class Stub:
        name, model = "stub", a.model

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def encode(self, rows: Any) -> list[str]:
            return ["x"]

        def batch(self, items: Any) -> Any:
            return type("B", (), {"labelled": 1})()

        def sums(self, batch: Any) -> dict[str, float]:
            on = [b for b in book_of(a.model).adapters.values() if b.on]
            k = self.rank if on else 0
            return {"loss": 3.0 if k == 0 and least else 1.0 if k >= least else 3.0 - short * k / most}

    found = lc.measure_cuts(a, lambda x: Stub(max(int(f.B.any(0).sum()) for f in x._factors.values())), [ROWS[0]])  # type: ignore[arg-type,return-value]
    assert found.suggested_rank == least and found.cuts[least]["loss"] == (1.0 if least else found.base["loss"])
