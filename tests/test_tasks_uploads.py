"""A task from the user's file: what is held out, how it is scored, what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from lora_core.tasks import CHAT, TEMPLATE, Row, encode_many, load_data, load_held_out, preview
from lora_core.tasks.data_files import Content
from lora_core.tasks.uploads import split
from tests.tokenizer_fixture import tiny_tokenizer

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data does not lie beside the repository")
SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# held out


@SETTINGS
@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=60), seed=st.integers(0, 1000))
def test_split_shares_no_prompt_and_loses_no_row(sizes: list[int], seed: int) -> None:
    rows = tuple(Row(f"p{i}", f"c{j}", 100 * i + j) for i, n in enumerate(sizes) for j in range(n))
    train, held = split(Content("a", rows), seed, [])
    assert train and held
    assert not {r.prompt for r in train} & {r.prompt for r in held}
    assert sorted(r.line for r in train + held) == sorted(r.line for r in rows)
    assert (train, held) == split(Content("a", rows), seed, [])
    # Never much more than a tenth, save when the smallest prompt alone is more.
    assert len(held) <= max(1.5 * max(1, round(0.1 * len(rows))), min(sizes))
    # One row of every prompt comes before the second of any.
    first = len({r.prompt for r in held})
    assert len({r.prompt for r in held[:first]}) == first


def test_split_depends_on_the_seed_and_holds_out_at_most_128_prompts() -> None:
    rows = tuple(Row(f"p{i}", "c", i) for i in range(5000))
    first, second = (split(Content("a", rows), seed, [])[1] for seed in (0, 1))
    assert len(first) == len(second) == 128
    assert {r.prompt for r in first} != {r.prompt for r in second}


def test_rows_of_one_prompt_are_parted_by_completion_and_that_is_told(tmp_path: Path) -> None:
    task = load_data(write(tmp_path, "jokes.txt", "".join(f"Tell a joke||joke {i % 10}\n" for i in range(20))))
    assert not {r.completion for r in task.train} & {r.completion for r in task.test}
    assert task.notes == ("all rows of jokes.txt have the same prompt, so the held-out rows share it with training",)


@pytest.mark.parametrize("text", ["a||b\n", "a||b\na||b\n"])
def test_nothing_to_hold_out(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="a.txt has only one distinct row"):
        load_data(write(tmp_path, "a.txt", text))


def test_two_rows_are_enough(tmp_path: Path) -> None:
    task = load_data(write(tmp_path, "a.txt", "a||b\nc||d\n"))
    assert (len(task.train), len(task.test)) == (1, 1)


def test_a_file_of_held_out_rows(tmp_path: Path) -> None:
    train = write(tmp_path, "train.txt", "a||1\nb||2\nc||3\n")
    test = write(tmp_path, "test.txt", "x||9\nb||8\n")
    task = load_data(train, test=test)
    assert [r.prompt for r in task.train] == ["a", "c"]
    assert [r.prompt for r in task.test] == ["x", "b"]
    assert [(n.line, n.file) for n in task.skipped] == [(2, "train.txt")]
    assert task.notes == ("1 row of train.txt was left out of training (the prompt is also held out): line 2",)
    with pytest.raises(UserError, match="every prompt of train.txt is also in the held-out file"):
        load_data(train, test=train)
    with pytest.raises(UserError, match="bad.txt, line 1: no completion"):
        load_data(train, test=write(tmp_path, "bad.txt", "a||\n"))


def test_load_held_out_keeps_every_row_in_order(tmp_path: Path) -> None:
    task = load_held_out(write(tmp_path, "a.txt", "a||b\na||c\nd||e\n"))
    assert not task.train
    assert [(r.prompt, r.completion) for r in task.test] == [("a", "b"), ("a", "c"), ("d", "e")]


# the score that fits


def test_few_short_completions_are_labels(tmp_path: Path) -> None:
    task = load_data(write(tmp_path, "a.tsv", "".join(f"text {i}\t{i % 2}\n" for i in range(40))))
    assert task.score_name == "accuracy"
    rows = task.score_rows()
    assert task.score([r.completion for r in rows], rows) == {"accuracy": 1.0}
    assert task.suggested["max_new_tokens"] <= 8


def test_labels_stay_as_given_unless_told(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "".join(f"text {i}\t{i % 2}\n" for i in range(40)))
    assert {r.completion for r in load_data(path).train} == {"0", "1"}
    task = load_data(path, labels={"1": "positive", "0": "negative"})
    assert {r.completion for r in task.train + task.test} == {"positive", "negative"}
    with pytest.raises(UserError, match="a.tsv, line 1: no word for the label '0'; possible: 1"):
        load_data(path, labels={"1": "positive"})


def test_sentences_get_bleu_and_short_answers_exact_match(tmp_path: Path) -> None:
    text = "".join(f"fact {i}||this is a sentence about number {i}\n" for i in range(30))
    sentences = load_data(write(tmp_path, "a.txt", text))
    rows = sentences.score_rows()
    assert sentences.score([r.completion for r in rows], rows) == {"BLEU": pytest.approx(100), "exact match": 1.0}
    answers = load_data(write(tmp_path, "b.txt", "".join(f"{i} + {i}||{2 * i}\n" for i in range(30))))
    assert answers.score_name == "exact match"
    # Ten short answers that do not come back are answers, not ten labels.
    few = load_data(write(tmp_path, "c.txt", "".join(f"{i} + {i}||{2 * i}\n" for i in range(10))))
    assert few.score_name == "exact match"


def test_plain_text_has_no_score(tmp_path: Path) -> None:
    task = load_data(write(tmp_path, "a.jsonl", "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(30))))
    assert task.score_name == "" and task.score_rows() == ()
    assert task.score([""] * len(task.test), task.test) == {}
    assert not {r.completion for r in task.train} & {r.completion for r in task.test}


def test_conversations_use_the_chat_template(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    task = load_data(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))), tokenizer=tiny_tokenizer())
    assert task.template == CHAT
    assert preview(task, tiny_tokenizer(), 1)[0]["pieces"][0] == {"text": "<|im_start|>", "trained": False}


def test_template(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "a||b\nc||d\n")
    assert load_data(path).template == TEMPLATE
    assert load_data(path, template="Q: {prompt}\nA:").template == "Q: {prompt}\nA:"
    with pytest.raises(UserError, match="must hold {prompt} once"):
        load_data(path, template="nothing")


# what was cut is told, with its lines


def test_rows_longer_than_the_context_are_kept_and_named(tmp_path: Path) -> None:
    text = "".join(f"prompt {i} {'long ' * (200 if i in (3, 7) else 1)}||completion {i}\n" for i in range(20))
    tokenizer = tiny_tokenizer()
    task = load_data(write(tmp_path, "a.txt", text), tokenizer=tokenizer, max_tokens=64)
    assert len(task.train) + len(task.test) == 20
    assert sorted(n.line for n in task.skipped) == [4, 8]
    assert {n.kind for n in task.skipped} == {"cut"}
    assert task.notes == ("2 rows of a.txt are longer than 64 tokens and were cut: lines 4, 8",)
    encoded = encode_many(tokenizer, task.train + task.test, task.template, 64)
    assert sum(e.cut for e in encoded) == 2 and max(len(e.ids) for e in encoded) == 64


# real files


@needs_data
def test_e2e() -> None:
    path = DATA / "e2e_valid.txt"
    task = load_data(path)
    assert len(task.train) + len(task.test) == 4672
    assert len({r.prompt for r in task.train + task.test}) == 547
    assert not {r.prompt for r in task.train} & {r.prompt for r in task.test}
    assert task.score_name == "BLEU"
    assert len({r.prompt for r in task.test[:128]}) == len({r.prompt for r in task.test}) >= 40
    raw = path.read_text(encoding="utf-8").split("\n")
    for row in task.train[:200] + task.test[:200]:
        assert [half.strip() for half in raw[row.line - 1].split("||")] == [row.prompt, row.completion]


@needs_data
def test_sst2() -> None:
    task = load_data(DATA / "sst2_train.tsv", test=DATA / "sst2_dev.tsv")
    left_out = sum(n.kind == "left out" for n in task.skipped)
    assert len(task.train) + left_out == 6920 and len(task.test) == 872
    assert {r.completion for r in task.train} == {"0", "1"}
    assert task.score_name == "accuracy"
    always = task.score(["1"] * len(task.test), task.test)
    assert always == {"accuracy": pytest.approx(sum(r.completion == "1" for r in task.test) / 872)}
