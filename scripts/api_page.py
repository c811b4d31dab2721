"""Writes docs/api.md: every public name of lora_core with its signature and docstring. `make docs` runs it.

A test holds the page against the code, so that it cannot fall behind.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import lora_core as lc

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# The library on one page

Made from the docstrings by `make docs`. `import lora_core as lc`, then `lc.NAME`.
Shapes: A (r, in), B (out, r), ΔW = s·B·A (out, in). Errors that the user can mend are `UserError`, a `ValueError`.
"""


def signature(name: str, thing: Any, wide: bool = False) -> str:
    """name(parameters) -> result as code; one parameter a line where the line would be long, unless `wide`."""
    try:
        sig = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    plain = re.sub(r"(: |-> )(['\"])(.*?)\2(?=[,)= ]|$)", r"\1\3", f"{name}{sig}")
    plain = plain.replace("(self, ", "(").replace("(self)", "()").removesuffix(" -> None")
    if wide or len(plain) <= 100:
        return plain
    head, _, rest = plain.partition("(")
    inner, _, result = rest.rpartition(")")
    pieces = re.split(r", (?=\*|\w+: )", inner)
    return "\n".join([f"{head}(", *(f"    {p}," for p in pieces), f"){result}"])


def body(thing: Any) -> str:
    """The docstring; a paragraph whose lines are columns stays as it is typed."""
    out = []
    for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
        columns = re.search(r"^\S[^\n]*?\S {2,}\S|\n {4,}\S", paragraph)
        out.append(f"```text\n{paragraph}\n```" if columns else paragraph)
    return "\n\n".join(out)


def entry(name: str, thing: Any) -> str:
    lines = [f"### `{name}`", "", "```python", signature(name, thing), "```", "", body(thing)]
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            if key.startswith("_") or isinstance(member, (int, str, float, tuple)):
                continue
            target = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            doc = inspect.getdoc(target) if callable(target) else None
            if doc and not (dataclasses.is_dataclass(thing) and key in ("to_dict", "from_dict")):
                shown = key if isinstance(member, property) else signature(key, target, wide=True)
                lines += ["", f"- `.{shown}`: {doc.splitlines()[0]}"]
    return "\n".join(lines)


def page() -> str:
    parts, module = [HEAD], ""
    for name, home in lc._WHERE.items():
        if home != module:
            module = home
            first = (inspect.getdoc(inspect.getmodule(getattr(lc, name))) or "").split("\n\n")[0].replace("\n", " ")
            parts.append(f"## {module.removeprefix('lora_core.')}\n\n{first}\n")
        parts.append(entry(name, getattr(lc, name)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
