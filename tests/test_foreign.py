"""Opening what others made: each format as its own tool writes it, or by names and a dense oracle of our own."""

from __future__ import annotations

import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import tiny

import lora_core as lc
from app.pages.opened import bounded
from lora_core.difference import noise_edge_full, noise_quantiles, same_norm_noise
from lora_core.foreign import open_any

G = np.random.default_rng(5)


def f32(*shape: int) -> np.ndarray:
    return G.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """(an adapter as PEFT writes it, {module: PEFT's own ΔW})"""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"],
                                                     rank_pattern={"layers.1.self_attn.q_proj": 5}))  # fmt: skip
    g = torch.Generator().manual_seed(1)
    deltas = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_B") and module.lora_B:
            with torch.no_grad():
                B = module.lora_B["default"].weight
                B.copy_(torch.randn(B.shape, generator=g))
                delta = module.get_delta_weight("default").double().numpy()
            deltas[name.removeprefix("base_model.model.")] = delta
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(str(folder))
    return folder, deltas


def same(stored: Any, deltas: dict[str, np.ndarray]) -> None:
    """Every ΔW's singular values are those of the dense oracle."""
    found = lc.spectra(stored)
    assert set(found) == set(deltas)
    for key, D in deltas.items():
        sigma = np.linalg.svd(D.reshape(D.shape[0], -1), compute_uv=False)
        mine = np.array(found[key].singular_values)
        np.testing.assert_allclose(mine, sigma[: len(mine)], rtol=1e-4, atol=1e-6)
        assert found[key].shape == D.reshape(D.shape[0], -1).shape


# ---- PEFT
def test_a_peft_folder_its_zip_and_its_file(peft_folder: Any, tmp_path: Path) -> None:
    folder, deltas = peft_folder
    opened = open_any(folder)
    same(opened.stored, deltas)
    assert opened.kind == "PEFT" and opened.metadata["peft_type"] == "LORA" and opened.metadata["r"] == "3"
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for file in folder.iterdir():
            z.write(file, f"mine/{file.name}")
        z.writestr("mine/../../evil.json", "{}")
        z.writestr("__MACOSX/._adapter_model.safetensors", "x")
    same(open_any(tmp_path / "a.zip", scratch=tmp_path / "out").stored, deltas)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "out"], "nothing beside the scratch folder"
    one = open_any(folder / "adapter_model.safetensors")
    assert one.kind == "PEFT" and "s = 1 is taken" in one.remarks[0]
    assert one.stored is not None
    scaled = {k: D / (12 / one.stored.sites[k].A.shape[0]) for k, D in deltas.items()}
    same(one.stored, scaled)
    assert {(s.target, s.layer) for s in one.stored.sites.values()} == {(t, n) for t in ("q", "down") for n in (0, 1)}


def test_the_audit_takes_the_same(peft_folder: Any) -> None:
    folder, _ = peft_folder
    stored = open_any(folder).stored
    assert stored is not None
    assert lc.audit(stored).to_dict() == lc.audit(lc.read_adapter(folder)).to_dict()


def test_dora_shows_its_low_rank_part(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
    model.save_pretrained(str(tmp_path))
    for where in (tmp_path, tmp_path / "adapter_model.safetensors"):
        opened = open_any(where)
        assert any("DoRA" in r for r in opened.remarks) and opened.stored is not None
        assert len(lc.spectra(opened.stored)) == 2


# ---- kohya and diffusers
def test_kohyas_names_with_alpha_and_convolutions(tmp_path: Path) -> None:
    tensors, deltas = {}, {}
    for i in (0, 1, 10):
        name = f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q"
        down, up = f32(4, 32), f32(24, 4)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
                    f"{name}.alpha": np.array(2.0, np.float32)}  # fmt: skip
        deltas[name] = 0.5 * up.astype(np.float64) @ down
    conv = "lora_unet_mid_block_resnets_0_conv1"
    down, up = f32(3, 8, 3, 3), f32(16, 3, 1, 1)
    tensors |= {f"{conv}.lora_down.weight": down, f"{conv}.lora_up.weight": up, f"{conv}.alpha": np.array(3, np.int64)}
    deltas[conv] = np.einsum("or,rihw->oihw", up[:, :, 0, 0].astype(np.float64), down)
    cp = "lora_unet_mid_block_resnets_0_conv2"
    down, mid, up = f32(3, 8, 1, 1), f32(3, 3, 3, 3), f32(16, 3, 1, 1)
    tensors |= {f"{cp}.lora_down.weight": down, f"{cp}.lora_mid.weight": mid, f"{cp}.lora_up.weight": up,
                f"{cp}.alpha": np.array(3.0, np.float16)}  # fmt: skip
    deltas[cp] = np.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0].astype(np.float64), mid, down[:, :, 0, 0])
    te = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    down, up = f32(2, 16), f32(16, 2)
    tensors |= {f"{te}.lora_down.weight": down, f"{te}.lora_up.weight": up, f"{te}.alpha": np.array(2.0, np.float32)}
    deltas[te] = up.astype(np.float64) @ down
    save_file(tensors, tmp_path / "k.safetensors", metadata={"ss_sd_model_name": "sd15", "ss_steps": "<b>1</b>"})
    opened = open_any(tmp_path / "k.safetensors")
    same(opened.stored, deltas)
    assert opened.kind == "kohya" and opened.base == "sd15" and opened.metadata["ss_steps"] == "<b>1</b>"
    assert opened.stored is not None and opened.remarks == ()
    places = {k: (s.target, s.layer) for k, s in opened.stored.sites.items()}
    first = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn1_to_q"
    assert [places[first.format(i)] for i in (0, 1, 10)] == [("unet_attn1_to_q", n) for n in (0, 1, 2)]
    assert places[te] == ("te_self_attn_q_proj", 0) and len(set(places.values())) == len(places)


