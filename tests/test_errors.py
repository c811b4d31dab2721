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


def test_what_was_given_may_be_anything_and_the_sentence_still_ends() -> None:
    error = UserError(f"{'x' * 50_000} and half a character \ud800")
    assert len(str(error)) <= 1010 and str(error).endswith("half a character ?")
    str(unknown("model", "y" * 50_000, ["a", "b" * 5000])).encode()


def test_settings_that_are_none_are_told() -> None:
    from app.runs.run import RunRequest
    from lora_core.spec import LoraSpec
    from lora_core.train import TrainConfig

    for given in (5, [1], "rank", None):
        for kind in (LoraSpec, TrainConfig):
            with pytest.raises(UserError, match="names with values"):
                kind.from_dict(given)  # type: ignore[arg-type]
    wrong = ({"targets": 5}, {"full": 5}, {"rank_pattern": [[[]]]}, {"alpha_pattern": 3}, {"targets": {"q": 1}})
    for settings in wrong:
        with pytest.raises(UserError):
            LoraSpec.from_dict(settings)
    with pytest.raises(UserError, match="needs a model"):
        RunRequest.from_dict({"task": "pirate"})
