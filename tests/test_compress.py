"""Smaller adapters: the best cut, in a file that both libraries read, for each of the three ways to say how small."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from test_placements import parts_of, stirred
from tiny import filled, targets_of, tiny
from zoo import make, out

import lora_core as lc
from lora_core.adapter import put_on
from lora_core.allocate import allocate
from lora_core.compress import Plan
from lora_core.cut_open import _qr

TIED = "llama, tied, with biases"


def cut_by_hand(model: Any, a: lc.Adapter, ranks: dict[str, int]) -> lc.Adapter:
    """The same adapter with every s·B·A cut by Delta.truncate, attached in its place."""
    tensors, magnitudes = {}, {}
    for key, k in ranks.items():
        f = a.factors(key)
        B, A = f.factored()
        d = lc.Delta(B, A, f.scaling).truncate(k)
        tensors[key] = (d.A, d.B, 1.0) if k else (A[:1] * 0, B[:, :1] * 0, 1.0)
        if f.m is not None:
            magnitudes[key] = f.m.detach()
    copies = {n: c.detach() for n, c in a.copies.items()}
    a.enable(False)
    return put_on(model, replace(a.spec, mask=0.0), "cut", [*a.sites.values()], tensors, magnitudes, copies)


def by_peft(model: Any, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or an unexpected key is one
        warnings.filterwarnings("ignore", message="(?!.*(missing|unexpected)).*")
        return out(PeftModel.from_pretrained(model, str(folder)).eval())


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "q and v": ("llama", {"targets": ("q", "v")}, {"rank": 2}),
    "in the square root, by energy": ("llama", {"scaling": "alpha/sqrt(r)", "alpha": 5.0}, {"energy": 0.8}),
    "fused slices": ("gpt2", {"targets": ("q", "v", "o")}, {"energy": 0.5}),
    "fused slices by size": ("gpt_neox", {"targets": ("q", "k", "down")}, {"mb": 0.004}),
    "everything": ("llama", {"targets": "all"}, {"rank": 1}),
    "everything, tied": (TIED, {"targets": "all"}, {"mb": 0.012}),
    "experts": ("mixtral", {"targets": ("gate", "up", "down", "q")}, {"rank": 2}),
    "experts by energy": ("mixtral", {"targets": ("gate", "up", "down")}, {"energy": 0.7}),
    "experts by size": ("mixtral", {"targets": ("gate", "up", "down", "q")}, {"mb": 0.008}),
    "a shared expert": ("qwen2_moe", {"targets": ("gate", "down", "q")}, {"energy": 0.6}),
    "DoRA": ("llama", {"targets": ("q", "down"), "dora": True}, {"rank": 1}),
    "DoRA of slices": ("gpt2", {"targets": ("q", "v"), "dora": True}, {"energy": 0.4}),
    "DoRA by size": ("llama", {"targets": ("q", "down"), "dora": True}, {"mb": 0.005}),
    "a classifier": ("bert", {"targets": ("q", "v"), "full": ("head",)}, {"rank": 1}),
    "a classifier's head alone": ("bert", {"targets": ("q", "v"), "full": ("head",)}, {"rank": 0}),
    "norms and biases, one layer": ("gpt2", {"targets": ("q", "norm", "bias"), "layers": (1,)}, {"energy": 0.5}),
    "PiSSA": ("llama", {"init": "pissa"}, {"rank": 4}),
    "a mask": ("llama", {"mask": 0.1}, {"rank": 2}),
    "unlike ranks": ("llama", {"targets": ("q", "v", "down"), "rank_pattern": {"q": 2}}, {"rank": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cut_is_the_best_one_and_both_libraries_read_it(case: str, tmp_path: Path) -> None:
    name, how, size = CASES[case]
    model = make(name, torch.float32)
    if how.get("targets") == "all":
        how = {**how, "targets": (*targets_of(model), *parts_of(model))}
    a = stirred(lc.attach(model, lc.LoraSpec(**{"rank": 4, "alpha": 6.0, **how})))
    a.save(tmp_path / "whole", info={"model": "tiny", "loss": 1.5})
    result = lc.compress(tmp_path / "whole", tmp_path / "cut", **size)
    check(result, a, tmp_path / "whole", tmp_path / "cut", size)
    b = cut_by_hand(model, a, result.ranks)
    want = out(model)
    again = make(name, torch.float32)
    c = lc.load_adapter(again, tmp_path / "cut")
    torch.testing.assert_close(out(again), want, rtol=0, atol=2e-5)
    left = {k: n for k, n in result.ranks.items() if n}
    assert list(c.sites) == list(left) and {k: f.A.shape[0] for k, f in c._factors.items()} == left
    assert list(c.copies) == list(b.copies)
    assert all(torch.equal(c.copies[n], a.copies[n]) for n in a.copies), "what was trained itself is as it was"
    for k in left:
        f, g = c.factors(k), b.factors(k)
        torch.testing.assert_close(f.product(), g.product(), rtol=0, atol=1e-5)
        assert f.scaling == 1.0 and c.sites[k].also == a.sites[k].also and c.sites[k].target == a.sites[k].target
    assert "loss" not in c.info and c.info["whole_loss"] == 1.5 and c.info["model"] == "tiny"
    torch.testing.assert_close(by_peft(make(name, torch.float32), tmp_path / "cut"), want, rtol=0, atol=3e-5)
    (tmp_path / "cut" / "lora_lab.json").unlink()  # and from what PEFT reads
    again = make(name, torch.float32)
    lc.load_adapter(again, tmp_path / "cut", allow_zero=True)
    torch.testing.assert_close(out(again), want, rtol=0, atol=3e-5)
    c.save(tmp_path / "again")  # it is an adapter like any other
    assert {k: len(s.A) for k, s in lc.read_adapter(tmp_path / "again").sites.items()} == left


def check(result: lc.Compressed, a: lc.Adapter, whole: Path, cut: Path, size: dict[str, Any]) -> None:
    """What is said of a cut, from dense singular values."""
    sigma = {k: np.linalg.svd((f.scaling * np.matmul(*(p.double().numpy() for p in f.factored()))), compute_uv=False)
             for k, f in a._factors.items()}  # fmt: skip
    sigma = {k: np.where(s > 1e-9 * s[0], s, 0) for k, s in sigma.items()}
    total = sum((s**2).sum() for s in sigma.values())
    kept = sum((s[: result.ranks[k]] ** 2).sum() for k, s in sigma.items())
    assert result.kept_energy == pytest.approx(kept / total, rel=1e-6)
    assert result.difference == pytest.approx(np.sqrt(1 - kept / total), abs=1e-5) and result.rounding < 1e-6
    file = cut / "adapter_model.safetensors"
    assert result.file_bytes == file.stat().st_size and result.path == str(cut)
    assert result.before_bytes == (whole / file.name).stat().st_size
    dora = int(a.spec.dora)
    for k, s in sigma.items():
        n = result.ranks[k]
        if "rank" in size:
            assert n == max(dora, min(size["rank"], int((s > 0).sum())))
        if "energy" in size:
            share = (s**2).cumsum() / (s**2).sum()
            assert share[n - 1] >= size["energy"] - 1e-6 and (n == 1 or share[n - 2] < size["energy"])
    if "mb" in size:
        assert result.file_bytes <= size["mb"] * 1e6
        assert 0 < sum(result.ranks.values()) < sum((s > 0).sum() for s in sigma.values())


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "a pattern": ("llama", {"target_modules": r".*\.[01]\.self_attn\.(q|v)_proj"}),
    "fused and transposed": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "an embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied": (TIED, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "biases of the adapted": (TIED, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "all biases and a norm": (TIED, {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["norm"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj",
                                                                               "experts.down_proj"]}),
    "chosen layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.6}, {"share": 0.5}])
def test_adapters_of_peft(case: str, size: dict[str, Any], tmp_path: Path) -> None:
    """Cut adapters of PEFT's own are such again: PEFT and this library compute the same with them, and as by hand."""
    name, config = FOREIGN[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = get_peft_model(make(name, torch.float32), LoraConfig(
            **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **config})).eval()  # fmt: skip
        g = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=g) * 0.05)
        theirs.save_pretrained(str(tmp_path / "whole"))
    before = (tmp_path / "whole" / "adapter_model.safetensors").stat().st_size
    size = {"mb": before * size["share"] / 1e6} if "share" in size else size
    try:
        result = lc.compress(tmp_path / "whole", tmp_path / "cut", **size)
    except lc.UserError as e:  # biases of all the model are most of such a file
        assert case == "all biases and a norm" and "what is not cut alone takes" in str(e)
        return
    assert "mb" not in size or result.file_bytes <= size["mb"] * 1e6
    assert not (tmp_path / "cut" / "lora_lab.json").exists()
    old, new = load_file(tmp_path / "whole" / "adapter_model.safetensors"), lc.read_adapter(tmp_path / "cut")
    for n, v in lc.read_adapter(tmp_path / "whole").copies.items():
        assert np.array_equal(new.copies[n], v)
    assert len(old) >= len(load_file(tmp_path / "cut" / "adapter_model.safetensors"))
    model = make(name, torch.float32)
    cut_by_hand(model, lc.load_adapter(model, tmp_path / "whole"), {
        k: n for k, n in result.ranks.items() if k in lc.get_adapter(model, "whole").sites})  # fmt: skip
    want = out(model)
    again = make(name, torch.float32)
    lc.load_adapter(again, tmp_path / "cut")
    torch.testing.assert_close(out(again), want, rtol=0, atol=3e-5)
    torch.testing.assert_close(by_peft(make(name, torch.float32), tmp_path / "cut"), want, rtol=0, atol=3e-5)