@pytest.mark.parametrize(("down", "up"), [
    ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    ("{}_lora.down.weight", "{}_lora.up.weight"),
    ("text_encoder.{}.lora_linear_layer.down.weight", "text_encoder.{}.lora_linear_layer.up.weight"),
])  # fmt: skip
def test_diffusers_names(tmp_path: Path, down: str, up: str) -> None:
    modules = [f"mid_block.attentions.0.transformer_blocks.{i}.attn2.processor.to_v" for i in range(3)]
    tensors, deltas = {}, {}
    for m in modules:
        A, B = f32(4, 20), f32(12, 4)
        tensors |= {down.format(m): A, up.format(m): B}
        deltas[up.format(m).removesuffix(up.split("{}")[1])] = B.astype(np.float64) @ A
    said = json.dumps({"unet.lora_alpha": 8, "unet.r": 4})
    save_file(tensors, tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": said} if "unet" in down else None)
    opened = open_any(tmp_path / "d.safetensors")
    assert opened.kind == "diffusers"
    if "unet" in down:  # α is told
        deltas = {k: 2 * D for k, D in deltas.items()}
        assert opened.remarks == ()
    same(opened.stored, deltas)
    assert opened.stored is not None
    assert [s.layer for s in opened.stored.sites.values()] == [0, 1, 2]


@pytest.mark.parametrize(("names", "words"), [
    ({"a.lora_down.weight": (2, 8)}, "its up projection is missing"),
    ({"a.lora_down.weight": (2, 8), "a.lora_up.weight": (8, 3)}, "do not share a rank"),
    ({"a.lora_down.weight": (2, 8), "a.lora_up.weight": (8,)}, "must be matrices"),
    ({"a.lora_A.one.weight": (2, 8), "a.lora_A.two.weight": (2, 8)}, "two adapters"),
    ({"a.hada_w1_a": (2, 8), "a.hada_w1_b": (2, 8)}, "holds LoHa"),
    ({"a.lokr_w1": (2, 8)}, "holds LoKr"),
    ({"a.alpha": ()}, "no LoRA factors"),
    ({"a.lora_down.weight": (2, 8), "a.lora_up.weight": (8, 2), "a.alpha": (2,)}, "must be one number"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, names: dict[str, Any], words: str) -> None:
    save_file({n: f32(*shape) for n, shape in names.items()}, tmp_path / "x.safetensors")
    with pytest.raises(lc.UserError, match=words):
        open_any(tmp_path / "x.safetensors")


# ---- whole checkpoints
def test_a_checkpoint_is_its_difference_to_its_base(tmp_path: Path) -> None:
    base, tuned = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.01 * torch.randn_like(p))
        tuned.model.layers[1].mlp.up_proj.weight.copy_(base.model.layers[1].mlp.up_proj.weight)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    for what in (tmp_path / "tuned", tmp_path / "tuned" / "model.safetensors"):
        opened = open_any(what, base=tmp_path / "base")
        d = opened.difference
        assert opened.kind == "checkpoint" and d is not None and "vectors" in opened.remarks[0]
        found = dict(d.spectra())
        assert len(found) == len(d) == 15  # seven matrices in each of two layers, and the embedding
        for key, s in found.items():
            D = (tuned.get_submodule(key).weight - base.get_submodule(key).weight).detach().double().numpy()
            np.testing.assert_allclose(s.singular_values, np.linalg.svd(D, compute_uv=False), atol=1e-7)
            assert s.rank == min(D.shape)
        assert found["model.layers.1.mlp.up_proj"].norm == 0 and found["model.layers.0.mlp.up_proj"].layer == 0
    with pytest.raises(lc.UserError, match="its difference to its base"):
        open_any(tmp_path / "tuned")
    with pytest.raises(lc.UserError, match="is the base itself"):
        open_any(tmp_path / "base", base=tmp_path / "base")
    other = tiny("gpt2")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(lc.UserError, match="another model's"):
        open_any(tmp_path / "tuned", base=tmp_path / "other")


@pytest.mark.parametrize("shape", [(200, 200), (100, 300), (300, 100), (64, 4000)])
def test_the_null_of_full_fine_tuning_is_marchenko_and_pasturs(shape: tuple[int, int]) -> None:
    g = np.random.default_rng(0)
    draws = np.stack([np.linalg.svd(g.standard_normal(shape), compute_uv=False) for _ in range(4)])
    mean = (draws / np.sqrt(np.square(draws).sum(1, keepdims=True))).mean(0)
    np.testing.assert_allclose(noise_quantiles(*shape), mean, atol=0.03 * mean[0])
    assert np.square(same_norm_noise(*shape, 3.0)).sum() == pytest.approx(9.0)
    assert noise_edge_full(draws[0], *shape) == pytest.approx(draws[0][0], rel=0.08)


# ---- pickles and lies
class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x.safetensors", "x"])
def test_pickles_are_refused_and_not_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(lc.UserError, match="is a pickle, which can run code"):
        open_any(tmp_path / name)
    with pytest.raises(lc.UserError, match=r"pickle|safetensors"):
        open_any(tmp_path)


def test_torch_saves_zip_is_a_pickle_too(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(lc.UserError, match="is a pickle"):
        open_any(tmp_path / "x.safetensors", scratch=tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as z:
        z.writestr("pytorch_lora_weights.bin", pickle.dumps(Evil()))
    with pytest.raises(lc.UserError, match="is a pickle"):
        open_any(tmp_path / "y.zip", scratch=tmp_path / "out")


def test_zips_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_core.foreign.MAX_UNPACKED", 1 << 16)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x.safetensors", bytes(1 << 20))
    with pytest.raises(lc.UserError, match="unpacks to more than"):
        open_any(tmp_path / "z.zip", scratch=tmp_path / "out")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(lc.UserError, match="cannot be unpacked"):
        open_any(tmp_path / "bad.zip", scratch=tmp_path / "out2")
    with pytest.raises(lc.UserError, match="unpack it first"):
        open_any(tmp_path / "z.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_told_in_a_sentence(method: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w", method) as z:
        z.writestr("x.safetensors", bytes(range(256)) * 40)
    content = whole.read_bytes()
    for at in [*range(60), *range(len(content) - 120, len(content))]:  # the member's start, the archive's end
        damaged = bytearray(content)
        damaged[at] ^= 255
        (tmp_path / "bad.zip").write_bytes(damaged)
        with suppress(lc.UserError):  # nothing else
            open_any(tmp_path / "bad.zip", scratch=tmp_path / "out")
        with suppress(lc.UserError):  # what an upload is looked at with first
            bounded(tmp_path / "bad.zip")


names = st.text("abAB_.lorupdwnightadefk0123", min_size=1, max_size=40)
entry = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "X"]),
                               "shape": st.lists(st.integers(-1, 5), max_size=4),
                               "data_offsets": st.lists(st.integers(-2, 80), min_size=1, max_size=3)})  # fmt: skip


