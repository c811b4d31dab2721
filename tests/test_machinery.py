"""What torch and transformers do around a model goes on working with an adapter on: checkpointing, autocast, compile,
copies, pickles, a cache, a trainer."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import bits, filled, targets_of
from torch import nn
from zoo import CONFIGS, V, inputs, is_encoder, make, out

import lora_core as lc
from lora_core.families import Layout

every = pytest.mark.parametrize("name", CONFIGS)
some = pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "t5"])
FLOAT32 = ("gptj", "gpt_neo", "codegen")  # their attention is float32 whatever the model's weights are
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is new
DECODERS = [n for n in CONFIGS if not is_encoder(CONFIGS[n]())]


def all_of(model: Any) -> lc.LoraSpec:
    return lc.LoraSpec(targets=targets_of(model), rank=3, alpha=6)


def step(model: Any, call: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch and the gradients that it leaves, by name; dropout is drawn from the same seed each time."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = (model if call is None else call)(**inputs(model)).logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), torch.arange(logits.flatten(0, -2).shape[0]) % logits.shape[-1])
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], off: float) -> None:
    assert got.keys() == want.keys()
    for n, g in want.items():
        assert float((got[n] - g).norm()) <= off * float(g.norm()), n


# ---- gradient checkpointing
@every
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = make(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"transformers' {type(model).__name__} has no gradient checkpointing")
    adapter = filled(lc.attach(model, all_of(model)))
    model.train()
    loss, grads = step(model)
    assert len(grads) == len(list(adapter.parameters()))
    calls: list[int] = []
    model.get_submodule(next(iter(adapter.sites.values())).path).register_forward_hook(lambda *_: calls.append(1))
    step(model)
    plain = len(calls)
    calls.clear()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, checkpointed = step(model)
    assert len(calls) > plain, "the layers were computed a second time"
    assert again == loss
    assert_same(checkpointed, grads, 1e-5 if name in FLOAT32 else 1e-10)


@some
def test_reentrant_checkpointing_works_where_the_inputs_require_gradients(name: str) -> None:
    model = make(name)
    filled(lc.attach(model, all_of(model)))
    model.train()
    loss, grads = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    again, checkpointed = step(model)
    assert again == loss
    assert_same(checkpointed, grads, 1e-5 if name in FLOAT32 else 1e-10)


# ---- autocast
@some
def test_autocast_computes_in_bfloat16_and_trains_float32_factors(name: str) -> None:
    model = make(name, torch.float32)
    adapter = filled(lc.attach(model, all_of(model)))
    loss, grads = step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, rough = step(model)
        assert model.get_submodule(next(iter(adapter.sites.values())).path)(torch.ones(1, 32)).dtype == torch.bfloat16
    assert again == pytest.approx(loss, rel=0.01) and again != loss
    assert rough.keys() == grads.keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in rough.values())
    a, b = (torch.cat([g.flatten() for g in gs.values()]) for gs in (rough, grads))
    assert float((a - b).norm() / b.norm()) < 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_fresh_adapter_changes_no_bit_under_autocast() -> None:
    model = make("gpt_neox", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = out(model)
        lc.attach(model, all_of(model))
        assert torch.equal(out(model), base)


# ---- torch.compile
@pytest.mark.parametrize(("name", "backend"), [("llama", "aot_eager"), ("gpt2", "eager"), ("gpt_neox", "eager")])
def test_a_compiled_model_has_the_same_outputs_and_gradients(name: str, backend: str) -> None:
    torch.compiler.reset()
    model = make(name, torch.float32)
    filled(lc.attach(model, all_of(model)))
    loss, grads = step(model)
    again, compiled = step(model, torch.compile(model, backend=backend))
    assert again == pytest.approx(loss, rel=1e-5)
    assert_same(compiled, grads, 1e-5)
    torch.compiler.reset()


def test_a_compiled_model_asks_which_adapters_act() -> None:
    torch.compiler.reset()
    model = make("llama", torch.float32)
    compiled: Any = torch.compile(model, backend="eager")

    def now() -> torch.Tensor:
        with torch.no_grad():
            return compiled(**inputs(model), use_cache=False).logits

    base = now()
    adapter = filled(lc.attach(model, lc.LoraSpec(rank=3), name="a"))
    want = out(model)
    torch.testing.assert_close(now(), want, rtol=0, atol=1e-5)
    adapter.enable(False)
    torch.testing.assert_close(now(), base, rtol=0, atol=1e-5)
    adapter.enable()
    adapter.merge()
    torch.testing.assert_close(now(), want, rtol=0, atol=1e-5)
    adapter.unmerge()
    with lc.rows(model, ["a", None, None]):
        mixed = now()
    torch.testing.assert_close(mixed[0], want[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1:], base[1:], rtol=0, atol=1e-5)
    adapter.detach()
    torch.testing.assert_close(now(), base, rtol=0, atol=1e-5)
    torch.compiler.reset()


def test_an_adapted_model_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    model = make("llama", torch.float32)
    filled(lc.attach(model, all_of(model)))
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs(model), use_cache=False).logits, out(model), rtol=0, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same() -> None:
    torch.compiler.reset()
    model = make("llama", torch.float32)
    filled(lc.attach(model, all_of(model)))
    loss, grads = step(model)
    again, compiled = step(model, torch.compile(model))
    assert again == pytest.approx(loss, rel=1e-5)
    assert_same(compiled, grads, 1e-5)
    torch.compiler.reset()


# ---- copies
@some
def test_a_deep_copy_shares_nothing_with_its_original(name: str) -> None:
    model = make(name)
    a = filled(lc.attach(model, all_of(model), name="a"), 1)
    filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=2, init="pissa"), name="b"), 2)
    want = out(model)
    twin = copy.deepcopy(model)
    theirs = {id(t) for t in twin.parameters()}
    assert not theirs & {id(t) for t in model.parameters()}
    storages = [{t.data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()} for m in (model, twin)]
    assert not storages[0] & storages[1]
    b = lc.get_adapter(twin, "a")
    assert b is not a and b.model is twin and set(map(id, b.parameters())) <= theirs
    with torch.no_grad():  # training the copy, switching it and merging it leave the original be
        for p in b.parameters():
            p.add_(0.1)
    assert not torch.equal(out(twin), want) and torch.equal(out(model), want)
    lc.switch(twin, None, None)
    assert torch.equal(out(model), want)
    lc.switch(twin, None, "a")
    b.merge()
    assert torch.equal(out(model), want)
    a.detach()  # and the other way round
    assert b.merged
    changed = out(twin)
    b.unmerge()
    torch.testing.assert_close(out(twin), changed, rtol=0, atol=1e-10)


def test_the_copy_of_a_merged_model_can_be_unmerged() -> None:
    model = make("gpt2", torch.float32)
    weights = bits(model)
    a = filled(lc.attach(model, all_of(model)))
    a.merge()
    twin = copy.deepcopy(model)
    lc.get_adapter(twin, "default").unmerge()
    assert all(torch.equal(v, weights[n]) for n, v in bits(twin).items())
    assert a.merged
    a.unmerge()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


def test_a_copied_module_takes_its_factors_along() -> None:
    model = make("llama")
    filled(lc.attach(model, all_of(model)))
    layer = model.model.layers[0]
    twin = copy.deepcopy(layer.mlp)
    x = torch.randn(2, 32, dtype=torch.float64)
    assert torch.equal(twin(x), layer.mlp(x))
    lc.get_adapter(model, "default").detach()
    assert not torch.equal(twin(x), layer.mlp(x))


# ---- pickles
def plain(x: Any) -> Any:
    """What a value is made of, with tensors as lists, to compare values that compare by identity."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.tolist()
    return {k: plain(v) for k, v in asdict(x).items()} if is_dataclass(x) and not isinstance(x, type) else x


