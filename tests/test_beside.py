"""An update beside its W0, from the model's files: against torch, planted matrices, and the paper's random column."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny import filled, targets_of, tiny

import lora_core as lc
from lora_core.base_files import BaseFiles, folder_here
from lora_core.beside import beside, inside, svd
from lora_core.difference import DoraDifference
from lora_core.readings import Reader
from lora_core.weights import Weights, read_header


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, lc.Adapter, BaseFiles, Any]:
    """(model, adapter on all its matrices, the model's files, the adapter read back)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param)
    model.save_pretrained(folder / "model")
    a = filled(lc.attach(model, lc.LoraSpec(targets=targets_of(model), rank=4)))
    a.save(folder / "adapter")
    return model, a, BaseFiles(folder / "model"), lc.read_adapter(folder / "adapter")


# ---- W0 out of files
def test_W0_is_the_models_own(saved: Any) -> None:
    _, a, base, stored = saved
    for key, site in stored.sites.items():
        np.testing.assert_array_equal(base.W0(site), a.W0(key).numpy())


def test_numbers_are_those_of_torch(saved: Any) -> None:
    _, a, base, stored = saved
    for key, site in stored.sites.items():
        W0 = base.W0(site)
        b = beside(*svd(site.B, site.A, site.scaling), W0, base.sigma(site))
        assert b.amplification == pytest.approx(float(lc.amplification(a.delta(key), a.W0(key))), rel=1e-5)
        assert b.base_norm == pytest.approx(float(a.W0(key).norm()), rel=1e-5)
        assert b.norm == pytest.approx(float(a.delta(key).norm()), rel=1e-5) and 0 < b.overlap < 1
        U, S, V = svd(site.B, site.A, site.scaling)
        np.testing.assert_allclose(U * S @ V.T, a.delta(key).double().dense().numpy(), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_doras_update_out_of_files_is_the_attached_ones(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "model")
    a = filled(lc.attach(model, lc.LoraSpec(targets=targets_of(model), rank=2, dora=True)))
    a.save(tmp_path / "adapter")
    found = DoraDifference(lc.read_adapter(tmp_path / "adapter"), BaseFiles(tmp_path / "model"))
    assert list(found.keys()) == list(a.sites) and len(found) == len(a.sites)
    for key, s in found.spectra():
        D = a.delta(key).double().dense().numpy()
        np.testing.assert_allclose(found.delta(key), D, atol=1e-5 * np.abs(D).max() + 1e-7)
        np.testing.assert_allclose(s.singular_values, np.linalg.svd(D, compute_uv=False), atol=1e-5 * s.norm)
        assert (s.shape, s.rank, s.target, s.layer) == (D.shape, min(D.shape), a.sites[key].target, a.sites[key].layer)
        assert s.singular_values[2] > 1e-3 * s.singular_values[0], "its rank is not r"


def test_planted_updates(saved: Any) -> None:
    _, _, base, stored = saved
    site = next(iter(stored.sites.values()))
    W0 = base.W0(site)
    U0, s0, V0 = np.linalg.svd(W0.astype(np.float64), full_matrices=False)
    same = beside(U0[:, :3], np.array([4.0, 2.0, 1.0]), V0[:3].T, W0, s0)
    assert same.overlap == pytest.approx(1, rel=1e-5) and same.along == pytest.approx(np.sqrt((s0[:3] ** 2).sum()))
    assert same.amplification == pytest.approx(np.sqrt(21) / same.along, rel=1e-5)
    other = beside(U0[:, :3], np.array([4.0, 2.0, 1.0]), V0[3:6].T, W0, s0)
    assert other.along < 1e-5 * same.along and other.amplification > 1e4
    zero = beside(U0[:, :3], np.zeros(3), V0[:3].T, W0, s0)
    assert (zero.directions, zero.amplification, zero.overlap) == (0, 0.0, 0.0)
    np.testing.assert_allclose(inside(V0[2:5].T, V0.T, 3)[:6], [0, 0, 1 / 3, 2 / 3, 1, 1], atol=1e-9)


def test_random_directions_have_what_the_paper_s_random_column_says() -> None:
    """Table 7: r·‖W‖_F/√(out·in), here against draws; 61.95·4/12288 is the paper's 0.02."""
    g = np.random.default_rng(0)
    W0 = g.standard_normal((96, 64)) @ np.diag(np.linspace(3, 0.1, 64))
    s0 = np.linalg.svd(W0, compute_uv=False)
    draws = [beside(*svd(g.standard_normal((96, 5)), g.standard_normal((5, 64))), W0, s0) for _ in range(200)]
    assert np.sqrt(np.mean([b.along**2 for b in draws])) == pytest.approx(draws[0].random, rel=0.05)
    assert 4 * 61.95 / 12288 == pytest.approx(0.02, abs=1e-3)


def test_another_models_files_are_refused(saved: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, _, base, stored = saved
    LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                 num_attention_heads=2)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(lc.UserError, match="made for another model"):
        BaseFiles(tmp_path).W0(next(iter(stored.sites.values())))
    assert folder_here(str(tmp_path)) == tmp_path and folder_here("no/such-model") is None and folder_here(None) is None


# ---- tokens
def test_tokens_that_are_read_are_those_of_the_models_own_norm_and_embedding(saved: Any) -> None:
    model, _, base, stored = saved
    E = model.get_input_embeddings().weight.detach()
    reader = Reader(base)
    for site in stored.sites.values():
        if site.target not in ("q", "gate", "up"):
            continue
        layer = model.get_submodule(re.split(r"\.(?:self_attn|attn|attention|mlp)\.", site.path)[0])
        names = ("ln_2", "post_attention_layernorm") if site.target != "q" else ("ln_1", "input_layernorm")
        norm = next(getattr(layer, n) for n in names if hasattr(layer, n))
        U, _, V = svd(site.B, site.A, site.scaling)
        scores = norm(E).detach().double().numpy() @ V[:, 0]
        (reading,) = [r for r in reader.of(site, U[:, :2], V[:, :2], top=5) if r.side == "reads"]
        assert reading.poles[0][0].ids == tuple(np.argsort(-scores)[:5])
        assert reading.poles[0][1].ids == tuple(np.argsort(scores)[:5])
        z = (scores - scores.mean()) / scores.std()
        np.testing.assert_allclose(reading.poles[0][0].z, np.sort(z)[::-1][:5], rtol=1e-4)
        assert 2 < reading.chance < 6


def test_tokens_that_are_written_are_those_of_the_last_norm_and_the_head(saved: Any) -> None:
    model, _, base, stored = saved
    reader = Reader(base)
    body = model.base_model
    final = next(getattr(body, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(body, n))
    head = model.get_output_embeddings().weight.detach().double().numpy()
    for site in stored.sites.values():
        if site.target not in ("o", "down"):
            continue
        U, _, V = svd(site.B, site.A, site.scaling)
        u = U[:, 0] - (U[:, 0].mean() if final.__class__.__name__ == "LayerNorm" else 0)
        scores = head @ (final.weight.detach().double().numpy() * u)
        (reading,) = [r for r in reader.of(site, U, V, top=5) if r.side == "writes"]
        assert reading.poles[0][0].ids == tuple(np.argsort(-scores)[:5])
    assert any(s.target == "down" for s in stored.sites.values())


def test_what_v_gives_goes_through_o_as_in_the_models_own_attention() -> None:
    """One token attends to itself alone, so the attention's output is o·(v(x), each key head for its query heads)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip
    import tempfile

    attention: Any = model.model.layers[0].self_attn
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reader = Reader(BaseFiles(folder))
        a = filled(lc.attach(model, lc.LoraSpec(targets=("v", "o"), rank=3)))
        a.save(Path(folder) / "adapter")
        stored = lc.read_adapter(Path(folder) / "adapter")
        a.detach()
        v = stored.sites["model.layers.0.self_attn.v_proj"]
        U, _, V = svd(v.B, v.A, v.scaling)
        x = torch.ones(1, 1, 32)
        with torch.no_grad():
            attention.v_proj.weight.copy_(torch.tensor(np.outer(U[:, 0], np.ones(32)) / 32))
            where = model.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
            out = attention(x, position_embeddings=where, attention_mask=None)[0][0, 0].double().numpy()
        scores = model.lm_head.weight.detach().double().numpy() @ out  # the last norm's gain is 1
        writes = next(r for r in reader.of(v, U, V, top=5) if r.side == "writes")
        assert writes.through == "o" and writes.poles[0][0].ids == tuple(np.argsort(-scores)[:5])
        o = stored.sites["model.layers.0.self_attn.o_proj"]
        Uo, _, Vo = svd(o.B, o.A, o.scaling)
        reads = next(r for r in reader.of(o, Uo, Vo, top=5) if r.side == "reads")
        Wv = Weights(folder).read("model.layers.0.self_attn.v_proj.weight").astype(np.float64)
        E = model.model.embed_tokens.weight.detach().double()
        given = (E / E.square().mean(1, keepdim=True).sqrt()).numpy() @ Wv.T  # (tokens, 2 key heads of 8)
        as_read = given.reshape(60, 2, 1, 8).repeat(2, 2).reshape(60, 32)
        assert reads.through == "v" and reads.poles[0][0].ids == tuple(np.argsort(-(as_read @ Vo[:, 0]))[:5])


def test_what_has_no_tokens_says_so(saved: Any, tmp_path: Path) -> None:
    _, _, base, stored = saved
    down = next(s for s in stored.sites.values() if s.target == "down")
    U, _, V = svd(down.B, down.A, down.scaling)
    assert [r.side for r in Reader(base).of(down, U, V)] == ["writes"]
    config = json.loads((base.folder / "config.json").read_text()) | {"model_type": "mpt"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(lc.UserError, match="not known here for mpt"):
        Reader(BaseFiles(tmp_path))


# ---- safetensors, one tensor at a time
def test_tensors_are_those_of_the_package(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save

    given = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(5).double(), "c": torch.randn(2, 2).half(),
             "e": torch.zeros(0, 3), "f": torch.randn(7), "n": torch.arange(3)}  # fmt: skip
    save(given, tmp_path / "x.safetensors", metadata={"who": "me"})
    w = Weights(tmp_path / "x.safetensors")
    assert sorted(w) == sorted(given) and w.metadata == {"who": "me"} and w.shape("a") == (3, 4)
    for name in "abcef":
        np.testing.assert_array_equal(w.read(name), given[name].double().numpy())
    with pytest.raises(lc.UserError, match="n is I64"):
        w.read("n")
    with pytest.raises(lc.UserError, match="has no tensor g"):
        w.read("g")


def test_shards_are_read_by_their_index(saved: Any, tmp_path: Path) -> None:
    model, _, base, _ = saved
    model.base_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shards = BaseFiles(tmp_path)
    for name in [n for n in base.weights if "layers" in n or ".h." in n][:8]:
        found = shards.find(name)
        assert found is not None
        np.testing.assert_array_equal(shards.weights.read(found), base.weights.read(name))


@given(st.binary(max_size=60), st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_broken_headers_are_refused_in_a_sentence(tmp_path_factory: Any, junk: bytes, at: int) -> None:
    """Bytes thrown into a good file: it reads as the same tensors, or is refused; never anything else."""
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, file)
    good = file.read_bytes()
    file.write_bytes(good[:at] + junk + good[at + len(junk) :])
    try:
        header = read_header(file)
    except lc.UserError as error:
        assert str(error).startswith(str(file))
        return
    for name, e in header.entries.items():
        assert 0 <= e.begin <= e.end <= len(file.read_bytes()), name


@pytest.mark.parametrize("header", [
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    dict.fromkeys("ab", {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    {"a": {"dtype": "P9", "shape": [1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
    {"a": [1]},
    {"__metadata__": {"x": 3}},
    {"__metadata__": []},
    {"\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    [],
])  # fmt: skip
def test_headers_that_lie(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(lc.UserError, match=r"x\.safetensors"):
        read_header(file)


def test_needs_no_torch() -> None:
    code = ("import sys; import lora_core.readings, lora_core.beside;"
            "assert not {'torch', 'transformers'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
