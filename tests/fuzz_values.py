"""Values that nobody expects: numbers out of range, texts that are none, JSON of any shape; and valid forms with one of
them put somewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        3,
        0.5,
        -0.5,
        1e-300,
        1e300,
        -1e300,
        1.0,
        8.0,
        10**9,
        2**31,
        2**53,
        2**63,
        2**64,
        10**30,
        -(10**30),
        10**400,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
    ]
)
TEXTS = st.sampled_from(
    [
        "",
        " ",
        "0",
        "1",
        "-1",
        "1.5",
        "nan",
        "inf",
        "1e9",
        "9" * 30,
        "9" * 5000,
        "true",
        "null",
        "all",
        "q",
        "q,v",
        "v ",
        "k",
        "../../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "~",
        ".",
        "..",
        "C:\\con",
        "a/b",
        "file:///etc/passwd",
        "http://example.com/x",
        "\0",
        "a\0b",
        "\ud800",
        "\udfff\ud800",
        "\u202e",
        "\ufeff",
        "<script>alert(1)</script>",
        "{prompt}",
        "{0.__class__}",
        "{messages}",
        "%s%n",
        "'; DROP TABLE runs; --",
        "=1+1",
        "layers.0.q",
        "layers.1.v",
        "layers.99999.q",
        "0" * 400,
        "٣",
        "²",
        "x" * 3000,
        "é" * 300,
        "\n",
        "a\r\nSet-Cookie: x=1",
        "__proto__",
    ]
)
SCALARS = st.one_of(st.none(), NUMBERS, TEXTS, st.text(max_size=8), st.integers(-5, 300), st.floats())
ANY = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
DEEP = st.integers(1, 500).map(lambda n: eval("[" * min(n, 80) + "]" * min(n, 80)))


@st.composite
def changed(draw: st.DrawFn, usual: Mapping[str, Any], inner: bool = True) -> dict[str, Any]:
    """A valid form with a few values replaced or left out, and now and then one that belongs to nothing."""
    out = dict(usual)
    names = draw(st.lists(st.sampled_from(sorted(usual)), max_size=2)) if usual else []
    for key in names:
        value, fate = usual[key], draw(st.integers(0, 9))
        if fate == 0:
            out.pop(key, None)
        elif inner and isinstance(value, Mapping) and fate <= 7:
            out[key] = draw(changed(value))
        else:
            out[key] = draw(st.one_of(ANY, ANY, ANY, DEEP))
    if draw(st.integers(0, 15)) == 15:
        name = draw(
            st.one_of(st.text(max_size=6), st.sampled_from(["__class__", "self", "folder", "path", "x" * 2000]))
        )
        out[name] = draw(ANY)
    return out