# ---- a file of given size ----------------------------------------------------------------------------------------
POINTS = st.lists(st.tuples(st.lists(st.floats(0, 10), max_size=4), st.integers(1, 9), st.integers(0, 12)), min_size=1,
                  max_size=4)  # fmt: skip


@given(POINTS, st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_no_other_choice_of_ranks_is_better(points: list[tuple[list[float], int, int]], budget: int) -> None:
    gains = [np.concatenate([[0], np.cumsum(sorted(s, reverse=True))]) for s, _, _ in points]
    costs = [each * np.arange(len(s) + 1) + first * (np.arange(len(s) + 1) > 0) for s, each, first in points]
    found = allocate(gains, costs, budget)

    def of(ks: Any) -> tuple[float, int]:
        return sum(float(g[k]) for g, k in zip(gains, ks)), sum(int(c[k]) for c, k in zip(costs, ks))

    every = itertools.product(*(range(len(g)) for g in gains))
    best = max(gain for gain, cost in map(of, every) if cost <= budget)
    assert of(found)[1] <= budget and of(found)[0] == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert allocate(gains, [c + budget + 1 for c in costs], budget) == []


def test_many_matrices_are_allotted_within_a_hair_of_the_bound() -> None:
    g = np.random.default_rng(0)
    gains = [np.concatenate([[0], np.cumsum(np.sort(g.exponential(1, 16) ** 2)[::-1])]) for _ in range(150)]
    costs = [270 * (np.arange(17) > 0) + int(g.choice([768, 1152, 2112])) * 4 * np.arange(17) for _ in gains]
    budget = 0.3 * sum(c[-1] for c in costs)
    ks = allocate(gains, costs, budget)
    assert 0 <= budget - sum(c[k] for c, k in zip(costs, ks)) < 4 * 768, "no direction would still fit"
    # a price per byte at which the choice is the best of every matrix bounds what any choice can be worth
    rates = np.geomspace(1e-6, 1e-2, 400)
    bound = min(sum((v - p * c).max() for v, c in zip(gains, costs)) + p * budget for p in rates)
    assert sum(v[k] for v, k in zip(gains, ks)) >= 0.999 * bound


def test_of_all_files_of_a_size_the_best_is_written(tmp_path: Path) -> None:
    """Against every choice of ranks, with the files' true sizes."""
    a = filled(lc.attach(tiny("llama"), lc.LoraSpec(targets=("q", "down"), rank=3, rank_pattern={"q": 2})))
    a.save(tmp_path / "whole")
    work = Plan(lc.read_adapter(tmp_path / "whole"))
    every = [dict(zip(work.most, ks)) for ks in itertools.product(*(range(n + 1) for n in work.most.values()))]
    table = [(work.size(r), sum(float((work.sigma[k][:n] ** 2).sum()) for k, n in r.items())) for r in every]
    total = max(e for _, e in table)
    for bytes_ in range(1200, 4200, 300):
        result = lc.compress(tmp_path / "whole", tmp_path / "cut", mb=bytes_ / 1e6)
        assert result.file_bytes == (tmp_path / "cut" / "adapter_model.safetensors").stat().st_size <= bytes_
        # the length of the header is known to within a dozen digits before the ranks are
        assert result.kept_energy * total >= max(e for size, e in table if size <= bytes_ - 40) * (1 - 1e-9)
    with pytest.raises(lc.UserError, match="a single direction of one matrix takes"):
        lc.compress(tmp_path / "whole", tmp_path / "cut", mb=1e-4)
    assert lc.compress(tmp_path / "whole", tmp_path / "cut", mb=1).ranks == work.most


# ---- what is carried, and what is refused ------------------------------------------------------------------------
def test_half_precision_is_read_and_what_is_not_cut_keeps_its_bits(tmp_path: Path) -> None:
    a = stirred(lc.attach(make("bert", torch.float32), lc.LoraSpec(targets=("q", "norm"), full=("head",), rank=2)))
    a.save(tmp_path / "whole")
    file = tmp_path / "whole" / "adapter_model.safetensors"
    save_torch({n: t.bfloat16() for n, t in load_torch(file).items()}, file)
    result = lc.compress(tmp_path / "whole", tmp_path / "cut", rank=1)
    old, new = load_torch(file), load_torch(tmp_path / "cut" / file.name)
    assert old.keys() == new.keys() and result.file_bytes == (tmp_path / "cut" / file.name).stat().st_size
    for n, t in new.items():
        assert t.dtype == (torch.float32 if ".lora_" in n else torch.bfloat16)
        assert ".lora_" in n or torch.equal(t, old[n])
    whole, cut = lc.read_adapter(tmp_path / "whole"), lc.read_adapter(tmp_path / "cut")
    for k, s in whole.sites.items():
        u, sigma, v = np.linalg.svd(s.scaling * s.B.astype(float) @ s.A)
        np.testing.assert_allclose(cut.sites[k].B @ cut.sites[k].A, sigma[0] * np.outer(u[:, 0], v[0]), atol=1e-6)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e7, 1e12, np.inf])
