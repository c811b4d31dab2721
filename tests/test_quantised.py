"""A frozen base of four or eight bits (bitsandbytes, the extra `quant`): LoRA trains beside it, as QLoRA does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import filled, tiny
from tiny import ids as tiny_ids
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'lora-lab[quant]')")


def ids(*args: int) -> torch.Tensor:
    return tiny_ids(*args).to(DEVICE)


def quantised(kind: str) -> Any:
    model = tiny("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            if kind == "nf4":
                new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                new.support_avx512bf16_for_cpu = False  # its packing takes no matrices as small as these
            else:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return model.to(DEVICE)


def computing(kind: str) -> tuple[Any, torch.Tensor]:
    """The model and its logits; the test is skipped where bitsandbytes has no code for this machine."""
    model = quantised(kind)
    try:
        with torch.no_grad():
            return model, model(ids()).logits
    except (RuntimeError, AttributeError) as e:
        pytest.skip(f"bitsandbytes cannot compute {kind} on this machine: {e}")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_beside_quantised_weights(kind: str) -> None:
    model, base = computing(kind)
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v", "down"), rank=4))
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, base)
    filled(adapter)
    loss = model(ids()).logits.square().mean()
    loss.backward()
    grads = [p.grad for p in adapter.parameters()]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, base)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_beside_quantised_weights(kind: str) -> None:
    model, _ = computing(kind)
    before = codes(model)
    rows = tuple(lc.Row(f"the {a}", f"{b} is low") for a in ("fox", "dog", "pub") for b in ("price", "river"))
    task = lc.Task(name="t", about="", train=rows, test=rows[:3], score_name="", scorer=lambda *_: {})
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v", "o", "down"), rank=4))
    config = lc.TrainConfig(steps=12, batch_size=6, lr=1e-2)
    events = list(lc.train(adapter, task, config, tokenizer=tiny_tokenizer()))
    assert events[-1].reason == "done" and events[-1].held_loss < 0.95 * events[0].held_loss  # pyright: ignore
    assert all(torch.equal(v, before[n]) for n, v in codes(model).items())


def codes(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora." not in n}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_into_quantised_weights_says_what_is_lost_and_can_be_undone(kind: str) -> None:
    model, base = computing(kind)
    before = codes(model)
    adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=4, alpha=4)), std=0.05)
    W0, deltas = {k: adapter.W0(k) for k in adapter.sites}, adapter.deltas()
    with pytest.raises(lc.UserError, match=r"q_proj is quantised: merging would .* and \d+% of ΔW would be lost there"):
        adapter.merge()
    assert not adapter.merged and all(torch.equal(v, before[n]) for n, v in codes(model).items())
    with torch.no_grad():
        unmerged = model(ids()).logits
    lost = adapter.merge(requantise=True)
    assert lost.keys() == {s.path for s in adapter.sites.values()}
    for key, s in adapter.sites.items():  # measured on what stands in the weights now
        now = s.weight(model.get_submodule(s.path))
        delta = deltas[key].dense()
        assert lost[s.path] == pytest.approx(float((now - W0[key] - delta).norm() / delta.norm()), rel=1e-3)
        assert 0 < lost[s.path] < 3
        torch.testing.assert_close(adapter.W0(key), W0[key], rtol=0, atol=0)
    with torch.no_grad():
        merged = model(ids()).logits
    assert (merged - unmerged).norm() < 0.7 * (unmerged - base).norm(), "most of the update is in the weights"
    adapter.unmerge()
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, unmerged)
    adapter.detach()
    assert all(torch.equal(v, before[n]) for n, v in codes(model).items())
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, base)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_larger_update_loses_less_of_itself(kind: str) -> None:
    shares = []
    for std in (0.02, 0.2):
        model, _ = computing(kind)
        adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q",), rank=4, alpha=4)), std=std)
        shares.append(sum(adapter.merge(requantise=True).values()))
    assert shares[1] < 0.5 * shares[0]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dora_and_pissa_on_quantised_weights_use_their_decoded_numbers(kind: str) -> None:
    model, base = computing(kind)
    for setting in ({"dora": True}, {"init": "pissa"}):
        adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=4, **setting))  # type: ignore[arg-type]
        with torch.no_grad():
            torch.testing.assert_close(model(ids()).logits, base, rtol=0, atol=1e-5)
        key = next(iter(adapter.sites))
        f, W0 = adapter.factors(key), adapter.W0(key)
        if f.m is not None:
            torch.testing.assert_close(f.m.detach(), W0.norm(dim=1))
        else:
            best = torch.linalg.svdvals(W0)[4:].norm()
            rest = (W0 - f.scaling * f.B @ f.A).norm()
            assert rest <= 1.05 * best
        model(ids()).logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
        adapter.detach()


@pytest.mark.parametrize("nested", [False, True])
def test_weights_that_a_processor_packed_for_itself_are_decoded(nested: bool) -> None:
    """With AVX512-BF16 the first pass packs 4-bit weights otherwise, and rounds their scales to bfloat16."""
    from lora_core.quantised import keep, write

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=nested)
    layer = layer.to("cpu")
    plain = keep(layer).plain
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state)  # fmt: skip
    packed = keep(layer)
    codes, absmax = packed.codes.clone(), packed.state.absmax.clone()
    assert float((packed.plain - plain).norm() / plain.norm()) < 5e-3
    change = torch.full_like(plain, 0.05)
    write(layer, packed, change)
    after = keep(layer).plain
    assert float((after - plain - change).norm()) < 0.5 * float(change.norm())
    write(layer, packed, None)
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer.weight.quant_state.absmax, absmax)
    assert layer.weight.quant_state.packing_format_for_cpu
