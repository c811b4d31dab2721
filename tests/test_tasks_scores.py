"""Scores against cases computed by hand and against sacrebleu's own answers."""

from __future__ import annotations

import json
import math

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from lora_core.tasks import Row
from lora_core.tasks.scores import (
    accuracy,
    bleu,
    chrf,
    exact_match,
    first_label,
    group,
    json_scores,
    parse_json,
    same_json,
    score_labels,
    score_sentences,
)

TEXTS = [
    "The Mill is a cheap pub by the river.",
    "There is an Indian restaurant called Zizzi near the station.",
    "Visit the Blue Fox, it is quiet and good.",
]


def test_bleu_by_hand() -> None:
    # 4-gram precisions of "a b c d e" against "a b c d f": 4/5, 3/4, 2/3, 1/2; no brevity penalty.
    by_hand = 100 * math.exp(sum(math.log(p) for p in (4 / 5, 3 / 4, 2 / 3, 1 / 2)) / 4)
    assert bleu(["a b c d e"], [["a b c d f"]]) == pytest.approx(by_hand)
    # one word short of a reference of five: penalty exp(1 - 5/4)
    assert bleu(["a b c d"], [["a b c d e"]]) == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_bleu_takes_the_best_of_several_references_of_unequal_number() -> None:
    references = [["nothing alike here at all", TEXTS[0]], [TEXTS[1]], ["x", "y", TEXTS[2]]]
    assert bleu(TEXTS, references) == pytest.approx(100.0)
    assert bleu(TEXTS, [r[:1] for r in references]) < 60


def test_bleu_and_chrf_are_sacrebleus() -> None:
    said = [TEXTS[1], "There is a restaurant near the station .", TEXTS[2]]
    assert bleu(said, [[t] for t in TEXTS]) == sacrebleu.corpus_bleu(said, [TEXTS]).score
    assert chrf(said, [[t] for t in TEXTS]) == sacrebleu.corpus_chrf(said, [TEXTS]).score
    two = [TEXTS, list(reversed(TEXTS))]
    assert bleu(said, [list(r) for r in zip(*two, strict=True)]) == sacrebleu.corpus_bleu(said, two).score


def test_bleu_of_nothing_said_is_zero() -> None:
    assert bleu(["", ""], [["a b"], ["c d"]]) == 0.0


def test_group_takes_each_prompt_once_with_all_its_references() -> None:
    rows = [Row("p", "one"), Row("q", "two"), Row("p", "three")]
    known = [*rows, Row("p", "four"), Row("z", "five"), Row("p", "one")]
    assert group(["A", "B", "C"], rows, known) == [("p", "A", ["one", "three", "four"]), ("q", "B", ["two"])]


def test_score_sentences_uses_references_of_rows_that_were_not_generated_for() -> None:
    known = [Row("p", TEXTS[0]), Row("p", TEXTS[1])]
    assert score_sentences([TEXTS[1]], known[:1], known) == {"BLEU": pytest.approx(100.0), "exact match": 1.0}


def test_exact_match_ignores_spaces_only() -> None:
    assert exact_match([" a  b\n", "A b", "c"], [["a b"], ["a b"], ["d", "c"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("positive", "positive"),
        (" Positive.", "positive"),
        ("'negative' because", "negative"),
        (": negative", "negative"),
        ("positively bad", None),
        ("It is positive", None),
        ("not good at all", "not good"),
        ("not", "not"),
        ("1", "1"),
        ("10", None),
        ("", None),
    ],
)
def test_first_label(text: str, expected: str | None) -> None:
    assert first_label(text, ["positive", "negative", "not", "not good", "1"]) == expected


def test_accuracy_counts_every_row() -> None:
    assert accuracy(["yes", "no", "yes sir", ""], ["yes", "yes", "yes", "no"], ["yes", "no"]) == 0.5
    rows = [Row("same", "yes"), Row("same", "no")]
    assert score_labels(["yes", "no"])(["yes", "yes"], rows, rows) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b": [1, 2], "a": 1.0}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 0}', '{"a": false}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": null}', "{}", False),
        ("[1, 2]", "[2, 1]", False),
        ("[1]", "[1, 1]", False),
        ('{"a": {"x": 1, "y": 2}}', '{"a": {"y": 2, "x": 1}}', True),
    ],
)
def test_same_json(a: str, b: str, same: bool) -> None:
    assert same_json(json.loads(a), json.loads(b)) is same
    assert same_json(json.loads(b), json.loads(a)) is same


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1} done', "[" * 100_000]
)
def test_parse_json_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_scores_by_hand() -> None:
    wanted = ['{"a": 1, "b": 2}'] * 4
    said = ['{"b": 2, "a": 1}', '{"a": 1, "b": 3}', '{"a": 1', "7"]
    assert json_scores(said, wanted) == {"exact match": 0.25, "fields": 3 / 8, "valid JSON": 0.75}
    # A field too many is not the same record, though every wanted field is right.
    assert json_scores(['{"a": 1, "b": 2, "c": 3}'], wanted[:1]) == {"exact match": 0, "fields": 1, "valid JSON": 1}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(values)
def test_json_round_trip_is_the_same(value: object) -> None:
    assert same_json(parse_json(json.dumps(value)), value)
