"""Generation against transformers' own, several adapters in one batch, and what an adapter moved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VOCAB, filled, tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core.evaluate import pieces
from lora_core.methods import method_spec

PROMPTS = ["the quick brown fox", "name : The Copper Kettle | food :", "a"]
TOK = tiny_tokenizer(VOCAB)


def last(*args: Any, **more: Any) -> lc.Generation:
    *_, end = lc.generate(*args, **more)
    return end


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_equals_transformers_prompt_by_prompt(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    model.generation_config.pad_token_id = TOK.pad_token_id
    a = filled(lc.attach(model, lc.LoraSpec(rank=4), name="a"), std=0.5)
    got = last(model, TOK, PROMPTS, adapters=[None, "a"], max_new_tokens=12)
    assert got.done and got.adapters == (None, "a")
    for i, prompt in enumerate(PROMPTS):
        x = TOK(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        for j in range(2):
            a.enable(bool(j))
            want = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False)[
                0, x.shape[1] :
            ]
            assert got.texts[i][j] == TOK.decode(want, skip_special_tokens=True)
    assert any(t[0] != t[1] for t in got.texts), "the adapter says something else"


@pytest.mark.parametrize("method", ["prefix", "bottleneck"])
def test_what_is_off_elsewhere_acts_on_its_own_rows(method: str) -> None:
    """The quick way of decoding knows neither prefix nor bottleneck; whether it is open is asked where they act."""
    model = tiny("llama", dtype=torch.float64)
    a = filled(lc.attach(model, method_spec(method, 4), name="a"), std=1.0)
    wanted = [last(model, TOK, PROMPTS[0], adapters=["a"], max_new_tokens=8).texts[0][0]]
    a.enable(False)
    wanted.insert(0, last(model, TOK, PROMPTS[0], max_new_tokens=8).texts[0][0])
    assert list(last(model, TOK, PROMPTS[0], adapters=[None, "a"], max_new_tokens=8).texts[0]) == wanted
    assert wanted[0] != wanted[1]


def test_it_streams_one_event_a_token_and_can_be_stopped() -> None:
    model = tiny("llama")
    events = list(lc.generate(model, TOK, PROMPTS[0], max_new_tokens=6))
    assert [e.done for e in events] == [False] * (len(events) - 1) + [True]
    for before, after in zip(events, events[1:]):
        assert after.texts[0][0].startswith(before.texts[0][0])
    count = iter(range(99))
    assert len(list(lc.generate(model, TOK, PROMPTS, max_new_tokens=50, stop=lambda: next(count) == 2))) == 3


def test_sampling_is_seeded_and_top_p_narrows() -> None:
    model = tiny("llama")
    draw = [last(model, TOK, PROMPTS, max_new_tokens=10, temperature=1.5, seed=s).texts for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    greedy = last(model, TOK, PROMPTS, max_new_tokens=10).texts
    assert last(model, TOK, PROMPTS, max_new_tokens=10, temperature=1.0, top_p=1e-9).texts == greedy


def test_bad_input() -> None:
    model = tiny("llama")
    for more, says in (
        (dict(prompts=[]), "at least one prompt"), (dict(prompts=[""]), "empty"),
        (dict(adapters=["x"]), "no adapter 'x'"), (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-1), "temperature"),
        (dict(top_p=0), "top_p"), (dict(prompts=["a b c " * 200]), "reads at most 127"),
    ):  # fmt: skip
        with pytest.raises(lc.UserError, match=says):
            last(model, TOK, **{"prompts": PROMPTS, **more})


def test_evaluate_and_token_differences_agree() -> None:
    model = tiny("llama", dtype=torch.float64)
    filled(lc.attach(model, lc.LoraSpec(rank=4), name="a"), std=0.5)
    row = lc.Row("the fox", "jumps over the lazy dog")
    losses = lc.evaluate(model, TOK, [row], adapters=[None, "a"])
    diffs = lc.token_differences(model, TOK, row.prompt, row.completion, "a")
    assert "".join(d.text for d in diffs) == " " + row.completion
    # The loss counts the end of text as well; the words alone are what token_differences shows.
    ids = [t for text in ("the fox ->", " " + row.completion) for t in TOK(text, add_special_tokens=False).input_ids]
    with torch.no_grad(), lc.rows(model, ["a"]):
        end = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[TOK.eos_token_id]
    mean = (sum(d.adapted_logprob for d in diffs) + float(end)) / (len(diffs) + 1)
    assert losses["a"].loss == pytest.approx(-mean, rel=1e-5) and losses["a"].loss != losses[None].loss
    assert losses["a"].perplexity == pytest.approx(math.exp(losses["a"].loss)) and losses["a"].tokens == len(diffs) + 1
    for d in diffs:
        assert len(d.base_top) == 3 and d.base_top[0][1] >= d.base_top[1][1]
    assert lc.token_differences(model, TOK, "x", "  ", "a") == []


@pytest.mark.parametrize("begin", [False, True])
def test_any_text_token_by_token_with_its_divergence(begin: bool) -> None:
    """Against both models' whole distributions, one forward pass each; KL over all of the vocabulary."""
    model, tok = tiny("llama", dtype=torch.float64), tiny_tokenizer(begin=begin)
    filled(lc.attach(model, lc.LoraSpec(rank=4), name="a"), std=0.5)
    text = "the fox was not amused. Café 日本"
    found = lc.text_differences(model, tok, text, "a", top=5)
    ids = tok(text).input_ids
    assert (ids[0] == tok.bos_token_id) == begin
    p = {}
    for name in (None, "a"):
        with torch.no_grad(), lc.rows(model, [name]):
            p[name] = model(torch.tensor([ids])).logits[0].softmax(-1)
    assert len(found) == len(ids) - 1
    for i, d in enumerate(found):
        base, adapted = p[None][i], p["a"][i]
        assert d.base_logprob == pytest.approx(float(base[ids[i + 1]].log()))
        assert d.adapted_logprob == pytest.approx(float(adapted[ids[i + 1]].log()))
        want = torch.nn.functional.kl_div(base.log(), adapted, reduction="sum")
        assert d.kl == pytest.approx(float(want), rel=1e-6) and d.kl > 0 and len(d.adapted_top) == 5
    assert (text if begin else text[len(tok.decode(ids[:1])):]) == "".join(d.text for d in found)
    assert len(lc.text_differences(model, tok, text, "a", max_tokens=4)) == 3
    assert lc.text_differences(model, tok, "", "a") == []


def test_pieces_join_to_the_text_whatever_its_characters() -> None:
    text = "Café £30 — ΔW 日本 👍"
    ids = TOK(text, add_special_tokens=False).input_ids
    assert "".join(pieces(TOK, ids)) == text and len(pieces(TOK, ids)) == len(ids)


def test_score_runs_both_sides_of_a_task() -> None:
    model = tiny("llama")
    filled(lc.attach(model, lc.LoraSpec(rank=4), name="a"))
    task = lc.load_task("sentiment", train=20, test=8)
    scores = lc.score(model, TOK, task, adapters=[None, "a"], limit=4)
    assert scores.keys() == {None, "a"} and task.score_name in scores["a"]
    assert all(0 <= v <= 1 for s in scores.values() for v in s.values())
