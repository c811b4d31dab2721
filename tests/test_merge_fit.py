"""How two adapters fit together, against dense matrices and the functions of section 7.2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import filled, tiny

import lora_core as lc


def test_angles_norms_and_cosines_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float64)
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=3), name="a"), seed=1)
    b = filled(lc.attach(model, lc.LoraSpec(targets=("v", "o"), rank=5), name="b"), seed=2)
    for x in (a, b):
        x.save(tmp_path / x.name)
    fit = lc.merge_fit(lc.read_adapter(tmp_path / "a"), lc.read_adapter(tmp_path / "b"))
    assert fit.alone == (2, 2) and [p.key for p in fit.pairs] == [k for k in a.sites if k in b.sites]
    dense = {x.name: {k: d.double().dense().numpy() for k, d in x.deltas().items()} for x in (a, b)}
    inner = 0.0
    for p in fit.pairs:
        one, two = dense["a"][p.key], dense["b"][p.key]
        assert p.norms == pytest.approx((np.linalg.norm(one), np.linalg.norm(two)), rel=1e-6)
        inner += (one * two).sum()
        assert p.cosine == pytest.approx((one * two).sum() / (p.norms[0] * p.norms[1]), abs=1e-7)
        for n, i in zip((one, two), (p.i, p.j), strict=True):
            e = np.cumsum(np.linalg.svd(n, compute_uv=False) ** 2)
            assert e[i - 1] >= 0.9 * e[-1] > (e[i - 2] if i > 1 else 0)
        assert p.reads == pytest.approx(lc.phi(one, two, p.i, p.j), abs=1e-6)
        assert p.writes == pytest.approx(lc.phi(one.T, two.T, p.i, p.j), abs=1e-6)
        assert p.chance_reads == max(p.i, p.j) / 32 and p.chance_writes == max(p.i, p.j) / 16
    sizes = [np.sqrt(sum((m**2).sum() for m in dense[n].values())) for n in "ab"]
    assert fit.norms == pytest.approx(sizes) and fit.cosine == pytest.approx(inner / (sizes[0] * sizes[1]), abs=1e-7)
    assert fit.reads == pytest.approx(np.mean([p.reads for p in fit.pairs]))


def test_an_adapter_beside_itself_its_opposite_and_another_model(tmp_path: Path) -> None:
    model = tiny("llama")
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q",), rank=2), name="a"))
    a.save(tmp_path / "a")
    one = lc.read_adapter(tmp_path / "a")
    same = lc.merge_fit(one, one)
    assert same.cosine == pytest.approx(1) and same.reads == pytest.approx(1)
    assert same.pairs[0].angle == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for k in a.sites:
            a.factors(k).B.neg_()
    a.save(tmp_path / "b")
    assert lc.merge_fit(one, lc.read_adapter(tmp_path / "b")).cosine == pytest.approx(-1)
    lc.attach(tiny("llama"), lc.LoraSpec(targets=("q",), rank=2), name="z").save(tmp_path / "z")
    zero = lc.merge_fit(one, lc.read_adapter(tmp_path / "z"))
    assert zero.cosine == 0 and zero.reads == 0 and zero.norms[1] == 0
    s = one.sites[next(iter(one.sites))]
    wrong = type(one)(**{**vars(one), "sites": {s.key: type(s)(**{**vars(s), "A": np.ones((2, 7))})}})
    with pytest.raises(lc.UserError, match="of different models"):
        lc.merge_fit(one, wrong)