def values() -> dict[str, Any]:
    model = make("gpt_neox")
    spec = lc.LoraSpec(targets=("q", "v"), rank=2, layers=(1,), rank_pattern={"v": 1}, scaling="alpha/sqrt(r)")
    adapter = filled(lc.attach(model, spec))
    key = next(iter(adapter.sites))
    return {
        "LoraSpec": spec,
        "TrainConfig": lc.TrainConfig(steps=3, lr=2e-3, schedule="cosine"),
        "TrainEvent": lc.TrainEvent(kind="step", step=1, steps=2, loss=0.5, norms={key: 1.0}),
        "Site": adapter.sites[key],
        "Layout": Layout("groups", 1, 4, 4, 96),
        "Budget": lc.budget(model, spec),
        "Delta": adapter.delta(key),
        "Spectrum": lc.spectra(adapter)[key],
        "Row": lc.Row("the fox", "jumps"),
        "Task": lc.load_task("pirate", train=3, test=2),
        "UserError": lc.UserError("no model named"),
    }


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_values_go_through_pickle(how: str) -> None:
    for kind, value in values().items():
        again = pickle.loads(pickle.dumps(value)) if how == "pickle" else copy.deepcopy(value)
        assert type(again) is type(value), kind
        if kind == "UserError":
            assert str(again) == str(value)
        else:
            assert plain(again) == plain(value), kind
        if kind == "Delta":
            assert torch.equal(again.dense(), value.dense())
        if kind == "Site":
            assert torch.equal(torch.as_tensor(again.rows), torch.as_tensor(value.rows))


