"""Errors name what was given, what is possible and the nearest match."""

import pytest

from lora_core.errors import UserError, nearest, unknown


def test_unknown_is_a_value_error_and_one_line() -> None:
    error = unknown("matrix", "qproj", ["q", "k", "v", "o"], "in LlamaForCausalLM")
    assert isinstance(error, UserError) and isinstance(error, ValueError)
    assert str(error) == "no matrix 'qproj' in LlamaForCausalLM; possible: q k v o (did you mean 'q'?)"


def test_unknown_without_a_match_and_without_names() -> None:
    assert str(unknown("task", "zzz", ["json", "pirate"])) == "no task 'zzz'; possible: json pirate"
    assert str(unknown("run", "7", [])) == "no run '7'; there are none"


@pytest.mark.parametrize(
    ("given", "possible", "expected"),
    [
        ("restaurent", ["restaurant", "json"], "restaurant"),
        ("SENT", ["restaurant", "sentiment"], "sentiment"),
        ("Gate", ["gate", "up"], "gate"),
        ("up_proj", ["u", "up", "down"], "up"),
        ("xyz", ["gate", "up"], None),
        ("", ["gate", "up"], None),
    ],
)
def test_nearest(given: str, possible: list[str], expected: str | None) -> None:
    assert nearest(given, possible) == expected
