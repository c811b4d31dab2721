"""Plays the script of docs/workshop.md with simulated people, as fast as the server lets it.

    python -m tests.room_workshop                 # thirty people, the real model, on a server of its own
    python -m tests.room_workshop --url http://127.0.0.1:7860 --presenter KEY --participant KEY

Each person is a client of its own that asks where the room stands as a page does, guesses, sends the curve of its Play,
takes the cell of its team and opens the wall; every reply is checked to be that person's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

SCRIPT = Path(__file__).parent.parent / "docs" / "workshop.md"
PATIENCE_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the script: minutes from the beginning, how long it takes, the key, the question of a Predict."""

    at: int
    minutes: int
    key: str
    question: dict[str, Any] | None


def script(path: Path = SCRIPT) -> list[Line]:
    """The lines of the table. ValueError for a question that cannot be read."""
    found = []
    for row in path.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in row.strip().strip("|").split("|")]
        if re.fullmatch(r"\d:\d\d", cells[0]) and len(cells) == 5:
            hours, minutes = cells[0].split(":")
            found.append(Line(at=60 * int(hours) + int(minutes), minutes=int(cells[1]), key=cells[2].lower(),
                              question=question(cells[3]) if cells[2] == "Predict" else None))  # fmt: skip
    return found


def question(words: str) -> dict[str, Any]:
    if play := re.fullmatch(r"Play `(\w+)`", words):
        return {"kind": "play", "name": play[1], "act": "play", **preset(play[1])}
    if card := re.fullmatch(r"Card `([\w-]+)`(, grid)?", words):
        return {"kind": "card", "name": card[1], "act": "grid" if card[2] else "none"}
    if words.startswith("Own "):
        text, *choices = re.findall(r'"([^"]+)"', words)
        return {"kind": "own", "text": text, "choices": choices, "act": "none"}
    raise ValueError(f"what does {words!r} ask?")


def preset(name: str) -> dict[str, Any]:
    """The words of a preset, out of the page's own module."""
    page = (SCRIPT.parent.parent / "app" / "static" / "playground.js").read_text(encoding="utf-8")
    found = re.search(rf'id: "{name}".*?q: "(.*?)", answers: \[(.*?)\], right: (\d)', page, re.S)
    assert found is not None, name
    return {"text": found[1], "choices": json.loads(f"[{found[2]}]"), "right": int(found[3])}


