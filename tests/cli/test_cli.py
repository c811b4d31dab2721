"""The command line, on a tiny model: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from app.commands import train as train_command
from lora_core.errors import UserError
from tests.cli_kit import Call, only_json, short, wrong


# ---- the frame ----------------------------------------------------------------------------------------------------
def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from app import cli; status = cli.run(['train', '--help']);"
        "heavy = {'torch', 'transformers', 'gradio', 'numpy'} & set(sys.modules);"
        "print('HEAVY', status, heavy or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--rank" in done.stdout and "HEAVY 0 none" in done.stdout


def test_the_options_are_the_settings_with_their_defaults() -> None:
    """The command line cannot drift away from LoraSpec and TrainConfig."""
    from lora_core import LoraSpec, TrainConfig

    options = {n: p.default for n, p in inspect.signature(train_command.train).parameters.items()}
    for name, default in TrainConfig().to_dict().items():
        assert options[name] == default, name
    spec = LoraSpec().to_dict()
    for field in fields(LoraSpec):
        if field.name in ("targets", "full"):
            assert [n for n in options[field.name].split(",") if n] == spec[field.name]
        elif not field.name.endswith("_pattern"):  # ranks by matrix are for Python
            assert options[field.name] == spec[field.name], field.name


def test_usage_errors_are_one_line(call: Call) -> None:
    wrong(call("trian"), "No such command 'trian'. Did you mean 'train'?")
    wrong(call("train", "--rnak", "3"), "No such option: --rnak")
    wrong(call("train", "--rank", "many"), "Invalid value for '--rank'")
    wrong(call("compare"), "Missing")


def test_an_unexpected_error_leaves_a_log(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of\nthe blue")

    monkeypatch.setattr("lora_core.models.registry", broken)
    status, out, err = call("models", "--json")
    assert (status, out) == (1, "")
    assert err == f"lora-lab: RuntimeError: out of the blue; details are in {tmp_path / 'home' / 'log.txt'}\n"
    assert "Traceback" in (tmp_path / "home" / "log.txt").read_text()


def test_a_home_that_cannot_be_written(call: Call, monkeypatch: pytest.MonkeyPatch, tiny: Path, rows: Path) -> None:
    monkeypatch.setenv("LORA_LAB_HOME", str(rows / "in" / "a" / "file"))
    wrong(call(*short(tiny, rows)), "a file is in the way")


# ---- models and budget --------------------------------------------------------------------------------------------
def test_models(call: Call) -> None:
    status, out, _ = call("models", "--json")
    listed = {m["name"]: m for m in only_json(out)["models"]}
    assert status == 0 and listed["smollm2-135m"]["source"] == "embedded"
    assert set(listed["gpt2"]) >= {"name", "parameters", "source", "cached"}
    assert listed["smollm2-135m"]["cached"] is False  # this home is empty
    status, out, _ = call("models")
    assert status == 0 and "qwen3-0.6b" in out


def test_budget(call: Call, tiny: Path) -> None:
    status, out, _ = call("budget", tiny, "--targets", "q,v", "--rank", 4, "--json")
    value = only_json(out)
    assert status == 0
    assert value["trainable"] == 2 * 4 * ((32 + 32) + (16 + 32))  # layers · r · (out + in) of q and v
    assert value["per_target"] == {"q": 512, "v": 384}
    assert value["train_bytes"] < value["full_train_bytes"] and value["file_bytes"] > 4 * value["trainable"]
    assert value["factors"] == value["trainable"] and value["head"] == value["direct"] == 0
    for whole, parts in (("train_bytes", "memory"), ("full_train_bytes", "full_memory")):
        assert sum(value[parts].values()) == value[whole]
    _, out, _ = call("budget", tiny, "--labels", 3, "--full", "head", "--targets", "q,norm", "--dora")
    assert f"{3 * 32:,}" in out and all(f"\n  {part}" in out for part in ("factors", "head", "direct", "magnitudes"))
    assert "gradients" in out and "activations" in out and "for norm" in out
    _, out, _ = call("budget", tiny, "--layers", "1", "--rank", 4, "--json")
    assert only_json(out)["trainable"] == value["trainable"] // 2


def test_budget_of_what_cannot_be(call: Call, tiny: Path) -> None:
    wrong(call("budget", "smollm"), "no model 'smollm'; possible: smollm2-135m")
    wrong(call("budget", tiny, "--targets", "q,qproj"), "no matrix 'qproj' in LlamaForCausalLM")
    wrong(call("budget", tiny, "--targets", ","), "no target")
    wrong(call("budget", tiny, "--rank", 0), "rank is 0")
    wrong(call("budget", tiny, "--rank", 17, "--targets", "v"), "rank 17 is above the smaller side")
    wrong(call("budget", tiny, "--layers", "7"), "no layer 7")
    wrong(call("budget", tiny, "--layers", "3-1"), "layers are 'all', or numbers and ranges")
    wrong(call("budget", tiny, "--dtype", "float16"), "no dtype 'float16'")
    wrong(call("budget", tiny, "--labels", 1), "labels is 1; a classifier needs at least two")


def test_layers() -> None:
    from app.commands.options import layers_of

    assert layers_of("all") == "all"
    assert layers_of("0, 2,4-6") == (0, 2, 4, 5, 6)
    for bad in ("", "a", "1-", "-1", "2-1", "1;2"):
        with pytest.raises(UserError):
            layers_of(bad)


# ---- train, and what is done with its adapter ---------------------------------------------------------------------
def test_train_compare_eval_spectra_merge(call: Call, tiny: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    status, printed, err = call(*short(tiny, rows, "--out", out, "--title", "first", "--json"))
    value = only_json(printed)
    assert status == 0, err
    assert set(value) >= {"run", "adapter", "steps", "train_s", "tokens_per_s", "dtype", "device", "loss_before",
                          "loss_after", "trainable", "peak_bytes"}  # fmt: skip
    assert (value["status"], value["steps"], value["adapter"], value["dtype"]) == ("done", 4, str(out), "float32")
    assert value["trainable"] == 2 * 2 * (64 + 48) and value["peak_bytes"] > 1 << 20
    assert value["loss_after"] < value["loss_before"]
    assert "about " in err and "held-out loss after step 4" in err
    assert value["effect"]["loss_after"] == value["loss_after"] and value["effect"]["counted"] > 0
    assert re.search(r"4 steps in \d+ s", err) and "‖ΔW‖ is" in err and value["effect"]["advice"] in err
    assert {"adapter_config.json", "adapter_model.safetensors", "lora_lab.json"} <= {p.name for p in out.iterdir()}

    status, printed, _ = call("runs", "list", "--json")
    (run,) = only_json(printed)["runs"]
    assert (run["id"], run["name"], run["status"]) == (value["run"], "first", "done")

    prompt = "name : Place 1 | food : odd"
    status, printed, _ = call("compare", out, "--prompt", prompt, "--prompt", "x", "--max-new-tokens", 5, "--json")
    value = only_json(printed)
    assert status == 0 and value["template"] == "{prompt} ->" and value["model"] == str(tiny)
    assert [o["prompt"] for o in value["outputs"]] == [prompt, "x"]
    assert all(set(o) == {"prompt", "base", "adapted"} for o in value["outputs"])
    assert not any(o[side].startswith(o["prompt"]) for o in value["outputs"][:1] for side in ("base", "adapted"))
    status, again, _ = call("compare", run["id"], "--prompt", prompt, "--prompt", "x", "--max-new-tokens", 5, "--json")
    assert json.loads(again)["outputs"] == value["outputs"]  # a run's number stands for its adapter

    status, printed, _ = call("eval", out, "--data", rows, "--score-rows", 2, "--json")
    value = only_json(printed)
    assert status == 0 and value["rows"] == value["of"] == 40
    assert value["adapted"]["loss"] < value["base"]["loss"]
    assert value["base"]["tokens"] == value["adapted"]["tokens"] > 40
    assert set(value["base"]["score"]) == set(value["adapted"]["score"]) != set()
    status, printed, _ = call("eval", out, "--data", rows, "--rows", 8, "--score-rows", 0, "--json")
    assert only_json(printed)["rows"] == 8 and json.loads(printed)["base"]["score"] is None

    status, printed, _ = call("spectra", out, "--json")
    matrices = only_json(printed)["matrices"]
    assert len(matrices) == 4 and {m["target"] for m in matrices} == {"q", "v"}
    for m in matrices:
        assert m["rank"] == 2 and len(m["singular_values"]) >= 2 and m["singular_values"][0] > 0
        assert m["norm"] == pytest.approx(sum(s * s for s in m["singular_values"]) ** 0.5)
    status, printed, _ = call("spectra", out, "--base", tiny, "--json")
    for m in only_json(printed)["matrices"]:
        assert m["relative_norm"] == pytest.approx(m["norm"] / m["base_norm"], rel=1e-4) and m["amplification"] > 0

    merged = tmp_path / "merged"
    status, printed, _ = call("merge", out, "--out", merged, "--json")
    value = only_json(printed)
    assert status == 0 and value["path"] == str(merged) and 0 <= value["max_error"] < 1e-4
    check_merged(tiny, out, merged)
    for command in (("compare", out, "--prompt", "x"), ("eval", out, "--data", rows), ("spectra", out),
                    ("runs", "list"), ("runs", "show", run["id"], "--events")):  # fmt: skip
        status, printed, _ = call(*command)  # the same for people
        assert status == 0 and len(printed.splitlines()) > 1 and not printed.startswith("{")


def check_merged(tiny: Path, adapter: Path, merged: Path) -> None:
    """The merged folder is a plain model: transformers alone loads it, and it computes what base plus adapter do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lora_core as lc

    plain = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    base, _ = lc.load_model(tiny, device="cpu", dtype="float32")
    ids = torch.tensor([tokenizer("name : The Copper Kettle").input_ids])
    with torch.no_grad():
        before = base(ids).logits
        lc.load_adapter(base, adapter)
        adapted = base(ids).logits
        found = plain(ids).logits
    assert torch.allclose(found, adapted, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)


