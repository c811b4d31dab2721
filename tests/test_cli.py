"""The command line, on a tiny model: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from app import cli
from app.commands import serve
from app.commands import train as train_command
from lora_core.errors import UserError
from tests.model_folder import tiny_llama

Call = Callable[..., tuple[int, str, str]]
FOODS = ("good", "odd")
ROWS = "\n".join(f"name : Place {i} | food : {f}||Place {i} serves {f} food." for i in range(20) for f in FOODS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs one command line in this process, with a home of its own: (exit status, stdout, stderr)."""
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("lora_core.machine.measure", lambda dtype, on="cpu": {"float32": 1e11, "bfloat16": 1e10}[dtype])

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(w) for w in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.txt"
    file.write_text(ROWS)
    return file


def short(tiny: Path, rows: Path, *more: object) -> tuple[object, ...]:
    """A training of four steps."""
    return ("train", "--model", tiny, "--data", rows, "--steps", 4, "--batch-size", 4, "--rank", 2, "--lr", 0.05, *more)


def only_json(out: str) -> dict[str, Any]:
    """The one JSON object that standard output holds, and nothing else."""
    assert out.count("\n") == 1 and out.endswith("\n")
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


def wrong(result: tuple[int, str, str], words: str) -> None:
    """Exit status 2, nothing on standard output, one line on standard error."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("lora-lab: ") and words in last
    assert "Traceback" not in err


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
        if field.name == "targets":
            assert options["targets"].split(",") == spec["targets"]
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
    assert {t["name"] for t in only_json(out)["tasks"]} >= {"restaurant", "json", "sentiment", "pirate", "new-language"}


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


# ---- runs ---------------------------------------------------------------------------------------------------------
def test_ctrl_c_keeps_the_run_and_resume_goes_on(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """A process of its own, interrupted in the middle: exit status 130, the adapter kept; resume reaches the end."""
    environment = {**os.environ, "LORA_LAB_HOME": str(tmp_path / "home"), "PYTHONUNBUFFERED": "1"}
    words = [str(w) for w in short(tiny, rows, "--out", tmp_path / "a", "--checkpoint-every", 1, "--json")]
    words[words.index("--steps") + 1] = "100000"
    lab = [sys.executable, "-m", "app.cli"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*lab, *words], env=environment, **pipes)
    assert process.stdout and process.stderr
    errors, lines = process.stderr, list[str]()
    reader = threading.Thread(target=lambda: lines.extend(errors))
    reader.start()
    events = tmp_path / "home" / "runs" / "000001" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (events.exists() and events.read_text().count('"step"') > 20):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    assert process.wait(60) == 130, "".join(lines)
    reader.join()
    value = only_json(out)
    assert value["status"] == "interrupted" and 0 < value["steps"] < 100000
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert "lora-lab runs resume 1" in "".join(lines)

    shown = subprocess.run([*lab, "runs", "show", "1", "--json"], capture_output=True, text=True, env=environment)
    assert json.loads(shown.stdout)["runs"][0]["status"] == "interrupted"


def test_resume_and_delete(call: Call, tiny: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at = 2
    real = train_command.Watch.event

    def stop(self: Any, event: Any) -> None:
        real(self, event)
        if event["kind"] == "step" and event["step"] == stop_at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_command.Watch, "event", stop)
    status, out, _ = call(*short(tiny, rows, "--checkpoint-every", 1, "--json"))
    assert status == 130 and only_json(out)["steps"] == 2
    monkeypatch.setattr(train_command.Watch, "event", real)
    status, out, _ = call("runs", "resume", 1, "--out", tmp_path / "a", "--json")
    value = only_json(out)
    assert (status, value["status"], value["steps"]) == (0, "done", 4)
    assert value["runs"][0]["id"] == 1 and (tmp_path / "a" / "adapter_config.json").exists()
    wrong(call("runs", "resume", 1), "run 1 has ended already")
    status, out, _ = call("runs", "delete", 1, "--json")
    assert (status, only_json(out)["runs"]) == (0, [])
    wrong(call("runs", "show", 1), "no run '1' in this store")
    wrong(call("runs", "delete", 1), "no run '1'")


# ---- serve --------------------------------------------------------------------------------------------------------
def test_a_port_in_use_is_told_and_the_next_one_taken(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(serve, "fetch_default", lambda: None)
    monkeypatch.setattr(serve, "start", lambda **settings: started.append(settings))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, out, err = call("serve", "--port", port, "--no-browser")
    assert status == 0 and out == ""
    assert started[0]["port"] > port and started[0]["host"] == "127.0.0.1" and not started[0]["open_browser"]
    assert err == f"port {port} is in use; taking port {started[0]['port']} instead\n"


def test_addresses_that_cannot_be() -> None:
    with pytest.raises(UserError, match="port is 70000; ports go from 1 to 65535"):
        serve.free_port("127.0.0.1", 70000)
    with pytest.raises(UserError, match="host '192.0.2.7' is not an address of this machine"):
        serve.free_port("192.0.2.7", 7860)
    with pytest.raises(UserError, match="host 'no such host' is no address"):
        serve.free_port("no such host", 7860)


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "TRIES", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="all in use; name another with --port"):
            serve.free_port("127.0.0.1", taken.getsockname()[1])


def test_the_page_starts_without_its_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable(name: str) -> None:
        raise UserError("cannot fetch the package")

    monkeypatch.setattr("lora_core.embedded.fetch", unreachable)
    serve.fetch_default()
    assert capsys.readouterr().err == "the page starts without its default model: cannot fetch the package\n"


# ---- how things are told ------------------------------------------------------------------------------------------
def test_sizes_and_durations() -> None:
    from app.commands.output import duration, plain, size, table

    sizes = {0: "0 B", 999: "999 B", 1858776: "1.86 MB", 269e6: "269 MB", 1.3e9: "1.3 GB", 2e12: "2000 GB"}
    assert {n: size(n) for n in sizes} == sizes
    times = {0.2: "1 s", 59.4: "59 s", 60: "1 min", 161: "2 min 41 s", 3900: "1 h 5 min"}
    assert {s: duration(s) for s in times} == times
    assert plain({"a": float("nan"), "b": [float("inf"), 1]}) == {"a": None, "b": [None, 1]}
    assert table([("a", "n"), ("bb", "10")], right=(1,)) == "a    n\nbb  10"
