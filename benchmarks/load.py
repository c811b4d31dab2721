"""A room full of people on two cores while a training runs: `python -m benchmarks.load [--seconds 600] …`.

A server of its own (`lora-lab serve --room`) trains; 30 people arrive within one second; then 30 people and 5 browsers
stay; then sessions come one after another. The last line printed is the JSON object with the figures. It fails where
an answer was wrong, lost or somebody else's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.kit import ROOT
from benchmarks.load_people import Notes, Person, burst, crowd, one_after_another

SAMPLE_S = 1.0
LONG = {"steps": 1_000_000, "batch_size": 8, "eval_rows": 0, "max_tokens": 64}


class Server:
    """`lora-lab serve --room` in a process of its own, on a folder of its own.

    model     None for the default one; else a folder
    stand_in  a training without a model, which keeps a processor as busy
    """

    def __init__(self, home: Path, model: str | None = None, stand_in: bool = False) -> None:
        env = {**os.environ, "LORA_LAB_HOME": str(home), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.load", "--serve", model or "", *["--stand-in"] * stand_in]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)  # fmt: skip
        assert self.process.stdout is not None
        self.said: list[str] = []
        self.url = ""
        for line in self.process.stdout:
            self.said.append(line)
            if "LoRA Lab is at" in line:
                self.url = line.split()[4].partition("/?")[0]
                break
        else:
            raise RuntimeError("the server ended: " + "".join(self.said)[-2000:])
        threading.Thread(target=self.said.extend, args=(self.process.stdout,), daemon=True).start()
        keys = json.loads((home / "keys.json").read_text())
        self.participant: str = keys["participant"]
        self.presenter = httpx.Client(base_url=self.url, timeout=120, follow_redirects=True)
        self.presenter.get(f"/?key={keys['presenter']}").raise_for_status()

    def ask(self, name: str, **body: Any) -> Any:
        found = self.presenter.post(f"/lab/api/{name}", json=body) if body else self.presenter.get(f"/lab/api/{name}")
        return found.json()

    def stop(self) -> None:
        self.presenter.close()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Sampler(threading.Thread):
    """What the server's process uses, once a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.over = psutil.Process(pid), threading.Event()
        self.rows: list[tuple[float, float, int, int]] = []  # seconds, MB, descriptors, threads

    def run(self) -> None:
        began = time.monotonic()
        while not self.over.wait(SAMPLE_S):
            with suppress(psutil.Error):
                p = self.process
                self.rows.append((time.monotonic() - began, p.memory_info().rss / 1e6, p.num_fds(), p.num_threads()))

    def told(self) -> dict[str, Any]:
        """First and last values, and slopes an hour by least squares over the last two thirds."""
        self.over.set()
        self.join()
        late = self.rows[len(self.rows) // 3 :]
        if len(late) < 3:
            return {}
        out: dict[str, Any] = {"samples": len(self.rows)}
        for i, name in enumerate(("MB", "descriptors", "threads"), 1):
            values = [r[i] for r in self.rows]
            slope = statistics.linear_regression([r[0] for r in late], [r[i] for r in late]).slope
            out[name] = {"first": round(values[0], 1), "last": round(values[-1], 1), "most": round(max(values), 1),
                         "an_hour": round(3600 * slope, 1)}  # fmt: skip
        return out


@contextmanager
def sampled(server: Server, into: dict[str, Any], name: str) -> Iterator[None]:
    sampler = Sampler(server.process.pid)
    sampler.start()
    began = time.monotonic()
    try:
        yield
    finally:
        into[name] = {"seconds": round(time.monotonic() - began, 1), **sampler.told()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median, 95th percentile, most; and how many."""
    v = sorted(values)
    return {"n": len(v), "p50": round(1000 * v[len(v) // 2], 1), "p95": round(1000 * v[int(0.95 * (len(v) - 1))], 1),
            "most": round(1000 * v[-1], 1)}  # fmt: skip


def told(notes: Notes) -> dict[str, Any]:
    return {"ms": {k: spread(v) for k, v in sorted(notes.seconds.items())}, "tagged": notes.tagged,
            "errors": notes.errors[:20], "crossed": notes.crossed[:20], "lost": notes.lost[:20]}  # fmt: skip


def browsers(url: str, key: str, count: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.load_browsers", f"{url}/?key={key}", str(count), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def load(server: Server, model: str, *, people: int, seconds: float, arrivals: int, sessions: int, browsers_: int = 0,
         sessions_s: float = 1e9, assets: int = 1000, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """All three parts; {"arrivals", "people", "sessions"}, each with its figures."""
    out: dict[str, Any] = {}
    run = server.ask("train", model=model, spec={"rank": 4}, config=LONG, data={"task": "sentiment"})["run"]
    until = time.monotonic() + 120
    while server.presenter.get(f"/lab/api/run?run={run}").json()["step"] < 1 and time.monotonic() < until:
        time.sleep(0.5)

    def person(notes: Notes) -> Person:
        return Person(server.url, server.participant, model, notes)

    def part(name: str, work: Any) -> None:
        notes = Notes()
        with sampled(server, out, name):
            more = work(notes)
        out[name] |= told(notes) | (more or {})

    def many(notes: Notes) -> dict[str, Any]:
        opened = browsers(server.url, server.participant, browsers_, seconds) if browsers_ else None
        asyncio.run(crowd([person(notes) for _ in range(people)], seconds, assets, seed))
        if opened is None:
            return {}
        said, wrong = opened.communicate(timeout=240)
        found = json.loads(said.strip().splitlines()[-1]) if opened.returncode == 0 else {"errors": [wrong[-500:]]}
        notes.errors.extend(found.pop("errors"))
        return {"browsers": found, "errors": notes.errors[:20]}

    def after(notes: Notes) -> dict[str, Any]:
        until = time.monotonic() + sessions_s
        return {"sessions": asyncio.run(one_after_another(lambda: person(notes), sessions, until))}

    try:
        part("arrivals", lambda notes: asyncio.run(burst([person(notes) for _ in range(arrivals)], assets)))
        part("people", many)
        part("sessions", after)
        out["trained_steps"] = server.presenter.get(f"/lab/api/run?run={run}").json()["step"]
    finally:
        for known in server.ask("runs")["runs"]:
            if known["status"] in ("queued", "running"):
                server.ask("stop", run=known["id"])
    return out


def faults(figures: dict[str, Any]) -> list[str]:
    """What may not be: any error, a lost or a crossed reply."""
    return [f"{name}: {text}" for name, part in figures.items() if isinstance(part, dict)
            for kind in ("errors", "crossed", "lost") for text in part.get(kind, [])]  # fmt: skip


def serve(model: str, stand_in: bool) -> None:
    """The server's process."""
    from functools import partial

    from app.commands.serve import share_processors

    share_processors()
    from app import server
    from app.pages.room import open_room
    from tests.runs_kit import STAND_IN

    if stand_in:
        server.RunQueue = partial(server.RunQueue, command=STAND_IN)  # type: ignore[assignment]

    if model:
        server.create_app = partial(server.create_app, model=model)  # type: ignore[assignment]
        server.open_room = partial(open_room, model=model)  # type: ignore[assignment]
    server.serve(port=0, open_browser=False, room=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("--serve", metavar="MODEL", help="what the server's process is started with")
    parser.add_argument("--stand-in", action="store_true", help="with --serve: a training without a model")
    parser.add_argument("--people", type=int, default=30)
    parser.add_argument("--browsers", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--arrivals", type=int, default=30)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--sessions-s", type=float, default=1e9, help="end the sessions after so many seconds")
    parser.add_argument("--assets", type=int, default=1000, help="files of the page that each arrival fetches at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers in place of the default one")
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, given.stand_in)
        return 0
    from tests.browser.conftest import own_home
    from tests.model_folder import tiny_llama

    with tempfile.TemporaryDirectory() as folder:
        home = own_home(Path(folder))
        model = str(tiny_llama(home / "tiny")) if given.tiny else "smollm2-135m"
        server = Server(home, model if given.tiny else None)
        try:
            figures = load(server, model, people=given.people, seconds=given.seconds, arrivals=given.arrivals,
                           sessions=given.sessions, browsers_=given.browsers, sessions_s=given.sessions_s,
                           assets=given.assets, seed=given.seed)  # fmt: skip
        finally:
            server.stop()
    figures["beside"] = f"load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} processors, the clients among it"
    wrong = faults(figures)
    print(json.dumps(figures))
    if wrong:
        print("\n".join(wrong[:20]), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
