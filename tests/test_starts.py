"""Other starts and other ways to train the factors: ΔW = 0 at first for each, and what each promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import FAMILIES, bits, filled, ids, targets_of, tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core.objective import CausalLM
from lora_core.starts import from_gradient, initial_A

TASK = lc.load_task("pirate", train=24, test=6)
FAST: dict[str, Any] = dict(steps=4, batch_size=4, lr=5e-3, eval_rows=4, max_tokens=48)


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def objective(model: Any) -> CausalLM:
    return CausalLM(model, tiny_tokenizer(), TASK.template, 48)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "gradient"])
def test_the_start_changes_nothing_and_training_saves_and_loads(family: str, init: str, tmp_path: Path) -> None:
    model = tiny(family)
    base, weights = out(model), bits(model)
    spec = lc.LoraSpec(targets=targets_of(model), rank=3, init=init)  # type: ignore[arg-type]
    foretold = lc.budget(model, spec)
    a = lc.attach(model, spec)
    if init == "gradient":
        from_gradient(a, objective(model), objective(model).encode(TASK.train[:4]))
    assert torch.equal(out(model), base), "bit-identical at the start"
    assert all(float(d.norm()) < 1e-6 for d in a.deltas().values())
    list(lc.train(a, TASK, lc.TrainConfig(**FAST), tokenizer=tiny_tokenizer()))
    changed = out(model)
    assert (changed - base).abs().max() > 1e-4
    a.merge()
    torch.testing.assert_close(out(model), changed, rtol=0, atol=1e-5)
    a.unmerge()
    a.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == foretold.file_bytes
    a.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    lc.load_adapter(model, tmp_path, name="again")
    torch.testing.assert_close(out(model), changed, rtol=0, atol=1e-5)
    theirs: Any = PeftModel.from_pretrained(tiny(family), str(tmp_path))
    torch.testing.assert_close(out(theirs.eval()), changed, rtol=0, atol=1e-5)


def test_pissa_starts_from_the_top_of_W0() -> None:
    a = lc.attach(tiny("llama", dtype=torch.float64), lc.LoraSpec(targets=("gate",), rank=5, init="pissa"))
    key = next(iter(a.sites))
    f, W0 = a.factors(key), a.W0(key)
    U, S, Vh = torch.linalg.svd(W0)
    best = (U[:, :5] * S[:5]) @ Vh[:5]
    assert float((f.scaling * f.B @ f.A - best).norm() / best.norm()) < 1e-3
    torch.testing.assert_close(f.B.norm(dim=0), f.A.norm(dim=1), rtol=1e-6, atol=0)


def test_gradient_start_is_the_svd_of_the_full_gradient() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    rows = objective(model).encode(TASK.train[:4])
    a = lc.attach(model, lc.LoraSpec(targets=("q", "up"), rank=2, init="gradient"))
    from_gradient(a, objective(model), rows)
    assert all(p.grad is None for p in model.parameters())
    fresh = tiny("gpt2", dtype=torch.float64)
    batch = objective(fresh).batch(rows)
    (objective(fresh).loss(batch) / batch.labelled).backward()
    for key, site in a.sites.items():
        W: Any = fresh.get_submodule(site.path).weight
        G = W.grad.T if site.transposed else W.grad
        U, _, Vh = torch.linalg.svd(G[slice(None) if site.rows is None else site.rows])
        f = a.factors(key)
        for got, want in ((f.A, Vh[:2]), (f.B.T, U[:, 2:4].T)):
            cosines = torch.nn.functional.normalize(got.detach(), dim=1) @ want.T
            torch.testing.assert_close(cosines.abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-4)


def test_resume_is_bit_equal_from_any_start(tmp_path: Path) -> None:
    for init in ("pissa", "gradient"):
        spec, file, count = lc.LoraSpec(rank=2, init=init), tmp_path / init, iter(range(99))
        tok, config = tiny_tokenizer(), lc.TrainConfig(**FAST | {"checkpoint_every": 1, "lr_ratio": 4.0})
        whole = lc.attach(tiny("llama"), spec)
        straight = [e.loss for e in lc.train(whole, TASK, config, tokenizer=tok) if e.kind == "step"]
        list(
            lc.train(
                lc.attach(tiny("llama"), spec),
                TASK,
                config,
                tokenizer=tok,
                checkpoint=file,
                stop=lambda c=count: next(c) == 1,
            )
        )
        again = lc.attach(tiny("llama"), spec, seed=5)
        rest = [e.loss for e in lc.train(again, TASK, config, tokenizer=tok, checkpoint=file) if e.kind == "step"]
        assert rest == straight[2:]
        for key, d in whole.deltas().items():
            assert torch.equal(again.delta(key).dense(), d.dense())


def test_orthogonal_rows() -> None:
    A = initial_A("orthogonal", 6, 40, torch.Generator().manual_seed(0))
    torch.testing.assert_close(A @ A.T, torch.eye(6), rtol=0, atol=1e-5)


def test_lora_fa_trains_b_alone() -> None:
    model = tiny("llama")
    spec = lc.LoraSpec(rank=2, train_A=False)
    a = lc.attach(model, spec)
    before = {n: p.detach().clone() for n, p in a.named_parameters()}
    assert lc.budget(model, spec).trainable == sum(p.numel() for p in a.parameters())
    list(lc.train(a, TASK, lc.TrainConfig(**FAST), tokenizer=tiny_tokenizer()))
    for n, p in a.named_parameters():
        assert torch.equal(p, before[n]) == n.endswith(".A")
    filled(lc.attach(model, lc.LoraSpec(rank=2), name="b"))
    assert not any(p.requires_grad for n, p in a.named_parameters() if n.endswith(".A")), (
        "a second adapter changes no rule"
    )


def test_adam_invariance() -> None:
    """α → α/(pq), A → p·A, lr_A → p·lr_A, lr_B → q·lr_B leaves every loss as it was, for ε → 0 (lora_facts)."""

    def losses(p: float, q: float) -> list[float]:
        model = tiny("llama", dtype=torch.float64)
        a = lc.attach(model, lc.LoraSpec(rank=4, alpha=8 / (p * q)))
        with torch.no_grad():
            for n, t in a.named_parameters():
                if n.endswith(".A"):
                    t.mul_(p)
        groups = [{"params": [t for n, t in a.named_parameters() if n.endswith(part)], "lr": lr}
                  for part, lr in ((".A", 1e-3 * p), (".B", 1e-3 * q))]  # fmt: skip
        adam, goal, trace = torch.optim.Adam(groups, eps=1e-30), objective(model), []
        batch = goal.batch(goal.encode(TASK.train[:6]))
        for _ in range(8):
            loss = goal.loss(batch) / batch.labelled
            trace.append(float(loss.detach()))
            adam.zero_grad()
            loss.backward()
            adam.step()
        return trace

    one = losses(1, 1)
    assert one[-1] < one[0]
    assert losses(2, 4) == pytest.approx(one, rel=1e-9)
    assert losses(1, 2) == pytest.approx(one, rel=1e-9)
