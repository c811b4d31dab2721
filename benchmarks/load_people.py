"""Simulated participants: HTTP clients that ask what the page asks, in the page's order, and check what they get.

Everybody has a tag of their own, which stands in the name of their file, in their runs and in what they have written.
A reply with somebody else's tag is a crossed one; one without their own, where it should have it, is a lost one.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx

TAG = re.compile(r"tag-[0-9a-f]{8}")
ASSET = re.compile(r"(?:assets/[\w.-]+\.(?:js|css)|lab/static/[0-9a-f]+/[\w.-]+)")
SPEC = {"targets": ["q", "v"], "rank": 4}
CONFIG = {"steps": 4, "batch_size": 2, "eval_rows": 2, "max_tokens": 32}
POLL_S, ROOM_S, THINK_S = 1.0, 1.5, (1.0, 6.0)
LONGEST_S = 60.0


@dataclass
class Notes:
    """What all of them saw: seconds by kind of question, and what was wrong."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    tagged: int = 0

    def wrong(self, text: str) -> None:
        if len(self.errors) < 200:
            self.errors.append(text[:300])


class Person:
    """One participant, with cookies and connections of their own."""

    def __init__(self, url: str, key: str | None, model: str, notes: Notes) -> None:
        self.url, self.key, self.model, self.notes = url, key, model, notes
        self.tag = f"tag-{secrets.token_hex(4)}"
        limits = httpx.Limits(max_connections=6, max_keepalive_connections=6)  # as browsers have
        self.client = httpx.AsyncClient(base_url=url, limits=limits, timeout=LONGEST_S, follow_redirects=True,
                                        verify=False, headers={"Accept-Encoding": "gzip"})  # fmt: skip
        self.file, self.run, self.seq = "", 0, 0

    # ---- asking
    async def ask(self, kind: str, method: str, path: str, tagged: bool = False, **more: Any) -> Any:
        """An answer's JSON, or its text; None where it was wrong, which is noted."""
        began = time.perf_counter()
        try:
            try:
                answer = await self.client.request(method, path, **more)
            except httpx.RemoteProtocolError:  # the connection was closed as it was used: browsers ask a GET again
                if method != "GET":
                    raise
                answer = await self.client.request(method, path, **more)
        except httpx.HTTPError as error:
            self.notes.wrong(f"{kind}: {type(error).__name__} {error}")
            return None
        self.notes.seconds[kind].append(time.perf_counter() - began)
        if answer.status_code != 200:
            self.notes.wrong(f"{kind}: status {answer.status_code} {answer.text[:150]}")
            return None
        text = answer.text if kind != "asset" else ""
        self.check(kind, text, tagged)
        return answer.json() if "json" in answer.headers.get("content-type", "") else text

    def check(self, kind: str, text: str, tagged: bool) -> None:
        found = set(TAG.findall(text))
        if others := found - {self.tag}:
            self.notes.crossed.append(f"{kind}: {self.tag} got {sorted(others)[0]}")
        if tagged:
            self.notes.tagged += 1
            if self.tag not in found:
                self.notes.lost.append(f"{kind}: {self.tag} got {text[:200]}")

    async def get(self, address: str, /, tagged: bool = False, **query: Any) -> Any:
        return await self.ask(address, "GET", f"/lab/api/{address}", tagged, params=query)

    async def post(self, address: str, /, tagged: bool = False, **body: Any) -> Any:
        return await self.ask(address, "POST", f"/lab/api/{address}", tagged, json=body)

    # ---- what a page does when it is opened
    async def arrive(self, assets: int = 1000) -> None:
        """assets: how many of the page's files are fetched at most."""
        began = time.perf_counter()
        text = await self.ask("page", "GET", f"/?key={self.key}" if self.key else "/")
        if not text:
            return
        if assets:
            names = list(dict.fromkeys(ASSET.findall(text)))[:assets]
            await asyncio.gather(*(self.ask("asset", "GET", f"/{n}") for n in names))
            await self.ask("asset", "GET", "/theme.css")
        await self.get("boot")
        await asyncio.gather(self.get("room"), self.get("questions"), self.get("opened"), self.get("runs"))
        self.notes.seconds["arrival"].append(time.perf_counter() - began)

    # ---- what people do
    async def live(self, until: float, draw: random.Random) -> None:
        """Polls as the page does, and one thing after the other in between."""
        acts = [self.dial] * 6 + [self.look] * 3 + [self.data] * 3 + [self.write] + [self.train]
        await self.upload()
        tasks = [asyncio.create_task(self.poll(until)), asyncio.create_task(self.watch(until))]
        while time.monotonic() < until:
            await draw.choice(acts)()
            await asyncio.sleep(min(draw.uniform(*THINK_S), max(0.0, until - time.monotonic())))
        await asyncio.gather(*tasks)

    async def poll(self, until: float) -> None:
        seen = None
        while time.monotonic() < until:
            found = await self.get("room", **({"seen": seen} if seen is not None else {}))
            seen = ((found or {}).get("room") or {}).get("version")
            await asyncio.sleep(ROOM_S)

    async def watch(self, until: float) -> None:
        """The run that is open, once a second."""
        version = ""
        while time.monotonic() < until:
            found = await self.get("run", run=self.run, seen=version, tagged=bool(self.run)) or {}
            version = found.get("version", "")
            await asyncio.sleep(POLL_S)

    async def upload(self) -> None:
        rows = "".join(f"{self.tag} {c}||{self.tag} {c} {c}\n" for c in "abcdefgh")
        found = await self.ask("upload", "POST", f"/lab/api/upload?name={self.tag}.txt", True, content=rows,
                               headers={"Content-Type": "application/octet-stream"})  # fmt: skip
        self.file = (found or {}).get("file", "")

    async def dial(self) -> None:
        self.seq += 1
        seq = int(self.tag[4:], 16) + self.seq
        found = await self.post("budget", seq=seq, model=self.model, spec={**SPEC, "rank": 1 + self.seq % 16},
                                config=CONFIG, tokens=30.0, labelled=5.0)  # fmt: skip
        if found is not None and found.get("seq") != seq:
            self.notes.crossed.append(f"budget: {found.get('seq')} for {seq}")

    async def look(self) -> None:
        await self.get("runs")
        await self.get("question", name="rank")

    async def data(self) -> None:
        if self.file:
            await self.get("data", tagged=True, model=self.model, file=self.file, max_tokens=64)

    async def train(self) -> None:
        if self.run == 0 and self.file:
            found = await self.post("train", model=self.model, spec=SPEC, config=CONFIG, data={"file": self.file})
            self.run = (found or {}).get("run", 0)

    async def write(self) -> None:
        """Two texts, as they are written: Gradio's queue and its event stream."""
        began, hash = time.perf_counter(), secrets.token_hex(6)
        self.seq += 1
        asked = {"run": self.run, "prompt": f"{self.tag} a", "page": self.tag, "seq": self.seq}
        joined = await self.ask("join", "POST", "/gradio_api/queue/join", json={
            "data": [asked], "fn_index": 0, "session_hash": hash, "event_data": None, "trigger_id": None})  # fmt: skip
        if joined is None:
            return
        told, done = "", False  # the first message echoes what was asked, later ones say what changed
        try:
            async with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={hash}") as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        message = json.loads(line[5:])
                        if message.get("msg") in ("process_generating", "process_completed"):
                            told += line
                            self.check("stream", line, False)
                        done = done or message.get("msg") == "process_completed"
        except (httpx.HTTPError, ValueError) as error:
            self.notes.wrong(f"stream: {type(error).__name__} {error}")
            return
        self.notes.seconds["written"].append(time.perf_counter() - began)
        if done:
            self.check("stream", told, True)
        else:
            self.notes.lost.append(f"stream: {self.tag} did not end")

    async def leave(self) -> None:
        await self.client.aclose()


async def crowd(people: list[Person], seconds: float, assets: int, seed: int = 0) -> None:
    """All of them arrive within a few seconds and stay."""
    draw = random.Random(seed)

    async def one(person: Person, after: float, own: random.Random) -> None:
        await asyncio.sleep(after)
        await person.arrive(assets)
        await person.live(time.monotonic() + seconds - after, own)
        await person.leave()

    spread = min(10.0, seconds / 4)
    await asyncio.gather(*(one(p, draw.uniform(0, spread), random.Random(draw.random())) for p in people))


async def burst(people: list[Person], assets: int) -> None:
    """All of them arrive within one second."""

    async def one(person: Person, after: float) -> None:
        await asyncio.sleep(after)
        await person.arrive(assets)

    await asyncio.gather(*(one(p, i / len(people)) for i, p in enumerate(people)))
    await asyncio.gather(*(p.leave() for p in people))


async def one_after_another(make: Any, count: int, until: float) -> int:
    """So many people come, look, and go; gives how many it were by then."""
    for done in range(count):
        if time.monotonic() > until:
            return done
        person: Person = make()
        await person.arrive(assets=0)
        await person.dial()
        if done % 10 == 0:
            await person.upload()
            await person.write()
        await person.leave()
    return count