@pytest.mark.parametrize("shape", [(40, 6), (6, 6), (4, 6)])
def test_the_thin_qr(condition: float, shape: tuple[int, int]) -> None:
    g = np.random.default_rng(0)
    X = g.standard_normal(shape) * (np.geomspace(1, 1 / condition, 6) if np.isfinite(condition) else [1, 1, 0, 1, 0, 0])
    X = X @ np.linalg.qr(g.standard_normal((6, 6)))[0]
    Q, R = _qr(X)
    np.testing.assert_allclose(Q @ R, X, atol=1e-14 * np.abs(X).max() * 40)
    np.testing.assert_allclose(Q.T @ Q, np.eye(min(shape)), atol=1e-13)


def test_dead_matrices_and_directions_are_left_out(tmp_path: Path) -> None:
    model = tiny("llama")
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=3)))
    keys = list(a.sites)
    with torch.no_grad():
        a.factors(keys[0]).B.zero_()
        a.factors(keys[1]).B[:, 1:] = 0
    a.save(tmp_path / "whole")
    result = lc.compress(tmp_path / "whole", tmp_path / "cut", energy=1.0)
    assert [result.ranks[k] for k in keys] == [0, 1, 3, 3] and result.before == dict.fromkeys(keys, 3)
    assert result.kept_energy == 1.0 and result.difference < 1e-6
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert config["target_modules"] == keys[1:] and config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == {f"^{keys[1]}": 1} == config["alpha_pattern"]
    spec = lc.read_adapter(tmp_path / "cut").spec
    assert spec is not None and spec.targets == tuple(keys[1:]) and spec.rank_of(keys[1]) == 1
    lc.attach(tiny("llama"), spec)  # the spec can be trained again


