"""Three objectives through one loop: their arithmetic against the formulas, and what each of them refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, bits, filled, tiny
from tokenizer_fixture import tiny_tokenizer
from torch import Tensor

import lora_core as lc
from lora_core.classification import Classification, drawn_modules, labels_for
from lora_core.evaluate import mean_loss, measure
from lora_core.objective import CausalLM, choose, objective_for
from lora_core.preference import Preference
from lora_core.tasks.scores import score_labels
from lora_core.train import parameter_groups, update_norms
from tests.model_folder import tiny_bert, tiny_llama

LABELS = ("good", "bad", "neither")
PLAIN = lc.load_task("plain", train=40, test=12)  # its bloated answers are too long for tiny models
PAIRS = replace(PLAIN, **{part: tuple(replace(r, rejected=f"Certainly! {r.completion}") for r in getattr(PLAIN, part))
                          for part in ("train", "test")})  # fmt: skip
FAST: dict[str, Any] = dict(steps=6, batch_size=4, lr=1e-2, eval_rows=8, max_tokens=64)
HEAD = lc.LoraSpec(targets=("q", "v"), rank=2, full=("head",))


def texts() -> lc.Task:
    """Texts whose label is told by one word."""
    words = {"good": "excellent", "bad": "amused", "neither": "riverside"}
    rows = [lc.Row(f"{words[label]} food number {i} is not far from the {words[label]}", label, i * 3 + k + 1)
            for i, (k, label) in itertools.product(range(16), enumerate(LABELS))]  # fmt: skip
    return lc.Task(name="texts", about="", train=tuple(rows[:39]), test=tuple(rows[39:]), score_name="accuracy",
                   scorer=score_labels(LABELS))  # fmt: skip


TEXTS = texts()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"bert": tiny_bert(root / "bert"), "llama": tiny_llama(root / "llama")}


def classifier(folder: Path, labels: Sequence[str] = LABELS) -> tuple[Any, Any]:
    return lc.load_model(folder, device="cpu", dtype="float32", labels=labels)


# ---- models with labels -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_with_labels_has_the_same_head_every_time(folders: dict[str, Path], kind: str) -> None:
    torch.manual_seed(1)
    model, _ = classifier(folders[kind])
    before = torch.get_rng_state()
    again, _ = classifier(folders[kind])
    assert torch.equal(torch.get_rng_state(), before), "drawing a head leaves torch's own generator alone"
    assert all(torch.equal(v, bits(again)[n]) for n, v in bits(model).items())
    assert model.config.num_labels == 3 and model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {"good": 0, "bad": 1, "neither": 2} and model.config.pad_token_id is not None
    info = model.lora_lab
    assert info.labels == LABELS and info.kind == {"bert": "encoder", "llama": "causal-lm"}[kind]
    assert info.drawn == {"bert": ("classifier.bias", "classifier.weight"), "llama": ("score.weight",)}[kind]
    assert drawn_modules(model) == ("head",)


def test_a_saved_head_is_kept_with_its_own_order(folders: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = classifier(folders["bert"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = classifier(tmp_path, sorted(LABELS))
    assert again.lora_lab.labels == LABELS and again.lora_lab.drawn == ()
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("labels", "words"),
    [(("one",), "1 label given"), ((), "0 labels given"), (("a", "b", "a"), "label 'a' is given twice"),
     ("good", "give their names"), (("a", ""), "give their names"), ((1, 2), "give their names")],
)  # fmt: skip
def test_labels_that_cannot_be(folders: dict[str, Path], labels: Any, words: str) -> None:
    with pytest.raises(lc.UserError, match=words):
        classifier(folders["bert"], labels)


@pytest.mark.parametrize(
    ("completions", "words"),
    [(["a"], "1 different completions \\('a'\\)"), ([str(i) for i in range(101)], "101 different completions .*, …")],
)  # fmt: skip
def test_tasks_that_have_no_labels(completions: list[str], words: str) -> None:
    assert lc.labels_of(TEXTS) == ("bad", "good", "neither")
    with pytest.raises(lc.UserError, match=words):
        lc.labels_of(replace(TEXTS, train=tuple(lc.Row("x", c) for c in completions), test=()))
    with pytest.raises(lc.UserError, match="plain text"):
        lc.labels_of(replace(TEXTS, train=(lc.Row("", "a"), lc.Row("x", "b"))))


# ---- classification -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_classification_loss_is_cross_entropy_of_each_text_alone(folders: dict[str, Path], kind: str) -> None:
    """Padding and what else is in a batch change nothing: the encoder has its mask, the decoder its padding token."""
    model, tokenizer = classifier(folders[kind])
    filled(lc.attach(model.double(), HEAD))
    objective = Classification(model, tokenizer)
    rows = [replace(r, prompt=r.prompt + " and the dog" * (i % 4)) for i, r in enumerate(TEXTS.train[:9])]
    items = objective.encode(rows)
    assert len({len(e) for e in items}) > 2 and not any(e.cut for e in items)
    batch = objective.batch(items)
    total, right = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([tokenizer(row.prompt).input_ids])).logits
            gold = torch.tensor([LABELS.index(row.completion)])
            total += float(F.cross_entropy(logits, gold))
            right += int(logits.argmax() == gold)
        assert float(objective.loss(batch)) == pytest.approx(total, rel=1e-9)
    assert batch.labelled == 9 and batch.tokens == sum(map(len, items)) == int(batch.mask.sum())
    figures = measure(objective, rows, adapters=["default"])["default"]
    assert figures == pytest.approx({"loss": total / 9, "accuracy": right / 9}, rel=1e-9)
    assert mean_loss(objective, items, rows=2) == pytest.approx(total / 9, rel=1e-9)
    said = objective.predict([r.prompt for r in rows], rows=4)
    assert sum(label == r.completion for (label, _), r in zip(said, rows)) == right
    assert all(1 / 3 <= p <= 1 for _, p in said)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_learns_and_trains_its_factors_and_head_alone(folders: dict[str, Path], kind: str) -> None:
    model, tokenizer = classifier(folders[kind])
    weights = bits(model)
    a = lc.attach(model, HEAD)
    objective = Classification(model, tokenizer)
    batch = objective.batch(objective.encode(TEXTS.train[:6]))
    with torch.no_grad():
        for key in a.sites:
            a.factors(key).B.normal_(0, 0.1)
    objective.loss(batch).backward()
    own = set(map(id, a.parameters()))
    for name, p in [*model.named_parameters(), *a.named_parameters()]:
        assert (p.grad is not None and bool(p.grad.any())) == (id(p) in own), name
    for p in a.parameters():
        p.grad = None

    events = list(lc.train(a, TEXTS, lc.TrainConfig(**{**FAST, "steps": 40, "lr": 2e-2})))
    held = [e.held_loss for e in events if e.held_loss is not None]
    assert held[-1] < 0.5 * held[0] and abs(held[0] - math.log(3)) < 0.5
    found = measure(objective, TEXTS.test, adapters=[None, "default"])
    assert found["default"]["accuracy"] > max(0.7, found[None]["accuracy"])
    head = next(n for n in a.copies if n.endswith("weight"))
    assert not torch.equal(a.copies[head], weights[head])
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    a.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


def test_a_random_head_is_not_left_as_it_is(folders: dict[str, Path]) -> None:
    model, tokenizer = classifier(folders["bert"])
    a = lc.attach(model, lc.LoraSpec(rank=2))
    with pytest.raises(lc.UserError, match=r"classifier.bias was drawn at random.*full=\('head',\)"):
        next(lc.train(a, TEXTS))
    assert Classification(model, tokenizer).check(lc.attach(model, HEAD, "other")) is None


def test_what_classification_refuses(folders: dict[str, Path]) -> None:
    model, tokenizer = classifier(folders["llama"])
    objective = Classification(model, tokenizer)
    with pytest.raises(lc.UserError, match=r"line 3: no label 'goood'.*did you mean 'good'"):
        objective.encode([lc.Row("x", "good"), lc.Row("x", "goood", 3)])
    with pytest.raises(lc.UserError, match="text and a label are needed"):
        objective.encode([lc.Row("", "good")])
    with pytest.raises(lc.UserError, match="2 labels for a model that tells 3 apart"):
        Classification(model, tokenizer, ("good", "bad"))
    with pytest.raises(lc.UserError, match=r"no head for labels; load it with load_model"):
        Classification(tiny("llama"), tokenizer)
    with pytest.raises(lc.UserError, match=r"load the model with labels=\('bad', 'good', 'neither'\)"):
        labels_for(classifier(folders["llama"], ("yes", "no"))[0], TEXTS)
    model.config.pad_token_id = None
    with pytest.raises(lc.UserError, match="pad_token_id"):
        Classification(model, tokenizer)


def test_labels_without_names_take_those_of_the_task() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config: dict[str, Any] = {"num_labels": 3}
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=3, **config))  # fmt: skip
    assert labels_for(model, TEXTS) == ("bad", "good", "neither")


def test_long_texts_lose_their_end_but_not_their_last_special_token(folders: dict[str, Path]) -> None:
    model, _ = classifier(folders["bert"])
    objective = Classification(model, tiny_tokenizer(begin=True), max_tokens=5)
    short, long = objective.encode([lc.Row("the", "good"), lc.Row("the quick brown fox jumps over it", "good")])
    assert (short.cut, long.cut, len(long)) == (False, True, 5) and long.ids[0] == short.ids[0]


# ---- preference ---------------------------------------------------------------------------------------------------
def answer_logp(model: Any, tokenizer: Any, prompt: str, answer: str) -> Tensor:
    """log p(answer and end of text | prompt) of one text alone, written out."""
    before = tokenizer(f"{prompt} ->", add_special_tokens=False).input_ids
    after = [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([before + after])
    logp = model(ids).logits[0, :-1].log_softmax(-1)
    return torch.stack([logp[len(before) - 1 + i, t] for i, t in enumerate(after)]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_preference_loss_is_the_formula(family: str) -> None:
    """Equation 7 in float64 from separate passes, the reference being another model without an adapter."""
    policy, reference, tok = tiny(family, dtype=torch.float64), tiny(family, dtype=torch.float64), tiny_tokenizer()
    a = filled(lc.attach(policy, lc.LoraSpec(rank=2)))
    objective = Preference(a, tok, PAIRS.template, beta=0.3)
    rows = PAIRS.train[:5]
    rel = 1e-6 if family == "llama" else 1e-9  # transformers' RMSNorm computes in float32 whatever the model's dtype
    total, margins = torch.zeros((), dtype=torch.float64), []
    for r in rows:
        better, worse = (answer_logp(policy, tok, r.prompt, t) - answer_logp(reference, tok, r.prompt, t).detach()
                         for t in (r.completion, r.rejected))  # fmt: skip
        margins.append(float(0.3 * (better - worse).detach()))
        total = total - torch.log(1 / (1 + torch.exp(-0.3 * (better - worse))))
    total.backward()
    expected = [p.grad.clone() for p in a.parameters() if p.grad is not None]
    for p in a.parameters():
        p.grad = None
    batch = objective.batch(objective.encode(rows))
    loss = objective.loss(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=rel) and batch.labelled == 5
    for g, p in zip(expected, a.parameters(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=10 * rel, atol=rel)
    found = measure(objective, rows, adapters=[None, "default"])
    assert found["default"]["margin"] == pytest.approx(sum(margins) / 5, rel=rel)
    assert found["default"]["preferred"] == sum(m > 0 for m in margins) / 5
    assert found["default"]["loss"] == pytest.approx(float(total.detach()) / 5, rel=rel)
    assert found[None] == {"loss": pytest.approx(math.log(2)), "preferred": 0.5, "margin": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_loss_is_exactly_log_2(family: str) -> None:
    a = lc.attach(tiny(family, dtype=torch.float64), lc.LoraSpec(rank=2))
    objective = Preference(a, tiny_tokenizer(), PAIRS.template)
    batch = objective.batch(objective.encode(PAIRS.train[:7]))
    assert torch.equal(objective.margins(batch), torch.zeros(7, dtype=torch.float64))
    assert float(objective.loss(batch).detach()) / 7 == pytest.approx(math.log(2), abs=1e-15)


def test_preferences_are_learnt() -> None:
    a = lc.attach(tiny("llama"), lc.LoraSpec(targets=("q", "v", "o", "up", "down"), rank=4))
    weights = bits(a.model)
    config = lc.TrainConfig(**{**FAST, "steps": 30, "lr": 3e-2, "max_tokens": 128, "beta": 1.0})
    events = list(lc.train(a, PAIRS, config, tokenizer=tiny_tokenizer()))
    held = [e.held_loss for e in events if e.held_loss is not None]
    assert held[0] == pytest.approx(math.log(2)) and held[-1] < 0.4
    assert next(e for e in events if e.kind == "step").loss == pytest.approx(math.log(2))
    objective = Preference(a, tiny_tokenizer(), PAIRS.template, beta=1.0)
    found = measure(objective, PAIRS.test, adapters=[None, "default"])
    assert found["default"]["preferred"] == 1.0 and found["default"]["margin"] > 0.5
    assert all(torch.equal(v, weights[n]) for n, v in bits(a.model).items())


def test_the_reference_is_kept_only_where_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    a = filled(lc.attach(tiny("llama"), lc.LoraSpec(rank=2)))
    a.model.train()
    objective = Preference(a, tiny_tokenizer(), PAIRS.template)
    passes = 0
    whole = objective.lm.logprobs

    def counted(ids: Tensor, labels: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return whole(ids, labels)

    monkeypatch.setattr(objective.lm, "logprobs", counted)
    held, trained = objective.encode(PAIRS.test), objective.encode(PAIRS.train[:4])
    first = mean_loss(objective, held)
    once = passes
    assert mean_loss(objective, held) == first and passes == once + once // 2, "the second time without the reference"
    batches = [objective.batch(trained) for _ in range(2)]
    assert torch.equal(batches[0].reference, batches[1].reference) and passes == once + once // 2 + 2
    assert a.model.training and a.on


def test_what_a_preference_refuses() -> None:
    a = lc.attach(tiny("llama"), lc.LoraSpec(rank=2))
    objective = Preference(a, tiny_tokenizer(), PAIRS.template)
    with pytest.raises(lc.UserError, match="line 4: no rejected answer"):
        objective.encode([PAIRS.train[0], lc.Row("x", "y", 4)])
    with pytest.raises(lc.UserError, match="made for adapter 'default', not 'two'"):
        objective.check(lc.attach(a.model, lc.LoraSpec(rank=1), "two"))
    with pytest.raises(lc.UserError, match="beta is 0"):
        lc.TrainConfig(beta=0)


# ---- one loop -----------------------------------------------------------------------------------------------------
def test_the_loop_is_told_by_name_by_object_or_chooses(folders: dict[str, Path]) -> None:
    tok = tiny_tokenizer()
    lm = lc.attach(tiny("llama"), lc.LoraSpec(rank=2))
    reader = lc.attach(classifier(folders["bert"])[0], HEAD)
    config = lc.TrainConfig(**FAST)
    assert isinstance(objective_for(None, lm, TEXTS, tok, config), CausalLM)
    assert isinstance(objective_for(None, lm, PAIRS, tok, config), Preference)
    assert isinstance(objective_for(None, reader, TEXTS, tok, config), Classification)
    assert choose(True, ()) == "classify" and choose(False, PAIRS.train) == "preference" and choose(False, ()) == "lm"
    with pytest.raises(lc.UserError, match="no objective 'classifly'.*did you mean 'classify'"):
        next(lc.train(lm, TEXTS, config, objective="classifly", tokenizer=tok))
    with pytest.raises(lc.UserError, match="no head for labels"):
        next(lc.train(lm, TEXTS, config, objective="classify", tokenizer=tok))
    with pytest.raises(lc.UserError, match="writes no text"):
        next(lc.train(reader, TEXTS, config, objective="lm", tokenizer=tok))
    runs = []
    for how in ("lm", CausalLM):
        a = lc.attach(tiny("llama"), lc.LoraSpec(rank=2))
        objective = how if isinstance(how, str) else how(a.model, tok, PAIRS.template, 64)
        runs.append([e.loss for e in lc.train(a, PAIRS, config, objective=objective, tokenizer=tok)])
    assert runs[0] == runs[1]


def test_an_objective_of_ones_own() -> None:
    """Anything with the methods will do: here, to say the opposite of what the rows say."""

    class Unlearn(CausalLM):
        name = "unlearn"

        def loss(self, batch: Any) -> Tensor:
            return -super().loss(batch)

    a = lc.attach(tiny("llama"), lc.LoraSpec(rank=2))
    own = Unlearn(a.model, tiny_tokenizer(), PAIRS.template, 64)
    losses = [e.held_loss for e in lc.train(a, PAIRS, lc.TrainConfig(**FAST), objective=own, tokenizer=tiny_tokenizer())
              if e.held_loss is not None]  # fmt: skip
    assert losses[-1] < losses[0] < 0


@pytest.mark.parametrize("init", ["pissa", "gradient"])
def test_other_starts_serve_all_objectives(folders: dict[str, Path], init: Any) -> None:
    for a, task in ((lc.attach(classifier(folders["bert"])[0], replace(HEAD, init=init)), TEXTS),
                    (lc.attach(tiny("llama"), lc.LoraSpec(rank=2, init=init)), PAIRS)):  # fmt: skip
        *_, end = lc.train(a, task, lc.TrainConfig(**FAST), tokenizer=tiny_tokenizer())
        assert end.reason == "done" and end.norms is not None and min(end.norms.values()) > 0


# ---- checkpoints and groups ---------------------------------------------------------------------------------------
SPECS = {
    "classify": replace(HEAD, dropout=0.2),
    "classify, all kinds": replace(HEAD, targets=("q", "v", "norm", "bias"), dora=True),
    "classify, gates": replace(HEAD, mask=0.5),
    "preference": lc.LoraSpec(rank=2, dropout=0.2),
}


@pytest.mark.parametrize("case", SPECS)
def test_resume_is_bit_equal(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    def fresh(seed: int = 0) -> lc.Adapter:
        model = tiny("llama") if case == "preference" else classifier(folders["bert"])[0]
        return lc.attach(model, SPECS[case], seed=seed)

    def run(a: lc.Adapter, **more: Any) -> list[lc.TrainEvent]:
        task = PAIRS if case == "preference" else TEXTS
        config = lc.TrainConfig(**{**FAST, "steps": 9, "checkpoint_every": 2})
        return list(lc.train(a, task, config, tokenizer=tiny_tokenizer(), **more))

    whole, again = fresh(), fresh(seed=7)
    straight = run(whole)
    file, count = tmp_path / "run.safetensors", iter(range(100))
    first = run(fresh(), checkpoint=file, stop=lambda: next(count) == 4)
    assert first[-1].step == 5 and file.exists()
    torch.manual_seed(99)
    second = run(again, checkpoint=file)
    assert [e.loss for e in second if e.kind == "step"] == [e.loss for e in straight if e.kind == "step"][5:]
    assert second[-1].held_loss == straight[-1].held_loss
    names = [n for n, _ in whole.named_parameters()]
    for name, p, q in zip(names, whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert "classifier.weight" in names or case == "preference"


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    file, count = tmp_path / "c", iter(range(9))
    more: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "checkpoint": file}
    spec = lc.LoraSpec(rank=2)
    list(lc.train(lc.attach(tiny("llama"), spec), PAIRS, lc.TrainConfig(**FAST), stop=lambda: next(count) == 1, **more))
    with pytest.raises(lc.UserError, match="another objective: 'preference', not 'lm'"):
        next(lc.train(lc.attach(tiny("llama"), spec), PAIRS, lc.TrainConfig(**FAST), objective="lm", **more))


def test_groups_of_the_optimiser(folders: dict[str, Path]) -> None:
    a = lc.attach(classifier(folders["bert"])[0], replace(HEAD, targets=("q", "bias"), dora=True))
    groups = parameter_groups(a, lc.TrainConfig(lr_ratio=4.0, weight_decay=0.1))
    found = {(g["ratio"], g["weight_decay"]): set(map(id, g["params"])) for g in groups}
    named = dict(a.named_parameters())
    assert found[4.0, 0.1] == {id(p) for n, p in named.items() if n.endswith(".B")}
    assert id(named["classifier.weight"]) in found[1.0, 0.1] and id(named["classifier.bias"]) in found[1.0, 0.0]
    assert sum(map(len, found.values())) == len(list(a.parameters()))


def test_gates_close_while_training(folders: dict[str, Path]) -> None:
    a = lc.attach(classifier(folders["bert"])[0], replace(HEAD, rank=4, mask=30.0))
    list(lc.train(a, TEXTS, lc.TrainConfig(**{**FAST, "steps": 20})))
    assert all(r < 4 for r in a.ranks().values())


def test_norms_of_doras_updates_and_of_an_adapter_without_matrices(folders: dict[str, Path]) -> None:
    a = filled(lc.attach(tiny("llama"), lc.LoraSpec(rank=2, dora=True)))
    for key, n in update_norms(a).items():
        assert n == pytest.approx(float(a.delta(key).dense().norm()), rel=1e-5)
    vectors = lc.attach(classifier(folders["bert"])[0], lc.LoraSpec(targets=("bias",), full=("head",)))
    *_, end = lc.train(vectors, TEXTS, lc.TrainConfig(**FAST))
    assert end.reason == "done" and end.norms == {}
