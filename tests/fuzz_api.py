"""Fuzzed forms and calls: what a person's form may hold, and every address of the page with values out of range."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from tests.fuzz_adapters import saved, tensors
from tests.fuzz_files import Kit
from tests.fuzz_values import ANY, DEEP, TEXTS, changed
from tests.fuzz_watch import sentence, told

SPEC = {
    "targets": ["q", "v"],
    "rank": 4,
    "alpha": 8.0,
    "layers": "all",
    "scaling": "alpha/r",
    "init": "gaussian",
    "train_A": True,
    "dora": False,
    "mask": 0.0,
    "full": [],
    "bottleneck": 0,
    "prefix": 0,
    "dropout": 0.0,
    "rank_pattern": {},
    "alpha_pattern": {},
}
TRAIN = {
    "steps": 3,
    "batch_size": 2,
    "lr": 1e-3,
    "lr_ratio": 1.0,
    "schedule": "linear",
    "warmup": 0.05,
    "weight_decay": 0.0,
    "clip": 1.0,
    "accumulate": 1,
    "seed": 0,
    "eval_rows": 4,
    "eval_every": 0,
    "max_tokens": 64,
    "dtype": "auto",
    "device": "auto",
}
DATA = {"task": "sentiment"}
SETTING = {"by": "k", "at": 2, "strength": 1, "off": ["layers.0.q"]}
Form = dict[str, Any]


# ---- forms without a page
@st.composite
def form_cases(draw: st.DrawFn) -> Form:
    return {
        "spec": draw(changed(SPEC)),
        "config": draw(changed(TRAIN)),
        "request": draw(
            changed(
                {
                    "model": "m",
                    "task": "pirate",
                    "data": None,
                    "test": None,
                    "template": None,
                    "title": None,
                    "objective": None,
                }
            )
        ),
    }


def form(case: Form, kit: Kit) -> None:
    from app.runs.run import RunRequest, command_line, describe
    from lora_core.spec import LoraSpec
    from lora_core.train import TrainConfig

    spec = told(lambda: LoraSpec.from_dict(case["spec"]))
    if spec is not None:
        assert LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec
    config = told(lambda: TrainConfig.from_dict(case["config"]))
    if config is not None:
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
        assert all(0 <= config.rate(s) <= config.lr for s in (1, config.steps))
    request = told(lambda: RunRequest.from_dict({**case["request"], "spec": case["spec"], "config": case["config"]}))
    if request is not None:
        json.dumps(request.to_dict(), allow_nan=False).encode()
        told(lambda: (command_line(request), describe(request)))


# ---- the page
@dataclass
class Page:
    """The app without a browser on a store with one trained run, as an ASGI app that is asked directly."""

    kit: Kit

    def __post_init__(self) -> None:
        from app.runs.queue import RunQueue
        from app.runs.store import RunStore
        from tests.pages_kit import STAND_IN, trained

        self.home = self.kit.root / "home"
        self.home.mkdir(exist_ok=True)
        self.model = str(self.kit.model_folder)
        self.store = RunStore(self.home, recorded=self.home / "nothing recorded")
        self.run = trained(self.store, self.model)
        self.queue = RunQueue(self.store, command=STAND_IN)  # never booted: what is started waits

    @cached_property
    def app(self) -> Any:
        from app.pages import adapt
        from app.runs import experiments
        from app.server import create_app

        mock.patch.object(adapt, "DEFAULT", self.model).start()
        mock.patch.object(experiments, "WORKER", ("/bin/true",)).start()
        return create_app(self.store, self.queue, model=None)

    def ask(
        self, method: str, path: str, query: str = "", body: bytes = b"", kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """(status, body) of one request."""
        sent: list[Mapping[str, Any]] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return parts.pop(0) if parts else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode("latin-1", "replace"),
            "headers": [(b"host", b"127.0.0.1:7860"), (b"content-type", kind.encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 7860),
        }
        self.loop.run_until_complete(self.app(scope, receive, send))
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()


def page_of(kit: Kit) -> Page:
    if "page" not in kit.cache:
        kit.cache["page"] = Page(kit)
    return kit.cache["page"]


def ready(kit: Kit) -> None:
    """The page has answered once, and the model is there."""
    page = page_of(kit)
    for query in (f"model?name={page.model}", "heat?run=1", "experiments"):
        name, _, rest = query.partition("?")
        assert page.ask("GET", f"/lab/api/{name}", rest)[0] == 200
    stream({"run": 1, "prompt": "a", "page": "ready", "seq": 0}, kit)


RUN: Form = {"run": "1"}
# what each address is asked as a rule; addresses that are not here get this one
USUAL: dict[str, Form] = {
    "boot": {"run": "1", "model": "", "s.rank": "4"},
    "model": {"name": "MODEL"},
    "weights": {"name": "MODEL"},
    "data": {"model": "MODEL", "task": "sentiment", "seed": "0", "max_tokens": "64"},
    "run": {"run": "1", "seen": "x", "over": "auto", "light": "1"},
    "film": {"run": "1", "m": "layers.0.q"},
    "held": {"run": "1", "first": "k", "holders": ""},
    "fit": {"run": "1", "other": "1", "m": "layers.0.q"},
    "spectrum": {"run": "1", "m": "layers.0.q", "with": "1"},
    "pair": {"run": "1", "with": "1"},
    "microscope": {"run": "1", "m": "layers.0.q", "part": "beside", "page": "p", "seq": "1"},
    "question": {"name": "rank"},
    "opened": {},
    "open": {"set": "0" * 16, "name": "x", "base": "MODEL"},
    "budget": {
        "model": "MODEL",
        "seq": 1,
        "spec": SPEC,
        "config": TRAIN,
        "data": DATA,
        "tokens": 30.0,
        "labelled": 5.0,
    },
    "code": {"model": "MODEL", "spec": SPEC, "config": TRAIN, "data": DATA},
    "train": {"model": "MODEL", "spec": SPEC, "config": TRAIN, "data": DATA},
    "merge": {"run": 1},
    "stop": {"run": 1},
    "resume": {"run": 1},
    "walk": {"page": "p", "stage": "forward", "step": 1, "m": "layers.0.q", "run": 1},
    "walk-end": {"page": "p"},
    "speaks": {"run": 1, "setting": SETTING, "text": "a good film", "prompt": None, "page": "p", "seq": 1},
    "cut": {"run": 1, "setting": SETTING},
    "sum": {"run": 1, "other": 1, "page": "p", "seq": 1},
    "experiment": {"name": "rank", "quick": True},
    "experiment-stop": {"name": "rank"},
    "upload": {"name": "rows.txt"},
    "open-file": {"set": "", "name": "adapter_model.safetensors"},
}
FILES = ("upload", "open-file")
OTHERS = ("adapter.zip", "take/curve.csv", "take/tensorboard", "take/merged.zip")


@st.composite
def call_cases(draw: st.DrawFn) -> Form:
    from app.pages import api

    method, name = draw(
        st.sampled_from([("GET", n) for n in (*api.GET, *OTHERS)] + [("POST", n) for n in (*api.POST, *FILES)])
    )
    given = draw(changed(USUAL.get(name, RUN)))
    if name == "walk" and draw(st.booleans()):
        given |= {"run": None, "model": "MODEL", "spec": SPEC, "config": TRAIN, "data": DATA}
    body = b""
    if name in FILES:
        body = draw(st.one_of(st.binary(max_size=60), tensors().map(saved)))
    text = draw(
        st.sampled_from([None] * 20 + ["", "{", "[1]", "[" * 20_000, "NaN", '{"run": 1, "run": "x"}', '"x"', "\ud800"])
    )
    return {
        "method": method,
        "name": name,
        "given": given,
        "body": body,
        "text": text,
        "kind": draw(st.sampled_from(["application/json"] * 20 + ["text/plain", "multipart/form-data", ""])),
    }


def word(value: Any) -> str:
    """A value in an address."""
    return value if isinstance(value, str) else json.dumps(value)


def call(case: Form, kit: Kit) -> None:
    """Every answer is JSON without NaN, or a file; never a 500, a traceback, or where our folders are."""
    from urllib.parse import quote

    page = page_of(kit)
    given = {k: page.model if v == "MODEL" else v for k, v in case["given"].items()}
    method, name = case["method"], case["name"]
    query, body, kind = "", case["body"], case["kind"]
    if method == "GET" or name in FILES:
        query = "&".join(
            f"{quote(k, safe='.', errors='surrogatepass')}={quote(word(v), errors='surrogatepass')}"
            for k, v in given.items()
        )
        kind = "application/octet-stream" if name in FILES and kind else kind
    else:
        text = json.dumps(given) if case["text"] is None else case["text"]
        body = text.encode("utf-8", "surrogatepass")
    status, answer = page.ask(method, f"/lab/api/{name}", query, body, kind)
    assert status in (200, 400, 404, 413, 415, 422), (status, answer[:300])
    if name in OTHERS and status == 200 and not answer.startswith(b"{"):
        return
    found = json.loads(answer.decode("utf-8"), parse_constant=no_number)
    assert isinstance(found, dict)
    for key in ("error", "fault", "note", "away", "says"):
        if isinstance(text := found.get(key), str) and text:
            sentence(text)
            assert str(page.home) not in text, text
    started = found.get("run")
    if name in ("train", "cut") and isinstance(started, int) and page.store.get(started).status != "running":
        with suppress(ValueError):
            page.queue.stop(started)
            page.store.delete(started)


def no_number(text: str) -> Any:
    raise AssertionError(f"{text} is no JSON")


# ---- texts as they are written: Compare's stream
@st.composite
def stream_cases(draw: st.DrawFn) -> Form:
    side = st.one_of(changed({"run": 1, "setting": SETTING, "plus": None}), ANY)
    return draw(
        changed(
            {
                "run": 1,
                "prompt": "a good film",
                "setting": draw(st.one_of(changed(SETTING), st.none())),
                "sides": draw(st.one_of(st.none(), st.lists(side, max_size=6))),
                "measure": draw(st.booleans()),
                "page": draw(st.one_of(st.just("p"), TEXTS, DEEP)),
                "seq": 1,
            },
            inner=False,
        )
    )


def stream(case: Form, kit: Kit) -> None:
    from app.pages import compare
    from app.pages.lab import Lab
    from app.pages.session import ModelSession
    from app.pages.uploads import Uploads
    from app.runs.experiments import ExperimentRunner

    page = page_of(kit)
    if "lab" not in kit.cache:
        kit.cache["lab"] = Lab(
            store=page.store,
            queue=page.queue,
            session=ModelSession(),
            uploads=Uploads(page.home),
            experiments=ExperimentRunner(page.home),
        )
    last: Form = {}
    for last in compare.stream(kit.cache["lab"], case):
        json.dumps({k: v for k, v in last.items() if k not in ("prompt", "setting", "sides", "run")}, allow_nan=False)
    if "error" in last:
        sentence(last["error"])
        assert "that did not work" not in last["error"], last["error"]
    assert last.get("done") or last == {} or compare.TICKETS.stale(str(case.get("page", ""))[:40], last["seq"])