def test_spectra_needs_no_torch(call: Call, tiny: Path, rows: Path, tmp_path: Path) -> None:
    call(*short(tiny, rows, "--out", tmp_path / "a"))
    code = (
        "import sys; from app import cli; status = cli.run(['spectra', sys.argv[1], '--json']);"
        "assert status == 0 and not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    only_json(done.stdout)


def test_train_with_wrong_input_keeps_no_run(call: Call, tiny: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "halves.txt").write_text("a||b\nc||\n")
    (tmp_path / "rows.bin").write_bytes(b"\x00\xff")
    base = ("train", "--model", tiny, "--steps", 2)
    wrong(call(*base), "a run needs either a task or a data file; neither given")
    wrong(call(*base, "--task", "pirate", "--data", rows), "both given")
    wrong(call(*base, "--task", "pirat"), "no task 'pirat'; possible: restaurant")
    wrong(call(*base, "--data", tmp_path / "absent.txt"), "absent.txt")
    wrong(call(*base, "--data", tmp_path / "empty.txt"), "empty.txt")
    wrong(call(*base, "--data", tmp_path / "halves.txt"), "line 2")
    wrong(call(*base, "--data", tmp_path / "rows.bin"), ".bin")
    wrong(call("train", "--model", "gpt3", "--data", rows), "no model 'gpt3'; possible: ")
    wrong(call(*base, "--data", rows, "--targets", "q,x"), "no matrix 'x'")
    wrong(call(*base, "--data", rows, "--rank", 17), "rank 17 is above the smaller side")
    wrong(call(*base, "--data", rows, "--lr", 0), "lr is 0")
    wrong(call(*base, "--data", rows, "--schedule", "linaer"), "did you mean 'linear'")
    wrong(call(*base, "--data", rows, "--out", rows / "inside"), "cannot write to")
    status, out, _ = call("runs", "list", "--json")
    assert (status, only_json(out)["runs"]) == (0, [])


def test_tasks_are_listed(call: Call) -> None:
    _, out, _ = call("train", "--task", "list", "--json")
    names = {"restaurant", "json", "sentiment", "pirate", "new-language", "plain"}
    assert {t["name"] for t in only_json(out)["tasks"]} >= names


def test_a_diverging_run_says_so(call: Call, tiny: Path, rows: Path) -> None:
    status, out, err = call("train", "--model", tiny, "--data", rows, "--steps", 30, "--lr", 1e6, "--clip", 0,
                            "--alpha", 1e30, "--json")  # fmt: skip
    assert status == 1
    assert only_json(out)["status"] == "diverged"
    assert "Try a learning rate ten times smaller" in err.splitlines()[-1] and "Traceback" not in err


def test_adapters_that_cannot_be_used(call: Call, tmp_path: Path, tiny: Path, rows: Path) -> None:
    wrong(call("spectra", tmp_path / "nowhere"), "no adapter at")
    wrong(call("compare", "14", "--prompt", "x"), "no run '14'")
    call(*short(tiny, rows, "--out", tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    (tmp_path / "a" / "lora_lab.json").unlink()
    wrong(call("compare", tmp_path / "a", "--prompt", "x"), "does not say which model it belongs to; name it with")
    status, out, _ = call("compare", tmp_path / "a", "--prompt", "x", "--model", tiny, "--max-new-tokens", 2, "--json")
    assert status == 0 and only_json(out)["template"] == "{prompt}"
    wrong(call("eval", tmp_path / "a"), "give either --data FILE or --task NAME")
    wrong(call("merge", tmp_path / "a", "--model", tiny, "--out", tmp_path / "a"), "holds what is being merged")