# ---- generation with a cache
class Numbers:
    """A tokenizer whose texts are numbers: "5 17 99". The tiny models' vocabularies are too small for letters."""

    pad_token_id, eos_token_id = 3, 2

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(w) for w in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_with_a_cache_says_what_it_says_without(name: str) -> None:
    model = make(name)
    x = inputs(model)["input_ids"][:1]
    how: dict[str, Any] = dict(attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=False, pad_token_id=3)
    base = model.generate(x, use_cache=True, **how)
    a = filled(lc.attach(model, all_of(model), name="a"), std=0.6)
    cached, uncached = (model.generate(x, use_cache=on, **how) for on in (True, False))
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, base), "the adapter acts in every step"
    a.merge()
    assert torch.equal(model.generate(x, use_cache=True, **how), cached)
    a.unmerge()
    if model.config.is_encoder_decoder:
        return
    *_, mine = lc.generate(model, Numbers(), Numbers().decode(x[0].tolist()), ["a", None], max_new_tokens=8)
    for text, ids in zip(mine.texts[0], (cached, base)):
        want = [i for i in ids[0, x.shape[1] :].tolist() if i != 2]
        assert Numbers()(text)["input_ids"] == want


# ---- transformers' own trainer, and its files
def test_transformers_trainer_trains_exactly_the_factors(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    model = make("llama", torch.float32)
    weights = bits(model)
    adapter = lc.attach(model, all_of(model))
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(5, V, (12, 9), generator=torch.manual_seed(0))]
    how = TrainingArguments(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.01,
                            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)  # fmt: skip
    result = Trainer(model=model, args=how, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    assert result.global_step == 4
    assert not any(torch.equal(p, before[n]) for n, p in adapter.named_parameters())
    adapter.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


@some
def test_save_pretrained_writes_the_base_model_or_the_merged_one(name: str, tmp_path: Path) -> None:
    model = make(name, torch.float32)
    base = out(model)
    adapter = filled(lc.attach(model, all_of(model)))
    changed = out(model)
    model.save_pretrained(tmp_path / "base")
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    plainly = type(model)
    assert torch.equal(out(plainly.from_pretrained(tmp_path / "base").eval()), base)
    torch.testing.assert_close(out(plainly.from_pretrained(tmp_path / "merged").eval()), changed, rtol=0, atol=2e-5)


def test_an_adapted_module_is_still_what_it_was() -> None:
    model = make("gpt2")
    kinds = {n: type(m) for n, m in model.named_modules()}
    lc.attach(model, all_of(model))
    for n, kind in kinds.items():
        assert isinstance(model.get_submodule(n), kind)
    assert isinstance(model.lm_head, nn.Linear)
