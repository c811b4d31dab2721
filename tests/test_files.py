"""PEFT's directory format: both ways against PEFT itself, exact round trips, and every way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, filled, ids, targets_of, tiny
from zoo import make

import lora_core as lc

SPECS: dict[str, dict[str, Any]] = {
    "paper": dict(targets=("q", "v"), rank=4, alpha=8),
    "rs, one layer": dict(targets=("q", "v"), rank=4, alpha=7, layers=(1,), scaling="alpha/sqrt(r)"),
    "patterns": dict(targets=("v", "o"), rank=4, alpha=7, rank_pattern={"o": 3}, alpha_pattern={"o": 2.0}),
    "slices of unlike rank": dict(targets=("q", "v"), rank=4, alpha=8, rank_pattern={"q": 2}, alpha_pattern={"q": 4.0}),
}


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", [*SPECS, "all"])
def test_ours_loads_in_peft_and_comes_back_exactly(family: str, spec: str, tmp_path: Path) -> None:
    model = tiny(family)
    a = lc.attach(model, lc.LoraSpec(**SPECS.get(spec, dict(targets=targets_of(model), rank=3))))
    filled(a)
    want, deltas = out(model), a.deltas()
    a.save(tmp_path, info={"model": "tiny", "note": "a || b"})
    a.detach()
    b = lc.load_adapter(model, tmp_path, name="again")
    assert torch.equal(out(model), want) and b.spec == a.spec and b.info["note"] == "a || b"
    assert list(b.deltas()) == list(deltas)
    assert all(torch.equal(b.delta(k).dense(), d.dense()) for k, d in deltas.items())
    b.detach()
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
    torch.testing.assert_close(out(theirs), want, rtol=0, atol=1e-5)
    assert all(v.dtype == np.float32 for v in load_file(tmp_path / "adapter_model.safetensors").values())


NAMES = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "gpt_neox": ["query_key_value", "dense"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": True, "alpha_pattern": True}])
def test_peft_made_gives_pefts_outputs(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    names = NAMES[family]
    more = {**options}
    if more:
        more |= {"rank_pattern": {names[0]: 2}, "alpha_pattern": {names[1]: 5}}
    config = LoraConfig(
        r=4, lora_alpha=9, target_modules=names, fan_in_fan_out=family == "gpt2", init_lora_weights=False, **more
    )  # type: ignore[arg-type]
    theirs = get_peft_model(tiny(family), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = tiny(family)
    lc.load_adapter(model, tmp_path)
    torch.testing.assert_close(out(model), out(theirs), rtol=0, atol=1e-5)


def test_half_precision_files_are_read_exactly(tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    folder = saved(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        file = folder / "adapter_model.safetensors"
        halved = {k: v.to(dtype) for k, v in load_torch(file).items()}
        save_torch(halved, file)
        stored = lc.read_adapter(folder)
        for s in stored.sites.values():
            assert np.array_equal(s.A, halved[f"base_model.model.{s.path}.lora_A.weight"].double().numpy())


def saved(tmp_path: Path, fill: bool = True) -> Path:
    a = lc.attach(tiny("llama"), lc.LoraSpec(rank=2))
    if fill:
        filled(a)
    return a.save(tmp_path / "adapter")


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys, lora_core as lc
s = lc.spectra(lc.read_adapter({str(saved(tmp_path))!r}))
assert len(s) == 4 and "torch" not in sys.modules, [m for m in sys.modules if m.startswith("torch")][:3]
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


LAYER = "base_model.model.model.layers.0"
KEY = f"{LAYER}.self_attn.q_proj.lora_A.weight"
BKEY = KEY.replace(".lora_A", ".base_layer.lora_B")


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def go(folder: Path) -> None:
        t = {k: v.copy() for k, v in load_file(folder / "adapter_model.safetensors").items()}
        change(t)
        save_file(t, folder / "adapter_model.safetensors")

    return go


def config(**changes: Any) -> Callable[[Path], None]:
    def go(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return go


def to_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing key": (tensors(lambda t: t.pop(KEY)), "lora_A.weight is missing"),
    "an unknown key": (tensors(lambda t: t.update(extra=np.zeros(2, np.float32))), "unknown tensor 'extra'"),
    "a wrong rank": (tensors(lambda t: t.update({KEY: t[KEY][:1]})), "by adapter_config.json its rank is 2"),
    "a vector": (tensors(lambda t: t.update({KEY: t[KEY][0]})), "must be a matrix"),
    "another model's shape": (tensors(lambda t: t.update({KEY: t[KEY][:, :5].copy()})), "was made for another model"),
    "NaN": (tensors(lambda t: t[KEY].__setitem__((0, 0), np.nan)), "not finite"),
    "infinity": (tensors(lambda t: t[KEY].__setitem__((0, 0), np.inf)), "not finite"),
    "whole numbers": (tensors(lambda t: t.update({KEY: t[KEY].astype(np.int32)})), "is I32"),
    "no tensors": (tensors(lambda t: t.clear()), "holds no factors"),
    "a pickle": (to_pickle, "is a pickle"),
    "a huge header": (huge_header, "header claims"),
    "torn weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "safetensors"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "JSON object"),
    "config is torn": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "config is deep": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "not valid JSON"),
    "another method": (config(peft_type="LOHA"), "is a LOHA adapter"),
    "DoRA without magnitudes": (config(use_dora=True), "lora_magnitude_vector is missing"),
    "a magnitude without DoRA": (
        tensors(lambda t: t.update({KEY.replace("A.weight", "magnitude_vector"): np.ones(32, np.float32)})),
        "magnitude_vector do not belong together",
    ),
    "nothing that was saved whole": (
        lambda f: (config(modules_to_save=["mlp.up_proj"])(f), (f / "lora_lab.json").unlink()),
        "has no model.layers.0.mlp.up_proj.weight, which adapter_config.json says is saved whole",
    ),
    "a kind of bias": (config(bias="some"), "bias is 'some'; PEFT has"),
    "names that are none": (config(target_modules=[7]), "target_modules must be a list of names"),
    "a pattern without end": (config(rank_pattern={"(a+)+b": 2}), "too involved"),
    "a pattern that is none": (config(alpha_pattern={"(": 2}), "is no pattern"),
    "a name that is too long": (config(target_modules="q" * 2000), "too involved"),
    "two levels of factors": (
        tensors(lambda t: t.update({KEY.replace(".lora", ".base_layer.lora"): t[KEY], BKEY: t[KEY.replace("A", "B")]})),
        "factors at 2 levels",
    ),
    "a base weight of nothing": (
        tensors(lambda t: t.update({f"{LAYER}.mlp.up_proj.base_layer.weight": np.ones((48, 32), np.float32)})),
        "a base weight of a module without factors",
    ),
    "another model's base weight": (
        tensors(lambda t: t.update({KEY.replace("lora_A", "base_layer"): np.ones((32, 32), np.float32)})),
        "comes with a .*q_proj.weight that is not the model's",
    ),
    "rank is text": (config(r="8"), "r is '8'"),
    "a dropout that is a list": (config(lora_dropout=[{}]), "lora_dropout is \\[{}\\], not a number"),
    "alpha is NaN": (config(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha is larger than a float": (config(lora_alpha=10**400), "lora_alpha is 1000"),
    "rank is larger than a float": (config(r=10**400), "r is 1000"),
    "an alpha of its own is larger": (config(alpha_pattern={"q_proj": 10**400}), "alpha_pattern must map"),
    "our own file does not fit": (
        lambda f: (f / "lora_lab.json").write_text('{"spec": {}, "sites": []}'),
        "lora_lab.json",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_wrong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    folder, (break_it, says) = saved(tmp_path), WRONG[case]
    break_it(folder)
    model = tiny("llama")
    with pytest.raises(lc.UserError, match=says) as e:
        lc.load_adapter(model, folder)
    assert "\n" not in str(e.value)
    assert "lora_adapters" not in model.__dict__ or not model.lora_adapters.adapters


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1, 2]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"use_bdlora": {}},
        {"arrow_config": {}},
        {"kasa_config": {}},
        {"velora_config": {}},
        {"monteclora_config": {}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
)
def test_what_only_peft_can_do_is_refused_by_its_name(setting: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config(**setting)(folder)
    with pytest.raises(lc.UserError, match=f"PEFT's {next(iter(setting))} = "):
        lc.read_adapter(folder)


H = "base_model.model.transformer.h.0"
NORM, BIAS, MAGNITUDE = f"{H}.ln_1.weight", f"{H}.mlp.c_fc.bias", f"{H}.attn.c_attn.lora_magnitude_vector"
RICH: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing magnitude": (tensors(lambda t: t.pop(MAGNITUDE)), "lora_magnitude_vector is missing"),
    "a short magnitude": (tensors(lambda t: t.update({MAGNITUDE: t[MAGNITUDE][:7]})), "a magnitude \\(7,\\)"),
    "a magnitude that is a matrix": (tensors(lambda t: t.update({MAGNITUDE: t[MAGNITUDE][None]})), "must be a vector"),
    "a copy of another shape": (tensors(lambda t: t.update({NORM: t[NORM][:5]})), "ln_1.weight .* is \\(5,\\), but"),
    "NaN in a copy": (tensors(lambda t: t[NORM].__setitem__(0, np.nan)), "ln_1.weight holds a number that is not"),
    "a missing copy": (tensors(lambda t: t.pop(NORM)), "has no transformer.h.0.ln_1.weight, which the adapter trains"),
    "a missing bias": (tensors(lambda t: t.pop(BIAS)), "has no transformer.h.0.mlp.c_fc.bias, which the adapter tr"),
    "a copy too many": (
        tensors(lambda t: t.update({BIAS.replace("c_fc", "c_gc"): t[BIAS]})), "which GPT2LMHeadModel has not"),
    "an unknown tensor": (
        tensors(lambda t: t.update({BIAS.replace("bias", "scale"): t[BIAS]})), "neither factors nor what"),
}  # fmt: skip


@pytest.mark.parametrize("case", RICH)
@pytest.mark.parametrize("lab", [True, False])
def test_magnitudes_and_copies_that_are_wrong_are_refused(case: str, lab: bool, tmp_path: Path) -> None:
    spec = lc.LoraSpec(targets=("q", "norm", "bias"), rank=2, dora=True)
    folder, (break_it, says) = filled(lc.attach(tiny("gpt2"), spec)).save(tmp_path), RICH[case]
    lc.load_adapter(tiny("gpt2"), folder)
    if not lab:
        (folder / "lora_lab.json").unlink()
    break_it(folder)
    if case == "a missing bias" and not lab:  # as PEFT's lora_only has it: that one was not trained
        assert lc.load_adapter(tiny("gpt2"), folder).copies
        return
    if case == "a missing copy" and not lab:
        says = "has no transformer.h.0.ln_1.weight"
    with pytest.raises(lc.UserError, match=says):
        lc.load_adapter(tiny("gpt2"), folder)


def test_experts_and_tied_matrices_that_do_not_fit(tmp_path: Path) -> None:
    a = filled(lc.attach(make("mixtral", torch.float32), lc.LoraSpec(targets=("up", "down"), rank=2)))
    a.save(tmp_path / "experts")
    with pytest.raises(lc.UserError, match="no expert 'model.layers.0.mlp.experts"):
        lc.load_adapter(tiny("llama"), tmp_path / "experts")
    key = f"{LAYER}.mlp.experts.lora_B.weight"
    tensors(lambda t: t.update({key: t[key][:, :5]}))(tmp_path / "experts")
    with pytest.raises(lc.UserError, match="its rank is 2"):
        lc.read_adapter(tmp_path / "experts")
    filled(lc.attach(tiny("llama"), lc.LoraSpec(targets=("embed",), rank=2))).save(tmp_path / "tied")
    with pytest.raises(lc.UserError, match="where lm_head and model.embed_tokens share a weight"):
        model = tiny("llama")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        lc.load_adapter(model, tmp_path / "tied")
    key = "base_model.model.lm_head.lora_B.weight"
    tensors(lambda t: t[key].__setitem__((0, 0), 7))(tmp_path / "tied")
    with pytest.raises(lc.UserError, match="lm_head is said to share the update"):
        lc.read_adapter(tmp_path / "tied")
    (tmp_path / "tied" / "lora_lab.json").unlink()
    model = tiny("llama")
    assert list(lc.load_adapter(model, tmp_path / "tied").sites) == ["lm_head", "model.embed_tokens"], "each by itself"


@pytest.mark.parametrize("targets", [("embed",), ("norm",), ("q", "bias")])
@pytest.mark.parametrize("dora", [True, False])
def test_fresh_ones_change_nothing_and_trained_copies_do(targets: tuple[str, ...], dora: bool, tmp_path: Path) -> None:
    if dora and targets == ("embed",):
        return
    a = lc.attach(tiny("gpt2"), lc.LoraSpec(targets=targets, rank=2, dora=dora))
    a.save(tmp_path)
    lc.load_adapter(tiny("gpt2"), tmp_path)  # says itself that it is fresh
    (tmp_path / "lora_lab.json").unlink()
    with pytest.raises(lc.UserError, match="would change nothing"):
        lc.load_adapter(tiny("gpt2"), tmp_path)
    with torch.no_grad():
        for n, p in a.named_parameters():
            p += 0.1 * (not n.endswith((".A", ".B")))
    a.save(tmp_path)
    (tmp_path / "lora_lab.json").unlink()
    if targets != ("embed",):
        assert lc.load_adapter(tiny("gpt2"), tmp_path)


def test_what_is_stored_is_said_without_a_model(tmp_path: Path) -> None:
    a = filled(lc.attach(tiny("gpt2"), lc.LoraSpec(targets=("q", "v", "norm"), rank=2, dora=True)))
    stored = lc.read_adapter(a.save(tmp_path))
    assert stored.dora and stored.copies.keys() == a.copies.keys()
    assert all(np.array_equal(v, a.copies[n].detach().numpy()) for n, v in stored.copies.items())
    for key, s in stored.sites.items():
        f = a.factors(key)
        assert f.m is not None and s.m is not None and np.array_equal(s.m, f.m.detach().numpy())
        assert np.array_equal(s.A, f.A.detach().numpy()) and np.array_equal(s.B, f.B.detach().numpy())
    with pytest.raises(lc.UserError, match="whose ΔW has full rank and takes W0 to know"):
        lc.spectra(stored)
    found = lc.spectra(a)
    for key, s in found.items():
        dense = torch.linalg.svdvals(a.delta(key).dense().double())
        assert np.allclose(s.singular_values, dense.numpy(), atol=1e-6) and s.rank == 32


def test_adapters_of_before_are_read_as_ever() -> None:
    """app/recorded/adapter is of this format's first days."""
    folder = Path(__file__).parents[1] / "app" / "recorded" / "adapter"
    stored = lc.read_adapter(folder)
    raw = load_file(folder / "adapter_model.safetensors")
    assert stored.spec is not None and len(stored.sites) == len(raw) // 2 > 0 and not stored.fresh
    for s in stored.sites.values():
        assert s.changes and s.layout is None and s.scaling == stored.spec.scale()
        assert np.array_equal(s.A, raw[f"base_model.model.{s.path}.lora_A.weight"])