def test_cutting_twice_is_cutting_once(tmp_path: Path) -> None:
    filled(lc.attach(tiny("gpt2"), lc.LoraSpec(targets=("q", "v"), rank=4))).save(tmp_path / "whole")
    lc.compress(tmp_path / "whole", tmp_path / "three", rank=3)
    lc.compress(tmp_path / "three", tmp_path / "two", rank=2)
    lc.compress(tmp_path / "whole", tmp_path / "once", rank=2)
    a, b = lc.read_adapter(tmp_path / "two").sites, lc.read_adapter(tmp_path / "once").sites
    for k in a:
        np.testing.assert_allclose(a[k].B @ a[k].A, b[k].B @ b[k].A, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_ranks_of_ones_own_and_another_strength(name: str, tmp_path: Path) -> None:
    """Matrices that are left out, cut and scaled: −1.5 times the truncation that Delta gives, and nothing else."""
    model = make(name, torch.float32)
    a = stirred(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=4)))
    a.save(tmp_path / "whole")
    ranks = {k: i % 4 for i, k in enumerate(a.sites)}
    given = {k: n for k, n in ranks.items() if n}
    result = lc.compress(tmp_path / "whole", tmp_path / "cut", ranks=given, strength=-1.5)
    assert result.ranks == ranks and result.rounding < 1e-6
    want = {k: -1.5 * d.double().truncate(ranks[k]).dense() for k, d in a.deltas().items() if ranks[k]}
    whole = {k: d.double().dense() for k, d in a.deltas().items()}
    a.detach()
    got = {k: d.double().dense() for k, d in lc.load_adapter(model, tmp_path / "cut").deltas().items()}
    assert got.keys() == want.keys()
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=0, atol=1e-6)
    apart = sum(float((want.get(k, 0) - d).square().sum()) for k, d in whole.items())
    assert result.difference == pytest.approx((apart / sum(float(d.square().sum()) for d in whole.values())) ** 0.5)


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    a = filled(lc.attach(tiny("llama"), lc.LoraSpec(rank=2)))
    a.save(whole)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    how: dict[str, Any]
    for how, words in (({}, "given none"), ({"rank": 1, "mb": 1}, "given rank and mb"), ({"rank": -1}, "rank is -1"),
                       ({"energy": 0.0}, "energy is 0;"), ({"energy": 95}, r"did you mean 0\.95"),
                       ({"energy": float("nan")}, "energy is nan"), ({"mb": 0.0}, "mb is 0;"),
                       ({"mb": float("inf")}, "mb is inf"), ({"rank": 0}, "it is the base model")):  # fmt: skip
        with pytest.raises(lc.UserError, match=words):
            lc.compress(whole, cut, **how)
    assert not cut.exists()
    for folder, words in ((whole, "holds what is being cut"), (model, "holds a model"),
                       (whole / "adapter_config.json" / "x", "in the way")):  # fmt: skip
        with pytest.raises(lc.UserError, match=words):
            lc.compress(whole, folder, rank=1)
    filled(lc.attach(tiny("llama"), lc.LoraSpec(rank=2, dora=True))).save(tmp_path / "dora")
    with pytest.raises(lc.UserError, match="magnitudes stand beside at least one direction"):
        lc.compress(tmp_path / "dora", cut, rank=0)
    with pytest.raises(lc.UserError, match="magnitudes do not scale"):
        lc.compress(tmp_path / "dora", cut, rank=1, strength=0.5)
    with pytest.raises(lc.UserError, match="'v.0'"):
        lc.compress(whole, cut, ranks={"v.0": 1})
    with pytest.raises(lc.UserError, match="negative"):
        lc.compress(whole, cut, ranks={next(iter(a.sites)): -1})
    stirred(lc.attach(tiny("llama"), lc.LoraSpec(targets=("norm",)))).save(tmp_path / "norms")
    with pytest.raises(lc.UserError, match="no low-rank updates"):
        lc.compress(tmp_path / "norms", cut, rank=1)
    lc.attach(tiny("llama"), lc.LoraSpec(rank=2)).save(tmp_path / "fresh")
    with pytest.raises(lc.UserError, match="ΔW is zero in every matrix"):
        lc.compress(tmp_path / "fresh", cut, energy=0.9)
    with pytest.raises(lc.UserError, match="no adapter at"):
        lc.compress(tmp_path / "absent", cut, rank=1)


def test_a_plain_adapter_over_one_of_ours(tmp_path: Path) -> None:
    """What the folder held before does not stay beside what is written."""
    filled(lc.attach(tiny("llama"), lc.LoraSpec(rank=2))).save(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "plain")
    (tmp_path / "plain" / "lora_lab.json").unlink()
    lc.compress(tmp_path / "plain", tmp_path / "ours", rank=1)
    assert lc.read_adapter(tmp_path / "ours").spec is None


def test_needs_no_torch(tmp_path: Path) -> None:
    filled(lc.attach(tiny("llama"), lc.LoraSpec(rank=2))).save(tmp_path / "whole")
    code = ("import sys, lora_core as lc; lc.compress(sys.argv[1], sys.argv[2], energy=0.5);"
            "assert not {'torch', 'transformers'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "whole"), str(tmp_path / "cut")], check=True)
