"""A step walked in stages is the step that `train` makes, and nothing of it stays on the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_core as lc
from lora_core.errors import UserError
from lora_core.registry import book_of
from lora_core.tasks import Row, Task
from lora_core.walk import Walk
from tests.model_folder import tiny_llama

SPEC = lc.LoraSpec(targets=("q", "v", "down"), rank=3, alpha=6)
CONFIG = lc.TrainConfig(steps=5, batch_size=3, lr=1e-2, clip=0.5, seed=4, warmup=0.4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tiny_llama(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.1)
    return lc.load_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def task() -> Task:
    rows = tuple(Row(f"a {c} {s}", f"It is {c}.") for c in ("red", "blue", "green") for s in ("box", "ball", "hat"))
    return Task(name="shapes", about="", train=rows, test=rows[:2], score_name="", scorer=lambda *_: {})


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"lr_ratio": 8.0, "weight_decay": 0.1}])
def test_walked_steps_are_trained_steps(loaded: Any, task: Task, more: dict[str, Any]) -> None:
    model, tokenizer = loaded
    config = lc.TrainConfig(**{**CONFIG.to_dict(), **more})
    adapter = lc.attach(model, SPEC, "run", seed=config.seed)
    events = [e for e in lc.train(adapter, task, config, tokenizer=tokenizer) if e.kind == "step"]
    trained = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    adapter.detach()

    walk = Walk(model, tokenizer, task, SPEC, config)
    for e in events:
        f = walk.forward()
        assert f.step == e.step and f.loss == pytest.approx(e.loss, rel=1e-5)
        assert f.rows == config.batch_size * config.accumulate == len(f.texts)
        s = walk.finish()
        assert (s.step, s.loss, s.lr, s.grad_norm) == (e.step, e.loss, e.lr, e.grad_norm)
    assert walk._factors is not None and all(torch.equal(walk._factors[n], p) for n, p in trained.items())
    with pytest.raises(UserError, match="the last of 5 steps"):
        walk.forward()


def test_the_first_step_against_numpy(loaded: Any, task: Task) -> None:
    """B = 0: A gets no gradient and stays; Adam moves B by the rate against the sign of its gradient."""
    model, tokenizer = loaded
    walk = Walk(model, tokenizer, task, SPEC, CONFIG)
    s = walk.finish()
    assert s.lr == pytest.approx(CONFIG.lr / 2) and s.loss_after < s.loss
    key = next(k for k in s.matrices if k.endswith("down_proj"))
    x = s.matrices[key]
    assert x.grad_A == x.step_A == x.entry_A == x.norm_before == 0.0 and x.grad_B > 0
    whole = math.sqrt(sum(m.grad_A**2 + m.grad_B**2 for m in s.matrices.values()))
    assert s.grad_norm == pytest.approx(whole, rel=1e-5) and s.clipped == pytest.approx(min(1.0, 0.5 / whole), rel=1e-5)
    assert walk._factors is not None
    A, B = (walk._factors[f"{key}.{n}"].double().numpy() for n in "AB")
    assert np.abs(B).max() <= s.lr * (1 + 1e-6) and x.entry_B == pytest.approx(np.abs(B).mean(), rel=1e-5)
    sigma = np.linalg.svd(2.0 * B @ A, compute_uv=False)[:3]
    assert x.after == pytest.approx(sigma, rel=1e-5)
    assert x.norm_after == pytest.approx(np.sqrt((sigma**2).sum()), rel=1e-5)


def test_two_steps_of_adam_against_numpy(loaded: Any, task: Task) -> None:
    """Adam's first two steps in float64 from gradients that finite differences confirm."""
    model, tokenizer = loaded
    config = lc.TrainConfig(**{**CONFIG.to_dict(), "clip": 0.0})
    walk = Walk(model, tokenizer, task, SPEC, config)
    grads: list[np.ndarray] = []
    rates = []
    for _ in range(2):
        start = None if walk._factors is None else {n: t.clone() for n, t in walk._factors.items()}
        rows = walk._next()
        with walk._on_model() as adapter:
            if start is not None:
                assert all(torch.equal(p, start[n]) for n, p in adapter.named_parameters())
            B = adapter.factors(next(iter(adapter.sites))).B
            batch = walk.objective.batch([walk.items[i] for i in rows[0]])
            (g,) = torch.autograd.grad(walk.objective.loss(batch) / batch.labelled, B)
            at = np.unravel_index(int(g.abs().argmax()), tuple(g.shape))
            with torch.no_grad():
                ends = []
                for sign in (1, -1):
                    B[at] += sign * 1e-2
                    ends.append(float(walk.objective.loss(batch)) / batch.labelled)
                    B[at] -= sign * 1e-2
            assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(g[at]), rel=0.05)
            grads.append(g.double().numpy())
        rates.append(walk.finish().lr)
    m = v = np.zeros_like(grads[0])
    B = np.zeros_like(m)
    for t, (g, lr) in enumerate(zip(grads, rates), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        B = B - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert walk._factors is not None
    ours = walk._factors[f"{next(iter(lc.select(model, SPEC))).key}.B"].double().numpy()
    sure = np.abs(grads[0]) > 1e-5  # below that rounding decides the sign
    assert sure.mean() > 0.5 and np.abs(ours - B)[sure].max() < 2e-2 * rates[-1]


def test_nothing_stays_on_the_model(loaded: Any, task: Task) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([[1, 5, 9, 7]])
    other = lc.attach(model, lc.LoraSpec(rank=2), "other")
    with torch.no_grad():
        for p in other.parameters():
            p.normal_(0, 0.1)
        before, weights = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    walk = Walk(model, tokenizer, task, SPEC, CONFIG)
    first = walk.forward()
    walk.finish()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before) and other.on and not model.training
    assert list(book_of(model).adapters) == ["other"]
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    other.detach()
    alone = Walk(model, tokenizer, task, SPEC, CONFIG)
    assert alone.forward().loss == pytest.approx(first.loss, rel=1e-6), "the other adapter was off meanwhile"
    alone.finish()
    assert not hasattr(model, "lora_adapters") and all(p.requires_grad for p in model.parameters())


def test_what_is_not_walked(loaded: Any, task: Task) -> None:
    model, tokenizer = loaded
    with pytest.raises(UserError, match="no rows"):
        Walk(model, tokenizer, Task(name="x", about="", train=(), test=(), score_name="", scorer=lambda *_: {}), SPEC,
             CONFIG)  # fmt: skip
    wild = lc.TrainConfig(**{**CONFIG.to_dict(), "lr": 1e6, "warmup": 0.0, "schedule": "constant"})
    walk = Walk(model, tokenizer, task, lc.LoraSpec(targets=("q", "v"), rank=2, alpha=1e30), wild)
    with pytest.raises(UserError, match="is no finite number at learning rate"):
        for _ in range(5):
            walk.finish()
