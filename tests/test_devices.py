"""Everything that computes with a model does so where the model is: the same figures on a GPU as on the CPU.

Each entry of TOUR is run on a CPU's model, and once more on the device; without a GPU that is a CPU again, which
keeps the tour itself going.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import filled, tiny
from tokenizer_fixture import tiny_tokenizer
from torch import Tensor

import lora_core as lc
from lora_core.dials import Dials, losses_together
from lora_core.knockout import gain_shares, holders
from lora_core.walk import Walk

TOK = tiny_tokenizer()
ROWS = tuple(lc.Row(f"the {a}", f"{b} is low") for a in ("fox", "dog", "pub", "inn") for b in ("price", "river", "fee"))
TASK = lc.Task(name="t", about="", train=ROWS, test=ROWS[:5], score_name="", scorer=lambda *_: {})
PAIRS = tuple(dataclasses.replace(r, rejected=f"well, {r.completion}") for r in ROWS)
TEXTS = tuple(lc.Row(f"the {w} is here {i}", "ab"[w == "fox"]) for i in range(6) for w in ("fox", "dog"))
CONFIG = lc.TrainConfig(steps=6, batch_size=4, lr=3e-3, eval_rows=5)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_on(device: str, family: str = "llama") -> tuple[Any, Any]:
    model = tiny(family).to(device)
    spec = lc.LoraSpec(targets=("q", "k", "v", "o", "down") if family == "llama" else ("q", "v"), rank=3)
    adapter = lc.attach(model, spec, name="a")
    start = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=start) * 0.05)
    return model, adapter


def goal(model: Any) -> Any:
    return lc.CausalLM(model, TOK, "{prompt} ->")


def losses(model: Any, adapter: Any) -> Any:
    found = lc.evaluate(model, TOK, ROWS, adapters=[None, "a"])
    return [found[n].loss for n in (None, "a")]


def texts(model: Any, adapter: Any) -> Any:
    *_, last = lc.generate(model, TOK, ["the fox", "a dog and a pub ->"], adapters=[None, "a"], max_new_tokens=6)
    *_, drawn = lc.generate(model, TOK, ["the fox"], adapters=["a"], max_new_tokens=4, temperature=0.8, top_p=0.9)
    assert drawn.done
    return last.texts


def words(model: Any, adapter: Any) -> Any:
    one = lc.token_differences(model, TOK, "the fox", "price is low", "a")
    two = lc.text_differences(model, TOK, "the price of the fox is low", "a")
    return [(d.text, d.base_logprob, d.adapted_logprob, d.kl) for d in (*one, *two)]


def dials(model: Any, adapter: Any) -> Any:
    made, objective = Dials(adapter), goal(model)
    items = objective.encode(ROWS)
    share = gain_shares(made, objective, items)
    found = holders(made, objective, items)
    together = [values for _, values, _ in losses_together(objective, items, [None, "a"])]
    return [sorted(share.items()), dataclasses.asdict(found), together]


def cuts(model: Any, adapter: Any) -> Any:
    found = lc.measure_cuts(adapter, lambda x: goal(x.model), ROWS)
    return [found.base, found.cuts]


def combined(model: Any, adapter: Any) -> Any:
    model.get_submodule(adapter.sites[next(iter(adapter.sites))].path)
    lc.attach(model, lc.LoraSpec(targets=("q",), rank=2), name="b")
    made = lc.combine(model, {"a": 1.0, "b": 0.5}, "c", method="svd", rank=2)
    lc.switch(model, None, "c")
    sizes = {k: float(d.dense().norm()) for k, d in made.deltas().items()}
    lc.subtract_add(model, None, "a")
    merged = losses_of_base(model)
    lc.subtract_add(model, "a", None)
    return [sizes, merged]


def losses_of_base(model: Any) -> float:
    return lc.evaluate(model, TOK, ROWS)[None].loss


def spaces(model: Any, adapter: Any) -> Any:
    key = next(iter(adapter.sites))
    A, delta, W0 = adapter.factors(key).A, adapter.delta(key), adapter.W0(key)
    return [lc.phi(A, A.detach().flip(1), 2, 2), lc.projection_distance(A, A, 2, 2), lc.amplification(delta, W0),
            {k: dataclasses.asdict(v) for k, v in lc.spectra(adapter).items()}]  # fmt: skip


def trained(model: Any, adapter: Any) -> Any:
    events = list(lc.train(adapter, TASK, CONFIG, tokenizer=TOK))
    effect = lc.measure_effect(adapter, TASK, CONFIG, events, tokenizer=TOK)
    return [[(e.loss, e.held_loss, e.grad_norm, e.norms) for e in events], effect.counted, effect.reason]


def pairs(model: Any, adapter: Any) -> Any:
    task = dataclasses.replace(TASK, train=PAIRS, test=PAIRS[:4])
    events = list(lc.train(adapter, task, CONFIG, tokenizer=TOK, objective="preference"))
    objective = lc.Preference(adapter, TOK, "{prompt} ->")
    return [[(e.loss, e.held_loss) for e in events], lc.measure(objective, PAIRS, adapters=["a"])["a"]]


def walked(model: Any, adapter: Any) -> Any:
    adapter.detach()
    walk = Walk(model, TOK, TASK, lc.LoraSpec(rank=2), CONFIG)
    out = []
    for _ in range(3):
        f, s = walk.forward(), walk.finish()
        out.append((f.loss, s.grad_norm))
    return out


def stored(model: Any, adapter: Any, folder: Path) -> Any:
    adapter.save(folder / "a")
    adapter.detach()
    lc.load_adapter(model, folder / "a", name="a")
    opened = lc.read_adapter(folder / "a")
    return [losses(model, None), sorted(opened.sites)]


def resumed(model: Any, adapter: Any, folder: Path) -> Any:
    """A run that stops and goes on ends where one without a break does."""
    config = lc.TrainConfig(**{**CONFIG.to_dict(), "steps": 8})
    whole = lc.attach(model, lc.LoraSpec(rank=2), name="whole")
    adapter.enable(False)
    want = [e.loss for e in lc.train(whole, TASK, config, tokenizer=TOK) if e.kind == "step"]
    whole.detach()
    got: list[Any] = []
    for stop in (5, 8):
        part = lc.attach(model, lc.LoraSpec(rank=2), name="part")
        for e in lc.train(part, TASK, config, tokenizer=TOK, checkpoint=folder / "c",
                          stop=lambda: len(got) == 5 and stop == 5):  # noqa: B023  # fmt: skip
            if e.kind == "step":
                got.append(e.loss)
        part.detach()
    assert len(got) == 8 and got == pytest.approx(want, rel=1e-3)
    return got


TOUR: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (losses, texts, words, dials, cuts, combined, spaces, trained, pairs, walked, stored, resumed)
}


def close(a: Any, b: Any) -> None:
    """The same structure, with numbers as near as float32 has them after a few steps."""
    if isinstance(a, Tensor):
        a, b = a.tolist(), b.tolist()
    if isinstance(a, dict):
        assert list(map(str, a)) == list(map(str, b))
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=2e-3, abs=2e-4, nan_ok=True)
    elif hasattr(a, "tolist"):
        close(a.tolist(), b.tolist())
    else:
        assert a == b


@pytest.mark.parametrize("name", TOUR)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_figures_wherever_the_model_is(name: str, family: str, tmp_path: Path) -> None:
    found = []
    for i, device in enumerate(("cpu", DEVICE)):
        model, adapter = model_on(device, family)
        more = (tmp_path / str(i),) if TOUR[name] in (stored, resumed) else ()
        for folder in more:
            folder.mkdir()
        found.append(TOUR[name](model, adapter, *more))
        assert {p.device.type for p in model.parameters()} == {device}
    close(*found)


@pytest.mark.parametrize("full", [(), ("head", "bert.pooler")])
def test_texts_are_classified_wherever_the_model_is(full: tuple[str, ...]) -> None:
    from test_fast_encoder import bert

    found = []
    for device in ("cpu", DEVICE):
        model = bert(torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device)
        model.config.vocab_size = TOK.vocab_size
        model.resize_token_embeddings(TOK.vocab_size)
        with torch.no_grad():
            weight = model.bert.embeddings.word_embeddings.weight
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        adapter = filled(lc.attach(model.cpu(), lc.LoraSpec(targets=("q", "v"), rank=2, full=full), name="a"), std=0.02)
        model.to(device)
        objective = lc.Classification(model, TOK, ("a", "b", "c"))
        task = dataclasses.replace(TASK, train=TEXTS, test=TEXTS[:4])
        events = list(lc.train(adapter, task, CONFIG, tokenizer=TOK, objective=objective))
        found.append([[(e.loss, e.held_loss) for e in events], lc.measure(objective, TEXTS, adapters=[None, "a"])])
    close(*found)
