"""`lora-lab spectra` and `audit` of single files, zips and whole checkpoints."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import lora_core as lc
from tests.cli_kit import Call, only_json, wrong


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = lc.load_model(tiny, dtype="float32")
    a = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=2, alpha=2))
    with torch.no_grad():
        for p in a.parameters():
            p.normal_()
    a.save(folder := tmp_path_factory.mktemp("made") / "adapter")
    return folder


def test_a_file_and_a_zip_have_the_folders_numbers(call: Call, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "a"), "zip", adapter)
    for command in ("spectra", "audit"):
        status, out, _ = call(command, adapter, "--json")
        assert status == 0
        whole = only_json(out)["matrices"]
        for other in (adapter / "adapter_model.safetensors", tmp_path / "a.zip"):  # α/r is 1 here
            status, out, err = call(command, other, "--json")
            assert status == 0, err
            found = only_json(out)
            assert found["matrices"] == whole and found["kind"] == "PEFT"
    status, out, _ = call("spectra", adapter, "--base", tiny, "--json")
    theirs = only_json(out)["matrices"]
    status, out, _ = call("spectra", tmp_path / "a.zip", "--base", tiny, "--json")
    for mine, other in zip(only_json(out)["matrices"], theirs, strict=True):
        assert mine["amplification"] == pytest.approx(other["amplification"], rel=1e-4)
        assert mine["base_norm"] == pytest.approx(other["base_norm"], rel=1e-4)


def test_a_kohya_file_is_told_with_its_metadata(call: Call, tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    name = "lora_unet_up_blocks_1_attentions_0_proj_in"
    save_file({f"{name}.lora_down.weight": g.standard_normal((4, 10), np.float32),
               f"{name}.alpha": np.array(4, np.float32),
               f"{name}.lora_up.weight": g.standard_normal((6, 4), np.float32)},
              tmp_path / "k.safetensors", metadata={"ss_output_name": "ink"})  # fmt: skip
    status, out, _ = call("spectra", tmp_path / "k.safetensors", "--json")
    found = only_json(out)
    assert status == 0 and found["kind"] == "kohya" and found["metadata"]["ss_output_name"] == "ink"
    assert found["matrices"][0]["target"] == "proj_in" and len(found["matrices"][0]["singular_values"]) == 4
    status, out, _ = call("audit", tmp_path / "k.safetensors")
    assert status == 0 and name in out


def test_a_checkpoint_beside_its_base(call: Call, tiny: Path, tmp_path: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    spike = torch.outer(torch.ones(32), torch.ones(32))
    for n, w in weights.items():
        if "q_proj" in n:
            w += 0.1 * spike + 0.001 * torch.randn(w.shape)
    save_torch(weights, tmp_path / "tuned.safetensors")
    status, out, err = call("audit", tmp_path / "tuned.safetensors", "--model", tiny, "--json")
    found = {m["path"]: m for m in only_json(out)["matrices"]}
    assert status == 0, err
    one = found["model.layers.0.self_attn.q_proj"]
    assert one["rank"] == 32 and one["mp_rank"] == 1, "one direction stands out of the noise of a whole matrix"
    assert one["norm"] == pytest.approx(3.2, rel=0.01) and found["model.layers.0.self_attn.v_proj"]["word"] == "dead"
    wrong(call("spectra", tmp_path / "tuned.safetensors"), "is a whole model, not an adapter")
    wrong(call("spectra", tmp_path / "tuned.safetensors", "--base", "no/model"), "is not on this machine")


def test_what_is_refused(call: Call, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps([1]))
    wrong(call("spectra", tmp_path / "x.pt"), "is a pickle")
    wrong(call("audit", tmp_path / "x.pt"), "is a pickle")
    wrong(call("audit", adapter / "adapter_model.safetensors", "--task", "restaurant"), "nothing can be measured")
    wrong(call("spectra", tmp_path / "none.safetensors"), "no adapter at")


def test_a_file_needs_no_torch(adapter: Path) -> None:
    code = ("import sys; from app import cli; status = cli.run(['audit', sys.argv[1], '--json']);"
            "assert status == 0 and not {'torch', 'transformers'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(adapter / "adapter_model.safetensors")], check=True,
                   capture_output=True)  # fmt: skip