@given(st.dictionaries(names, entry | st.integers() | st.none(), max_size=5), st.binary(max_size=80))
@settings(max_examples=120, deadline=None)
def test_no_header_does_anything_but_open_or_be_refused(tmp_path_factory: Any, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(lc.UserError):
        open_any(file, base=file.parent)


@given(st.lists(st.tuples(st.sampled_from(["down", "up", "mid"]), st.lists(st.integers(0, 4), max_size=5)), max_size=3))
@settings(max_examples=80, deadline=None)
def test_factors_of_any_shape_open_or_are_refused(tmp_path_factory: Any, given_: list[Any]) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({f"a.lora_{p}.weight": np.ones(s, np.float32) for p, s in given_}, file)
    try:
        opened = open_any(file, base=file.parent)
    except lc.UserError:
        return
    loaded = load_file(file)
    assert opened.stored is not None and opened.stored.sites["a"].A.size <= 4**6 and len(loaded) >= 2


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("model.safetensors", bytes(20 << 20))
    with pytest.raises(lc.UserError, match="times its size"):
        open_any(tmp_path / "x.zip", scratch=tmp_path / "out")
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 8 << 20


def test_names_with_very_long_numbers_are_read(tmp_path: Path) -> None:
    from lora_core.peft_format import read_tensors

    save_file({"9" * 5000: f32(1), "a.10.b": f32(1), "a.9.b": f32(1)}, tmp_path / "n.safetensors")
    assert list(read_tensors(tmp_path / "n.safetensors"))[1:] == ["a.9.b", "a.10.b"]