@dataclass
class Told:
    """What came of it."""

    people: int
    rounds: int = 0
    guesses: int = 0
    curves: int = 0
    runs: int = 0
    walls: int = 0
    faults: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        at = sorted(self.times)
        ms = {f"p{p}_ms": round(1000 * at[min(len(at) - 1, len(at) * p // 100)]) for p in (50, 95, 99)} if at else {}
        counts = {n: getattr(self, n) for n in ("people", "rounds", "guesses", "curves", "runs", "walls")}
        return counts | {"replies": len(at), "faults": len(self.faults), **ms}


class Person:
    """One participant's page."""

    def __init__(self, client: httpx.AsyncClient, told: Told, tag: str, poll_s: float) -> None:
        self.client, self.told, self.tag, self.poll_s = client, told, tag, poll_s
        self.view: dict[str, Any] = {}
        self.acted: set[tuple[Any, str]] = set()

    async def ask(self, name: str, body: dict[str, Any] | None = None, **query: Any) -> dict[str, Any]:
        began = time.perf_counter()
        if body is None:
            answer = await self.client.get(f"/lab/api/{name}", params=query)
        else:
            answer = await self.client.post(f"/lab/api/{name}", json=body)
        self.told.times.append(time.perf_counter() - began)
        found = answer.json()
        if answer.status_code != 200:
            self.told.faults.append(f"{self.tag}: {name} gave {answer.status_code}: {found}")
        return found

    async def live(self) -> None:
        await self.ask("room")
        await self.ask("room-name", {"name": self.tag})
        while True:
            now = (await self.ask("room", seen=self.view.get("version", "")))["room"]
            self.view |= now
            if "stage" in now:
                if now["name"] != self.tag:
                    self.told.faults.append(f"{self.tag} got the reply of {now['name']}")
                await self.react()
            await asyncio.sleep(self.poll_s)

    async def react(self) -> None:
        view, asked = self.view, self.view["question"]
        if asked is None:
            return
        act = (view["round"], view["stage"])
        if view["stage"] == "predict" and act not in self.acted:
            choice = view["number"] % len(asked["choices"])
            if (await self.ask("room-guess", {"round": view["round"], "choice": choice})).get("guess") == choice:
                self.acted.add(act)
                self.told.guesses += 1
        elif view["stage"] == "run" and asked["act"] == "play" and act not in self.acted:
            steps, loss = curve(view["seed"])
            kept = await self.ask("room-curve", {"round": view["round"], "seed": view["seed"], "steps": steps,
                                                 "loss": loss})  # fmt: skip
            self.acted.add(act)
            self.told.curves += bool(kept.get("kept"))
        elif view["stage"] == "run" and asked["act"] == "grid" and act not in self.acted and view.get("grid"):
            self.acted.add(act)
            teams = view["grid"]["teams"] or len(view["grid"]["places"])
            if view["number"] <= teams:  # one of a team presses
                place = next(i for i, p in enumerate(view["grid"]["places"]) if p["dealt"])
                if "error" in (answer := await self.ask("room-take", {"place": place})):
                    self.told.faults.append(f"{self.tag}: {answer['error']}")
        elif view["stage"] in ("reveal", "discuss") and act not in self.acted:
            self.acted.add(act)
            wall = (await self.ask("room-wall"))["wall"]
            if wall is None or sum(wall["guesses"]["counts"]) != view["guessed"]:
                self.told.faults.append(f"{self.tag}: the wall has {wall and wall['guesses']['counts']}")
            self.told.walls += 1


def curve(seed: int) -> tuple[int, list[float]]:
    """The curve that a browser would send."""
    from lora_core.toy import Toy, train

    loss = train(Toy(seed=seed), 120).loss
    return 120, [float(loss[round(i * 120 / 40)]) for i in range(41)]


async def play(url: str, presenter: str, participant: str, *, people: int = 30, poll_s: float = 0.3,
               grid: dict[str, Any] | None = None, only: Collection[int] = ()) -> Told:  # fmt: skip
    """Play the script, or only some of its rounds (from 0); raises TimeoutError when the room does not move."""
    told = Told(people)
    limits = httpx.Limits(max_connections=4, max_keepalive_connections=4)

    async def come(key: str) -> httpx.AsyncClient:
        client = httpx.AsyncClient(base_url=url, timeout=60, follow_redirects=True, limits=limits)
        assert (await client.get(f"/lab/api/ping?key={key}")).status_code == 200
        return client

    host = Person(await come(presenter), told, "presenter", poll_s)
    chosen = {"ranks": [1, 8, 64], "targets": [["q", "v"], "all"], "task": "restaurant", "steps": 30, "teams": 6,
              "minutes": 8, **(grid or {})}  # fmt: skip
    answer = await host.ask("room-grid", chosen)
    assert "grid" in answer, answer
    room = [Person(c, told, f"p{i}", poll_s) for i, c in enumerate(await asyncio.gather(
        *(come(participant) for _ in range(people))))]  # fmt: skip
    tasks = [asyncio.create_task(p.live()) for p in room]
    try:
        await until(host, lambda v: v["people"] == people)
        number = -1
        for line in script():
            for task in tasks:
                if task.done():
                    task.result()  # raises what ended it
            number += line.key == "predict"
            if not line.key or only and number not in only:
                continue
            body = {"stage": line.key, **({"question": line.question} if line.question else {})}
            if "error" in (answer := await host.ask("room-step", body)):
                told.faults.append(f"{line.key}: {answer['error']}")
            if line.key == "predict":
                told.rounds += 1
                await until(host, lambda v: v["guessed"] == people)
            elif line.key == "run":
                act = host.view["question"]["act"]
                teams = min(people, chosen["teams"] or people)
                if act == "play":
                    await until(host, lambda v: v["curves"] == people)
                else:
                    await until(host, lambda v, n=teams: len(v["grid"]["cells"]) == n and all(
                        c["status"] in ("done", "failed") for c in v["grid"]["cells"]))  # fmt: skip
                    told.runs += sum(c["status"] == "done" for c in host.view["grid"]["cells"])
            else:
                shown = told.walls
                await until(host, lambda v, n=shown: told.walls >= n + people)
        return told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for p in [host, *room]:
            await p.client.aclose()


def played(url: str, keys: dict[str, str], **more: Any) -> Told:
    """`play` in a thread of its own, since a browser of other tests may have an event loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(play(url, keys["presenter"], keys["participant"], **more))).result()


async def until(host: Person, condition: Any) -> None:
    """Wait for it as long as the room goes on: each step of a training makes its version another one."""
    version, end = "", time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        host.view |= (await host.ask("room", seen=host.view.get("version", "")))["room"]
        if condition(host.view):
            return
        if host.view["version"] != version:
            version, end = host.view["version"], time.monotonic() + PATIENCE_S
        await asyncio.sleep(host.poll_s)
    raise TimeoutError(f"the room does not go on: {host.view['stage']}, {host.told.figures()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Play the workshop's script with simulated people.")
    parser.add_argument("--people", type=int, default=30)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--url")
    parser.add_argument("--presenter")
    parser.add_argument("--participant")
    given = parser.parse_args()
    from tests.room_server import serving

    if given.url:
        told = asyncio.run(play(given.url, given.presenter, given.participant, people=given.people,
                                grid={"steps": given.steps}))  # fmt: skip
    else:
        with serving() as (url, keys):
            told = asyncio.run(play(url, keys["presenter"], keys["participant"], people=given.people,
                                    grid={"steps": given.steps}))  # fmt: skip
    print(json.dumps(told.figures()))
    print("\n".join(told.faults[:20]), file=sys.stderr)
    sys.exit(bool(told.faults))


if __name__ == "__main__":
    main()