def test_no_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(lc.UserError, match="no such folder"):
        lc.read_adapter(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(lc.UserError, match="it is a file"):
        lc.read_adapter(tmp_path / "file")


def test_an_adapter_that_changes_nothing_is_refused_unless_told(tmp_path: Path) -> None:
    folder = saved(tmp_path, fill=False)
    lc.load_adapter(tiny("llama"), folder)  # ours says itself that it is fresh
    (folder / "lora_lab.json").unlink()
    with pytest.raises(lc.UserError, match="every B"):
        lc.load_adapter(tiny("llama"), folder)
    assert lc.load_adapter(tiny("llama"), folder, allow_zero=True).deltas()


def test_for_another_model(tmp_path: Path) -> None:
    with pytest.raises(lc.UserError, match="no module 'model.layers.0.self_attn.q_proj' in GPT2LMHeadModel"):
        lc.load_adapter(tiny("gpt2"), saved(tmp_path))


def test_saving_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    a = lc.attach(tiny("llama"), lc.LoraSpec(rank=2))
    with pytest.raises(lc.UserError, match="cannot write the adapter"):
        a.save(tmp_path / "file")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = a.save(tmp_path / "kept")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(lc.UserError, match="No space left on device"):
        filled(a).save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, (
        "the old adapter is whole, nothing is left over"
    )


def test_names_come_from_the_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    odd = tmp_path / "my adapter (v2)"
    shutil.copytree(folder, odd)
    model = tiny("llama")
    assert [lc.load_adapter(model, f).name for f in (folder, folder, odd)] == [
        "adapter",
        "adapter-2",
        "my_adapter__v2_",
    ]
