"""The six tasks of our own: the same everywhere, disjoint, diverse, in good English."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from lora_core.tasks import load_task, new_language, plain, prompt_text, restaurant, task_names
from lora_core.tasks.draw import a, distinct
from lora_core.tasks.pirate import to_pirate
from lora_core.tasks.scores import parse_json

NAMES = [name for name, _ in task_names()]
DIGEST = (
    "import hashlib, sys; from lora_core.tasks import load_task; assert 'torch' not in sys.modules;"
    "[print(n, hashlib.sha256(repr([(r.prompt, r.completion, r.line, r.rejected) for t in [load_task(n, seed=3)]"
    " for r in t.train + t.test]).encode()).hexdigest()) for n in sys.argv[1:]]"
)


def test_the_names() -> None:
    assert NAMES == ["restaurant", "json", "sentiment", "pirate", "new-language", "plain"]
    assert all(about.endswith(".") for _, about in task_names())


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_same_rows_in_every_process(hash_seed: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", DIGEST, *NAMES],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    here = ""
    for name in NAMES:
        task = load_task(name, seed=3)
        rows = [(r.prompt, r.completion, r.line, r.rejected) for r in task.train + task.test]
        here += f"{name} {hashlib.sha256(repr(rows).encode()).hexdigest()}\n"
    assert out == here


@pytest.mark.parametrize("name", NAMES)
def test_default_sizes_and_seeds(name: str) -> None:
    task, again, other = load_task(name), load_task(name, seed=0), load_task(name, seed=1)
    assert (len(task.train), len(task.test)) == (1000, 128)
    assert task == again
    # Other seeds draw other rows, though a small grammar may give some sentences twice.
    ours = {(r.prompt, r.completion) for r in task.train}
    theirs = {(r.prompt, r.completion) for r in other.train}
    assert len(ours & theirs) < 0.6 * len(ours)
    assert [r.line for r in task.train] == list(range(1, 1001))
    for row in task.train + task.test:
        assert row.prompt.strip() == row.prompt and row.completion.strip() == row.completion
        assert row.prompt and row.completion and "||" not in row.prompt and "\n" not in row.prompt + row.completion
        assert len(row.prompt.split()) < 45 and len(row.completion.split()) < 60


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40), train=st.integers(1, 300), test=st.integers(1, 60))
def test_train_and_held_out_share_no_prompt(name: str, seed: int, train: int, test: int) -> None:
    task = load_task(name, seed=seed, train=train, test=test)
    assert (len(task.train), len(task.test)) == (train, test)
    assert not {r.prompt for r in task.train} & {r.prompt for r in task.test}
    assert len({(r.prompt, r.completion) for r in task.train + task.test}) == train + test


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_full_marks_and_wrong_ones_do_not(name: str) -> None:
    task = load_task(name, train=50, test=40)
    rows = task.score_rows()
    assert len({r.prompt for r in rows}) == len(rows)
    perfect = task.score([r.completion for r in rows], rows)
    assert next(iter(perfect)) == task.score_name
    full = {"BLEU": 100.0, "chrF": 100.0}
    for key, value in perfect.items():
        assert value == pytest.approx(full.get(key, 1.0))
    empty = task.score(["" for _ in rows], rows)
    assert all(value == 0 for value in empty.values())
    shifted = task.score([r.completion for r in rows[1:] + rows[:1]], rows)
    assert shifted[task.score_name] < perfect[task.score_name]


@pytest.mark.parametrize("name", NAMES)
def test_articles_fit_and_no_word_is_doubled(name: str) -> None:
    task = load_task(name, seed=5)
    checked = name in ("restaurant", "pirate", "plain")
    texts = [r.prompt for r in task.train] + [r.completion for r in task.train if checked]
    for text in texts:
        for article, word in re.findall(r"\b([Aa]n?) ([a-zA-Z]+)", text):
            assert a(word).split()[0] == article.lower(), text
        assert not re.search(r"\b(?!ho\b)(\w{2,}) \1\b", text, re.IGNORECASE), text
        assert "  " not in text and " ." not in text and ".." not in text and ",," not in text


def test_a() -> None:
    assert [a(w) for w in ("pub", "university", "one-way trip")] == ["a pub", "a university", "a one-way trip"]
    assert [a(w) for w in ("old map", "hour", "81-year-old")] == ["an old map", "an hour", "an 81-year-old"]


# restaurant


def _combination(prompt: str) -> tuple[tuple[str, str], ...]:
    return tuple((k, v) for k, v in restaurant.parse(prompt).items() if k != "name")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_restaurant_combinations_are_disjoint_and_every_value_is_said(seed: int) -> None:
    task = load_task("restaurant", seed=seed, train=200, test=40)
    assert not {_combination(r.prompt) for r in task.train} & {_combination(r.prompt) for r in task.test}
    for row in task.train + task.test:
        facts = restaurant.parse(row.prompt)
        assert restaurant.prompt(facts) == row.prompt
        assert restaurant.stated(row.prompt, row.completion) == [True] * len(facts), row


def test_restaurant_held_out_prompts_have_two_references_and_come_first_once() -> None:
    task = load_task("restaurant")
    assert len({r.prompt for r in task.test}) == 64
    assert len({r.prompt for r in task.test[:64]}) == 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Copper Fox is a cheap Greek pub. It is not family-friendly.", [True, True, True, True, True]),
        ("Copper Fox: a cheap greek pub, children at home: it is not for families", [True, True, True, True, True]),
        ("The Copper Fox is a cheap Greek pub. It is family-friendly.", [True, True, True, True, False]),
        ("The Copper Fox is a pricey Greek pub.", [True, True, True, False, False]),
        ("The Copper Fox is a cheap but expensive Greek pub.", [True, True, True, False, False]),
        ("The Copper Foxes serve Greekish food in a republic.", [False, False, False, False, False]),
        ("", [False] * 5),
    ],
)
def test_slots_by_hand(text: str, expected: list[bool]) -> None:
    prompt = "name : The Copper Fox | type : pub | food : Greek | price : low | family friendly : no"
    assert restaurant.stated(prompt, text) == expected


def test_slot_accuracy_is_the_share_of_values() -> None:
    task = load_task("restaurant", test=8)
    rows = task.score_rows(2)
    first = restaurant.parse(rows[0].prompt)
    second = restaurant.parse(rows[1].prompt)
    scores = task.score([rows[0].completion, "nothing to say"], rows)
    assert scores["slot accuracy"] == pytest.approx(len(first) / (len(first) + len(second)))


# json


def test_json_completions_are_records_of_four_kinds() -> None:
    kinds = {tuple(parse_json(r.completion)) for r in load_task("json").train}
    assert kinds == {
        ("name", "age", "job", "city"),
        ("item", "count", "size", "takeaway"),
        ("event", "day", "time", "place"),
        ("from", "to", "by", "date", "return"),
    }


def test_json_score_ignores_key_order_and_counts_what_does_not_parse_as_wrong() -> None:
    task = load_task("json", test=4)
    rows = task.test
    turned = [json.dumps(dict(reversed(json.loads(r.completion).items()))) for r in rows]
    assert task.score(turned, rows) == {"exact match": 1.0, "fields": 1.0, "valid JSON": 1.0}
    talk = [f"Here it is: {r.completion}" for r in rows]
    assert task.score(talk, rows) == {"exact match": 0.0, "fields": 0.0, "valid JSON": 0.0}


# sentiment


def test_sentiment_is_balanced_and_not_told_by_one_word() -> None:
    task = load_task("sentiment")
    good = [r.prompt for r in task.train if r.completion == "positive"]
    bad = [r.prompt for r in task.train if r.completion == "negative"]
    assert abs(len(good) - len(bad)) <= 20
    for word in ("superb", "brilliant", "terrible", "tedious"):
        used = [sum(word in text.lower() for text in part) for part in (good, bad)]
        assert min(used) >= 0.1 * sum(used), (word, used)


# pirate


@pytest.mark.parametrize(
    ("plain", "pirate"),
    [
        ("Hello, my friend, where is the money?", "Ahoy, me hearty, where be th' doubloons, savvy?"),
        ("You are looking at my cat!", "Ye be lookin' at me ship's cat, yo ho ho!"),
        ("There is an old map in the office.", "There be a barnacled chart on th' quarterdeck, arr!"),
        ("The king will bring nothing.", "Th' king will bring nothing, arr!"),
        ("I'm going to bed", "I be goin' t' th' hammock"),
        ("", ""),
    ],
)
def test_pirate_rules(plain: str, pirate: str) -> None:
    assert to_pirate(plain) == pirate


@given(st.text(max_size=200))
def test_pirate_takes_any_text(text: str) -> None:
    assert to_pirate(text) == to_pirate(text)


# new-language


def test_new_language_by_its_rules() -> None:
    word = {english: text.replace("-", "") for english, text in new_language.LEXICON.items()}
    dogs = new_language.Phrase(noun="dog", count="many", adjective="old")
    first = new_language.LEXICON["dog"].split("-")[0]
    assert dogs.english() == "the old dogs"
    assert dogs.ovarni(of_verb=True) == f"{first}{word['dog']}oku {word['old']}ur"
    apple = new_language.Phrase(noun="apple", count="three", definite=False)
    assert (apple.english(), apple.ovarni()) == ("three apples", f"{word['apple']} {word['three']}")
    child = new_language.Phrase(noun="child", definite=False, adjective="old")
    assert (child.english(), child.ovarni()) == ("an old child", f"{word['child']} {word['old']}il")


def test_new_language_words_are_distinct_and_fixed() -> None:
    words = [text.replace("-", "") for text in new_language.LEXICON.values()]
    assert len(set(words)) == len(words) == 59
    # Adapters trained on it must stay meaningful, so the lexicon may not change.
    assert new_language.LEXICON["girl"] == "kwe-ngel" and new_language.LEXICON["under"] == "po-kwak"


def test_new_language_is_a_function_of_the_english_sentence() -> None:
    rng, seen = random.Random(0), {}
    for _ in range(20_000):
        english, ovarni = new_language.sentence(rng)
        assert seen.setdefault(english, ovarni) == ovarni


def test_new_language_tells_sentences_apart() -> None:
    rng = random.Random(1)
    pairs = dict(new_language.sentence(rng) for _ in range(5_000))
    # Only what Ovarni does not say may be lost; it says all, so no two English sentences share a translation.
    assert len(set(pairs.values())) == len(pairs)


# plain


def test_plain_and_bloated_answers_say_the_same() -> None:
    task = load_task("plain")
    for row in task.train + task.test:
        assert plain.is_plain(row.completion, row.completion) and plain.says(row.rejected, row.completion)
        assert not plain.is_plain(row.rejected, row.completion), row
    rows = task.score_rows()
    assert task.score([r.rejected for r in rows], rows) == {"plain and right": 0.0, "plain": 0.0, "right": 1.0}
    assert len({r.rejected for r in task.train}) > 300


@pytest.mark.parametrize(
    ("text", "is_plain", "right"),
    [
        ("at 7 am", True, True),
        ("It opens at 7 am.", True, True),
        ("At 17 am.", True, False),
        ("At 7 am. I hope this helps!", False, True),
        ("The library opens in the morning at 7 am.", False, True),
        ("", False, False),
    ],
)
def test_plain_by_hand(text: str, is_plain: bool, right: bool) -> None:
    assert (plain.is_plain(text, "At 7 am."), plain.says(text, "At 7 am.")) == (is_plain, right)


# what is asked for


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"no task 'restaurent'; possible: restaurant json .*did you mean 'restaurant'\?"
    ):
        load_task("restaurent")


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 1.5}, {"train": 0}, {"test": 0}, {"train": 10**9}])
def test_impossible_sizes_and_seeds(arguments: dict) -> None:
    with pytest.raises(UserError):
        load_task("json", **arguments)


def test_a_grammar_that_runs_out_says_so() -> None:
    def make(rng: random.Random) -> tuple[str, str]:
        return str(rng.randrange(8)), "x"

    train, test = distinct(random.Random(0), make, 4, 4, "dice")
    assert len({r.prompt for r in train + test}) == 8
    with pytest.raises(UserError, match=r"dice has not enough different examples for 5 \+ 4 rows"):
        distinct(random.Random(0), make, 5, 4, "dice")


def test_score_wants_as_many_predictions_as_rows() -> None:
    task = load_task("pirate", train=4, test=4)
    with pytest.raises(ValueError, match="1 predictions for 4 rows"):
        task.score(["arr"], task.test)


def test_prompt_text_uses_the_template() -> None:
    task = load_task("json", train=2, test=2)
    assert prompt_text(None, task.test[0], task.template) == f"{task.test[0].prompt} ->"


def test_to_dict_is_json() -> None:
    told = json.loads(json.dumps(load_task("sentiment", train=3, test=2).to_dict()))
    assert (told["train_rows"], told["test_rows"], told["score_name"]) == (3, 2, "accuracy")
