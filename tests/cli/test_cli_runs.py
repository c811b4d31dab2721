"""The command line: runs that are interrupted, gone on with and deleted, and the page that it serves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app.commands import serve
from app.commands import train as train_command
from lora_core.errors import UserError
from tests.cli_kit import Call, only_json, short, wrong


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


def test_a_room_is_asked_for_and_only_on_this_machine_at_first(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(serve, "fetch_default", lambda: None)
    monkeypatch.setattr(serve, "start", lambda **settings: started.append(settings))
    assert call("serve", "--room", "--port", "0")[0] == call("serve", "--port", "0")[0] == 0
    assert call("serve", "--room", "--minutes", "7.5", "--port", "0")[0] == 0
    assert [(s["room"], s["minutes"]) for s in started] == [(True, None), (False, None), (True, 7.5)]
    assert {s["host"] for s in started} == {"127.0.0.1"}


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
