"""What each address of the page takes: names and kinds of values, checked by pydantic before a room sees them.

A name that is not expected, one that is missing, a number that is not finite, a boolean for a number or a text that
never ends is told in one sentence. What lies inside `spec` and `config` is `LoraSpec`'s and `TrainConfig`'s to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lora_core.errors import UserError

LONG = 20_000  # characters of a text or a prompt
WHOLE = 1 << 53  # whole numbers up to here are the same in JavaScript
Word = Annotated[str, Field(max_length=400)]
Text = Annotated[str, Field(max_length=LONG * 4)]  # how long it may be is for the room to say, in its own words
Whole = Annotated[int, Field(ge=-WHOLE, le=WHOLE)]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("page", "m", "model", "stage", "name", "set", "base", "file", "task", "place"),
                    (Word, "a short text is expected")),
    **dict.fromkeys(("text", "prompt"), (Text, f"a text of at most {LONG:,} characters is expected")),
    **dict.fromkeys(("seq", "step"), (Whole, "a whole number is expected")),
    **dict.fromkeys(("tokens", "labelled"), (Number, "a finite number is expected")),
    **dict.fromkeys(("spec", "config", "data", "setting"), (dict[str, Any], "an object with its settings is expected")),
    "sides": (list[Any], "a list is expected"),
    "quick": (bool, "true or false is expected"),
    "measure": (bool, "true or false is expected"),
    **dict.fromkeys(("run", "other"), (Any, "")),  # a number, or a text with one: `Lab.run` tells
}  # fmt: skip
# of each address the names that it takes, those that it needs with a "!"; "…": also others (an address of the page)
GET = {
    "boot": "run model …", "model": "name!", "data": "model! task file name seed max_tokens", "weights": "name!",
    "runs": "text status model limit offset", "run": "run! seen over light", "form": "run!", "film": "run! m",
    "pareto": "run!", "compare": "run!",
    "dials": "run!", "held": "run! first holders", "sides": "run!", "fit": "run! other! m", "heat": "run open",
    "spectrum": "run open m! with", "microscope": "run open m! with part page seq", "besides": "run open", "opened": "",
    "pair": "run open with!", "questions": "", "question": "name!", "experiments": "",
    "adapter.zip": "run!", "take": "run!", "upload": "name", "open-file": "name set",
}  # fmt: skip
POST = {
    "open": "set! name base", "budget": "seq model! spec config data tokens labelled", "code": "model spec config data",
    "merge": "run!", "train": "model! spec config data", "stop": "run!", "resume": "run!",
    "walk": "page stage! step m run model spec config data", "walk-end": "page",
    "speaks": "run! text! prompt setting page seq", "cut": "run! setting", "sum": "run! other! page seq",
    "experiment": "name! quick!", "experiment-stop": "name!",
    "write": "run! prompt setting sides measure page seq",
}  # fmt: skip


@cache
def model(method: str, address: str) -> type[BaseModel] | None:
    """The model of an address; None for one that is not in the tables."""
    names = (GET if method == "GET" else POST).get(address)
    if names is None:
        return None
    fields: dict[str, Any] = {}
    for word in names.split():
        name = word.removesuffix("!")
        if name == "…":
            continue
        kind: Any = Word if method == "GET" else KINDS[name][0]
        needed = word != name
        fields[f"v_{name}"] = (kind if needed or kind is Any else kind | None, Field(... if needed else None,
                                                                                     alias=name))  # fmt: skip
    extra = "allow" if "…" in names else "forbid"
    return create_model(f"{method} {address}", __config__=ConfigDict(strict=True, extra=extra), **fields)


def check(method: str, address: str, given: Mapping[str, Any]) -> None:
    """UserError, in one sentence, for what an address does not take."""
    if len(given) > 200 or any(len(k) > 100 for k in given):
        raise UserError("that are too many values, or too long names")
    expected = model(method, address)
    if expected is None:
        return
    try:
        expected.model_validate(dict(given))
    except ValidationError as error:
        raise UserError(sentence(method, address, error, given)) from None


def sentence(method: str, address: str, error: ValidationError, given: Mapping[str, Any]) -> str:
    """What is wrong first, in words."""
    first = min(error.errors(include_url=False, include_input=False), key=lambda e: e["type"] != "extra_forbidden")
    name = str(first["loc"][0]) if first["loc"] else ""
    names = [w.removesuffix("!") for w in (GET if method == "GET" else POST)[address].split()]
    if first["type"] == "extra_forbidden":
        return f"no value '{name[:40]}' is expected by '{address}'; possible: {' '.join(names) or 'none at all'}"
    if first["type"] == "missing":
        return f"{name} is missing: '{address}' needs it"
    value = given.get(name)
    shown = repr(value) if isinstance(value, (int, float, bool, type(None))) else f"'{value}'"
    words = "a text of at most 400 characters is expected" if method == "GET" else KINDS[name][1]
    if first["type"] == "string_too_long":
        return f"{name} has {len(str(value)):,} characters; {words if method == 'GET' else 'that is too long'}"
    return f"{name} is {shown if len(shown) <= 60 else shown[:57] + '…'}; {words}"
