"""Rows to tokens: what is trained, what is cut, and what the preview shows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from lora_core.tasks import (
    CHAT,
    TEMPLATE,
    Row,
    check_template,
    cut_notes,
    encode,
    encode_many,
    load_task,
    pieces,
    preview,
    prompt_text,
)
from lora_core.tasks.task import summarise
from tests.tokenizer_fixture import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROW = Row("name : The Mill | food : Thai", "The Mill serves Thai food.", 1)
WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=60).filter(
    lambda t: t.strip() and "<|" not in t
)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_row_is_template_completion_and_end_of_text() -> None:
    made = encode(TOKENIZER, ROW, TEMPLATE)
    assert made.ids == ids("name : The Mill | food : Thai ->") + ids(" The Mill serves Thai food.") + [
        TOKENIZER.eos_token_id
    ]
    assert made.start == len(ids("name : The Mill | food : Thai ->"))
    assert not made.cut


def test_no_special_token_is_added_in_front() -> None:
    begins = tiny_tokenizer(begin=True)
    assert begins("a")["input_ids"][0] == begins.bos_token_id
    assert encode(begins, ROW, TEMPLATE) == encode(TOKENIZER, ROW, TEMPLATE)


@given(prompt=WORDS, completion=WORDS, most=st.integers(2, 80))
@settings(deadline=None, max_examples=200)
def test_encode_for_any_text(prompt: str, completion: str, most: int) -> None:
    row = Row(prompt, completion, 1)
    before, after = ids(prompt + " ->"), [*ids(" " + completion), TOKENIZER.eos_token_id]
    made = encode(TOKENIZER, row, TEMPLATE, most)
    assert len(made.ids) <= most
    assert 1 <= made.start < len(made.ids)
    assert made.cut == (len(before) + len(after) > most)
    if not made.cut:
        assert made.ids == before + after
    elif len(after) < most:  # the completion stays whole, the prompt keeps its end
        assert made.ids[made.start :] == after and len(made.ids) == most
        assert made.ids[: made.start] == before[-made.start :]
    else:  # one token of the prompt is left, and the completion's beginning
        assert made.ids == before[-1:] + after[: most - 1]
        assert made.start == 1


@given(prompt=WORDS, completion=WORDS)
@settings(deadline=None)
def test_braces_and_percent_signs_mean_nothing(prompt: str, completion: str) -> None:
    prompt = "{0} %s {prompt!r} " + prompt + " {"
    template = "{x} {{prompt}} } says:"
    assert prompt_text(TOKENIZER, Row(prompt, completion), template) == "{x} {" + prompt + "} } says:"


def test_many_rows_at_once_are_the_same_as_one_by_one() -> None:
    rows = load_task("restaurant", train=40).train
    assert encode_many(TOKENIZER, rows, TEMPLATE, 48) == [encode(TOKENIZER, r, TEMPLATE, 48) for r in rows]
    assert encode_many(TOKENIZER, [], TEMPLATE) == []


def test_plain_text_is_trained_from_its_second_token() -> None:
    made = encode(TOKENIZER, Row("", "The quick brown fox"), TEMPLATE)
    assert made.ids == [*ids("The quick brown fox"), TOKENIZER.eos_token_id]
    assert made.start == 1


def test_long_plain_text_loses_its_end() -> None:
    text = "the quick brown fox " * 20
    made = encode(TOKENIZER, Row("", text), TEMPLATE, 10)
    assert made.ids == ids(text)[:10] and made.cut and made.start == 1


CONVERSATION = Row(
    "user: Hi\nassistant: Hello\nuser: Who?",
    "The fox.",
    3,
    (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "The fox.")),
)


def test_messages_use_the_chat_template_and_train_the_last_reply() -> None:
    made = encode(TOKENIZER, CONVERSATION, TEMPLATE)
    before = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TOKENIZER.decode(made.ids[: made.start]) == before == prompt_text(TOKENIZER, CONVERSATION, TEMPLATE)
    assert made.ids[made.start :] == [*ids("The fox."), TOKENIZER.eos_token_id]  # one end of text, not two


def test_the_chat_template_can_be_asked_for() -> None:
    made = encode(TOKENIZER, ROW, CHAT)
    assert TOKENIZER.decode(made.ids) == (
        f"<|im_start|>user\n{ROW.prompt}<|im_end|>\n<|im_start|>assistant\n{ROW.completion}<|im_end|>"
    )
    assert prompt_text(TOKENIZER, "Hi", CHAT) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


class Bare:
    """A tokenizer without a chat template or without end of text."""

    chat_template = None

    def __init__(self, eos: int | None = 2) -> None:
        self.eos_token_id = eos

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[5] * len(t.split()) for t in texts]}


@pytest.mark.parametrize(
    ("tokenizer", "row", "template", "most", "message"),
    [
        (TOKENIZER, Row("a", "  ", 7), TEMPLATE, 9, "line 7: the completion is empty"),
        (TOKENIZER, Row("a", ""), TEMPLATE, 9, "the completion is empty"),
        (TOKENIZER, ROW, "no place for it", 9, "must hold {prompt} once"),
        (TOKENIZER, ROW, "{prompt} {prompt}", 9, "must hold {prompt} once"),
        (TOKENIZER, ROW, TEMPLATE, 1, "needs at least 2 tokens"),
        (TOKENIZER, ROW, TEMPLATE, True, "needs at least 2 tokens"),
        (Bare(), CONVERSATION, TEMPLATE, 9, "no chat template"),
        (Bare(None), ROW, TEMPLATE, 9, "no end-of-text token"),
    ],
)
def test_what_cannot_be_encoded(tokenizer: Any, row: Row, template: str, most: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        encode(tokenizer, row, template, most)
    assert message in str(error.value)


def test_a_chat_template_that_refuses_is_a_user_error() -> None:
    class Refuses(Bare):
        chat_template = "x"

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise RuntimeError("roles must alternate")

    with pytest.raises(UserError, match="does not take this conversation: roles must alternate"):
        encode(Refuses(), CONVERSATION, TEMPLATE)


def test_check_template() -> None:
    assert check_template("Review: {prompt}\nLabel:") == "Review: {prompt}\nLabel:"
    assert check_template(CHAT) == CHAT


# what is cut is told


def test_cut_rows_are_named() -> None:
    rows = [Row("short", "one", 1), Row("long " * 50, "two", 4), Row("long " * 60, "three", 9)]
    notes = cut_notes(TOKENIZER, rows, TEMPLATE, 40, "a.txt")
    assert [(n.line, n.kind) for n in notes] == [(4, "cut"), (9, "cut")]
    assert summarise(notes) == ("2 rows of a.txt are longer than 40 tokens and were cut: lines 4, 9",)
    assert summarise(notes[:1]) == ("1 row of a.txt is longer than 40 tokens and was cut: line 4",)
    assert summarise(notes, most=1) == ("2 rows of a.txt are longer than 40 tokens and were cut: lines 4 and 1 more",)


# preview


def test_preview_shows_the_trained_part_and_all_of_the_text() -> None:
    task = load_task("restaurant", train=20)
    shown = preview(task, TOKENIZER, 5)
    rows = [task.train[told["line"] - 1] for told in shown]
    assert rows[0] == task.train[0] and len({row.prompt for row in rows}) == len(shown) == 5
    for row, told in zip(rows, shown, strict=True):
        given_, trained = ("".join(p["text"] for p in told["pieces"] if p["trained"] is t) for t in (False, True))
        assert given_ == f"{row.prompt} ->"
        assert trained == f" {row.completion}<|im_end|>"
        assert told["tokens"] == len(encode(TOKENIZER, row, TEMPLATE).ids) >= len(told["pieces"])
        assert told["cut"] is False
    assert all(row["cut"] for row in preview(task, TOKENIZER, 3, max_tokens=20))
    assert preview(task, TOKENIZER, 0) == [] and len(preview(task, TOKENIZER, 99)) == len(
        {r.prompt for r in task.train}
    )


@given(prompt=WORDS, completion=WORDS)
@settings(deadline=None, max_examples=100)
def test_pieces_are_whole_characters_and_join_to_the_text(prompt: str, completion: str) -> None:
    made = encode(TOKENIZER, Row(prompt, completion), TEMPLATE, 1000)
    parts = pieces(TOKENIZER, made.ids, made.start)
    assert "".join(p["text"] for p in parts) == f"{prompt} -> {completion}<|im_end|>"
    if "\ufffd" not in prompt + completion:
        assert all("\ufffd" not in p["text"] for p in parts)
    assert [p["trained"] for p in parts] == sorted(p["trained"] for p in parts)


def test_a_character_of_several_tokens_is_one_piece() -> None:
    made = encode(TOKENIZER, Row("né 🦊", "日本"), TEMPLATE)
    texts = [p["text"] for p in pieces(TOKENIZER, made.ids, made.start)]
    assert "é" in "".join(texts) and any("🦊" in t for t in texts) and any(t.strip() == "日" for t in texts)
    assert len(texts) < len(made.ids)


def test_a_very_long_row_is_shown_in_time_that_grows_with_it() -> None:
    """Token by token from the start of the row this took a minute; the pieces are the same ones."""
    import time

    from lora_core.tasks import pieces

    tokenizer = tiny_tokenizer()
    text = "é 😀 naïve, ".join("abcdefgh") * 150
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    began = time.process_time()
    found = pieces(tokenizer, ids, len(ids) // 3)
    assert "".join(p["text"] for p in found) == text and time.process_time() - began < 20
    short = ids[:400]
    whole = [str(tokenizer.decode(short[:i], clean_up_tokenization_spaces=False)) for i in range(len(short) + 1)]
    ends = [len(w) for w in whole[1:] if not w.endswith("\ufffd") and whole[-1].startswith(w)]
    told, at = pieces(tokenizer, short, 0), 0
    for piece in told[:-1]:
        at += len(piece["text"])
        assert at in ends
    assert len(told) >= len(set(ends))
