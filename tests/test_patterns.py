"""PEFT's patterns beside Python's own `re`, and those that `re` never ends with."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from lora_core.patterns import Names, TooInvolved, compiled, matches


@pytest.mark.filterwarnings("ignore:Possible nested set")
@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="ab.*+?()|[]{}^$\\dw-1,_", max_size=9), st.text(alphabet="ab.1_", max_size=7), st.booleans())
def test_a_pattern_matches_what_re_says(pattern: str, name: str, anywhere: bool) -> None:
    try:
        compiled(pattern)
    except (TooInvolved, re.error, OverflowError, ValueError):
        assume(False)
    wanted = re.compile(rf"(?:.*\.)?(?:{pattern})$").match(name) if anywhere else re.fullmatch(pattern, name)
    assert matches(pattern, name, anywhere) == bool(wanted)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"model\.layers\.\d+\.(q|v)_proj",
        r"^(?!.*vision).*\.q_proj",
        r"layers\.(0|1|31)\..*",
        "q_proj",
    ],
)
@pytest.mark.parametrize(
    "name", ["a.decoder.3.SelfAttention.q", "model.layers.12.q_proj", "x.vision.q_proj", "layers.31.a", "q_proj"]
)
def test_what_people_write_works(pattern: str, name: str) -> None:
    assert matches(pattern, name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize("pattern", ["a?" * 60 + "a" * 60, "(a|a)" * 30 + "b", ".*.*.*.*.*.*x", "(?:a|a|a)" * 40])
def test_patterns_that_re_never_ends_with(pattern: str) -> None:
    began = time.process_time()
    assert not matches(pattern, "a" * 59 + "c", anywhere=True)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(.*)*x", "(?P<n>a)(?P=n)", "(?<=a)b", "(?i)q", "(" * 400 + ")" * 400, "x" * 2000]
)
def test_what_names_have_no_need_of_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="too involved|no pattern"):
        Names(Path("adapter_config.json"), {"target_modules": pattern})


def test_many_patterns_and_many_names_have_an_end() -> None:
    values = {f".*{'a?' * 200}{i}": 4 for i in range(2000)}
    names = Names(Path("adapter_config.json"), {"rank_pattern": values, "r": 8})
    began = time.process_time()
    with pytest.raises(UserError, match="too involved"):
        for i in range(2000):
            names.value("rank", "a" * 400 + str(i))
    assert time.process_time() - began < 5
