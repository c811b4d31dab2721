"""The compared methods: closed forms, PEFT's prefix tuning and a plain training loop as oracles; files; batches."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import lora_core as lc
from lora_core.adapted import Adapted
from lora_core.methods import METHODS, method_spec, size_for
from lora_core.methods.added import added_shapes
from tests.model_folder import tiny_bert, tiny_llama
from tests.tiny import bits, filled
from tests.zoo import inputs, make, out

SIZES = {"bottleneck": 3, "prefix": 4, "lora": 2, "lora-prefix": 2, "last-layer": 1}
FAMILIES = ("llama", "gpt2", "bert")


def spec_of(name: str) -> lc.LoraSpec:
    return method_spec(name, SIZES.get(name))


def cases() -> Iterator[Any]:
    for family in FAMILIES:
        for name in METHODS:
            if (family, name) != ("llama", "bitfit"):  # which has no bias
                yield pytest.param(family, name, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "name"), cases())
def test_a_method_comes_and_goes_as_lora_does(family: str, name: str, tmp_path: Path) -> None:
    model = make(family)
    before, base = bits(model), out(model)
    adapter = lc.attach(model, spec_of(name), seed=3)
    assert torch.equal(out(model), base) == ("prefix" not in name), "a prefix alone is seen at once"
    assert lc.budget(model, adapter.spec).trainable == sum(p.numel() for p in adapter.parameters())
    assert set(model.state_dict()) == set(before)
    filled(adapter)
    acted = out(model)
    assert not torch.allclose(acted, base, atol=1e-6)
    with adapter.disabled():
        assert torch.equal(out(model), base)
    adapter.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == lc.budget(model, adapter.spec).file_bytes
    adapter.detach()
    assert torch.equal(out(model), base) and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(isinstance(m, Adapted) for m in model.modules())
    loaded = lc.load_adapter(model, tmp_path)
    assert loaded.spec == adapter.spec and torch.allclose(out(model), acted, atol=1e-5)


@pytest.mark.parametrize("name", ["bottleneck", "prefix"])
def test_a_fresh_one_is_stored_as_what_it_is(name: str, tmp_path: Path) -> None:
    model = make("llama")
    adapter = lc.attach(model, spec_of(name))
    adapter.save(tmp_path)
    acted = out(model)
    adapter.detach()
    lc.load_adapter(model, tmp_path)
    assert torch.allclose(out(model), acted, atol=1e-6)


@pytest.mark.parametrize("harm", ["missing", "shape", "more", "nan"])
@pytest.mark.parametrize("name", ["bottleneck", "prefix"])
def test_files_are_read_strictly(name: str, harm: str, tmp_path: Path) -> None:
    model = make("llama", torch.float32)
    filled(lc.attach(model, spec_of(name))).save(tmp_path)
    lc.get_adapter(model, "default").detach()
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if harm == "missing":
        del tensors[first]
    elif harm == "shape":
        tensors[first] = torch.cat([tensors[first], tensors[first]])
    elif harm == "more":
        tensors[first + "x"] = tensors[first].clone()
    else:
        tensors[first].view(-1)[0] = torch.nan
    save_file(tensors, file)
    words = {"missing": "has no", "shape": "must be", "more": "unknown tensor", "nan": "not finite"}[harm]
    with pytest.raises(lc.UserError, match=words):
        lc.load_adapter(model, tmp_path)
    assert not any(isinstance(m, Adapted) for m in model.modules())


# ---- each against its formula --------------------------------------------------------------------------------------
def test_a_bottleneck_is_its_formula() -> None:
    model = make("llama")
    adapter = filled(lc.attach(model, method_spec("bottleneck", 3)))
    host = model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 5, host.in_features, dtype=torch.float64)
    down, b, up, c = (adapter.added[f"model.layers.1.mlp.down_proj.bottleneck.{n}"]
                      for n in ("down", "down_bias", "up", "up_bias"))  # fmt: skip
    h = x @ host.weight.T
    z = h @ down.T + b
    gelu = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    assert torch.allclose(host(x), h + gelu @ up.T + c, atol=1e-12)
    assert len(adapter.added) == 4 * 2 * 2, "behind attention and behind the MLP of two layers"


def test_bitfit_trains_biases_and_nothing_else() -> None:
    model = make("bert")
    adapter = lc.attach(model, method_spec("bitfit"))
    assert set(adapter.copies) == {n for n, _ in model.named_parameters() if n.endswith("bias") and "lora" not in n}
    assert not adapter.sites and not adapter.added
    with pytest.raises(lc.UserError, match="'bias' hits nothing"):
        lc.attach(make("llama"), method_spec("bitfit"))


def test_the_last_layers_are_the_last() -> None:
    model = make("bert")
    names = [n for n, _ in model.named_parameters()]
    one, two = (set(lc.attach(model, method_spec("last-layer", n), f"top{n}").copies) for n in (1, 2))
    assert one == {n for n in names if ".layer.1." in n} and two == {n for n in names if ".layer." in n}
    with pytest.raises(lc.UserError, match="from top1 to top2"):
        lc.attach(model, method_spec("last-layer", 3), "three")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_full_is_plain_fine_tuning(kind: str, tmp_path: Path) -> None:
    """A loop that knows nothing of adapters, on a copy of the model, ends at the same weights."""
    model, tokenizer, task, goal = _trainable(kind, tmp_path)
    plain = deepcopy(model.double())  # a key's bias has no gradient: in float32 Adam makes steps of its rounding
    config = lc.TrainConfig(steps=4, batch_size=len(task.train), lr=1e-3, clip=0.0, warmup=0.0, schedule="constant",
                            eval_rows=0)  # fmt: skip
    adapter = lc.attach(model, method_spec("full"))
    assert sum(p.numel() for p in adapter.parameters()) == sum(p.numel() for p in plain.parameters())
    list(lc.train(adapter, task, config, objective=goal, tokenizer=tokenizer))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for p in plain.parameters():
        p.requires_grad_(True)
    plain.train()
    other = deepcopy(goal)
    other.model, other.fast, other.split = plain, None, False
    for _ in range(4):
        batch = other.batch(other.encode(task.train))
        (other.loss(batch) / batch.labelled).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in plain.named_parameters():
        if name in adapter.copies:
            assert torch.allclose(adapter.copies[name], p, atol=2e-5), name


# ---- prefixes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eager", [False, True])
def test_a_prefix_is_attention_over_both(eager: bool) -> None:
    """softmax(q·[P_K; K]ᵀ/√d)·[P_V; V], by hand, on padded rows of an encoder."""
    model = make("bert")
    if eager:
        model.set_attn_implementation("eager")
    adapter = filled(lc.attach(model, method_spec("prefix", 4)), std=1.0)
    host = model.bert.encoder.layer[0].attention.self
    K, V = (adapter.added[f"bert.encoder.layer.0.attention.self.prefix.{n}"] for n in "KV")
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    seen: list[Any] = []
    hook = host.register_forward_hook(lambda m, a, k, y: seen.append((a or k["hidden_states"], y[0])), with_kwargs=True)
    model(input_ids=ids, attention_mask=mask)
    hook.remove()
    x, found = seen[0][0], seen[0][1]
    x = x[0] if isinstance(x, tuple) else x

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.view(*t.shape[:2], 4, 8).transpose(1, 2)

    q, k, v = (heads(m(x)) for m in (host.query, host.key, host.value))
    k, v = (torch.cat([heads(p[None]).expand(3, -1, -1, -1), t], 2) for p, t in ((K, k), (V, v)))
    scores = q @ k.transpose(2, 3) / 8**0.5
    scores[..., 4:].masked_fill_(mask[:, None, None] == 0, -torch.inf)
    wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "phi3"])
def test_a_fresh_prefix_is_text_that_was_never_written(family: str) -> None:
    """Its tokens before the text, in a plain forward, give the text's outputs."""
    model, length = make(family), 5
    ids = inputs(model)["input_ids"]
    drawn = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = model(input_ids=torch.cat([drawn.expand(3, -1), ids], 1)).logits[:, length:]
    lc.attach(model, method_spec("prefix", length), seed=7)
    at = torch.arange(length, length + ids.shape[1])[None].expand(3, -1)
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=at).logits
    assert torch.allclose(found, wanted, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_computes_the_same_prefix(family: str) -> None:
    """PEFT lets the text begin at position l; ours leaves it where it is, unless it is told."""
    peft = pytest.importorskip("peft")
    model, length = make(family), 4
    ids = inputs(model)["input_ids"]
    adapter = filled(lc.attach(model, method_spec("prefix", length)))
    ours = {n: p.detach().clone() for n, p in adapter.added.items()}
    with torch.no_grad():
        at = torch.arange(length, length + ids.shape[1])[None].expand(3, -1)
        found = model(input_ids=ids, position_ids=at).logits
    adapter.detach()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    theirs = peft.get_peft_model(model, config).double()
    weight = theirs.prompt_encoder.default.embedding.weight  # (l, layers · 2 · width): K and V of a layer in turn
    flat = torch.cat([ours[n] for n in sorted(ours)], 1)  # K before V, layer by layer
    assert weight.shape == flat.shape
    with torch.no_grad():
        weight.copy_(flat)
        wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(found, wanted, atol=1e-10)


def test_generation_with_a_cache_sees_the_prefix(tmp_path: Path) -> None:
    model, tokenizer = lc.load_model(str(tiny_llama(tmp_path)), dtype="float32")
    filled(lc.attach(model, method_spec("prefix", 3), "p"), std=0.5)
    prompts = ["a b c", "the"]
    *_, last = lc.generate(model, tokenizer, prompts, adapters=["p", None], max_new_tokens=8)
    for i, prompt in enumerate(prompts):
        for j, on in enumerate((True, False)):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            new: list[int] = []
            lc.get_adapter(model, "p").enable(on)
            for _ in range(8):
                with torch.no_grad():
                    t = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
                if t == tokenizer.eos_token_id:
                    break
                new.append(t)
            assert last.texts[i][j] == tokenizer.decode(new)


# ---- in one batch, and trained ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_have_methods_of_their_own(family: str, eager: bool) -> None:
    model = make(family)
    if eager:
        model.set_attn_implementation("eager")
    for name in ("bottleneck", "prefix", "lora-prefix"):
        filled(lc.attach(model, spec_of(name), name))
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    names = ["prefix", None, "lora-prefix", "bottleneck", "prefix", None]

    def run(i: slice) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids.repeat(2, 1)[i], attention_mask=mask.repeat(2, 1)[i]).logits

    for parts in (names, names[:3]):  # three names for six rows: two rows each
        each = [n for n in parts for _ in range(6 // len(parts))]
        with lc.rows(model, parts):
            together = run(slice(None))
        for i, n in enumerate(each):
            lc.switch(model, None, n)
            alone, real = run(slice(i, i + 1))[0], slice(-3 if i % 3 == 0 and family != "bert" else None)
            close = 1e-7 if eager else 1e-10  # some take their softmax in float32
            assert torch.allclose(together[i][real], alone[real], atol=close), (i, n)


def _trainable(kind: str, folder: Path) -> tuple[Any, Any, lc.Task, Any]:
    if kind == "bert":
        model, tokenizer = lc.load_model(str(tiny_bert(folder)), dtype="float32", labels=("negative", "positive"))
        return model, tokenizer, lc.load_task("sentiment", train=8, test=8), lc.Classification(model, tokenizer)
    model, tokenizer = lc.load_model(str(tiny_llama(folder)), dtype="float32")
    task = lc.load_task("restaurant", train=8, test=4)
    return model, tokenizer, task, lc.CausalLM(model, tokenizer, task.template)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("name", [n for n in METHODS if n != "bitfit"])
def test_a_method_trains_and_goes_on_where_it_stopped(kind: str, name: str, tmp_path: Path) -> None:
    model, tokenizer, task, goal = _trainable(kind, tmp_path / "model")
    head = ("head",) if kind == "bert" and name != "full" else ()
    spec = replace(spec_of(name), full=(*spec_of(name).full, *head))
    config = lc.TrainConfig(steps=10, batch_size=8, lr=3e-3, checkpoint_every=5)

    def run(**more: Any) -> tuple[dict[str, torch.Tensor], list[lc.TrainEvent]]:
        adapter = lc.attach(model, spec, seed=1)
        events = list(lc.train(adapter, task, config, objective=goal, tokenizer=tokenizer, **more))
        found = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        adapter.detach()
        return found, events

    whole, events = run()
    losses = [e.loss for e in events if e.kind == "step"]
    assert cast(float, losses[-1]) < cast(float, losses[0])
    file, n = tmp_path / "checkpoint", iter(range(100))
    run(checkpoint=file, stop=lambda: next(n) >= 5)
    again, events = run(checkpoint=file)
    assert events[1].step == 7 and all(torch.equal(v, again[k]) for k, v in whole.items())


def test_the_fast_body_does_not_pass_a_prefix_by(tmp_path: Path) -> None:
    model, _, task, goal = _trainable("llama", tmp_path)
    assert goal.fast is not None
    adapter = filled(lc.attach(model, method_spec("lora-prefix", 3)), std=0.5)
    batch = goal.batch(goal.encode(task.train))
    logits = model(input_ids=batch.ids).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(goal.loss(batch), wanted, rtol=1e-5)
    with adapter.disabled():
        assert not torch.allclose(goal.loss(batch), wanted, rtol=1e-3)


# ---- sizes, and what cannot be ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.size and n != "last-layer"])
def test_the_size_is_the_nearest_to_a_budget(name: str) -> None:
    model = make("bert", torch.float32)

    def cost(size: int) -> int:
        return lc.budget(model, method_spec(name, size)).trainable

    for wanted in (10, 700, 2000):
        best = min(range(1, 17), key=lambda s: abs(cost(s) - wanted))
        assert abs(cost(size_for(model, name, wanted)) - wanted) == abs(cost(best) - wanted)


def test_layers_are_chosen_for_what_is_added_too() -> None:
    model = make("llama")
    for name in ("bottleneck", "prefix"):
        spec = replace(method_spec(name), layers=(1,))
        assert all(n.startswith("model.layers.1.") for n in added_shapes(model, spec)) and added_shapes(model, spec)


def test_what_cannot_be_is_told() -> None:
    model = make("llama")
    adapter = lc.attach(model, method_spec("prefix"), "p")
    for refused in (adapter.merge, lambda: lc.combine(model, {"p": 1.0}, "sum")):
        with pytest.raises(lc.UserError, match="prefix"):
            refused()
    assert not adapter.merged
    other = lc.attach(model, lc.LoraSpec(), "l")
    other.merge()
    with pytest.raises(lc.UserError, match="cannot be merged"):
        lc.switch(model, "l", "p")
    assert other.merged, "nothing has changed"
    for model, spec, words in (
        (make("bloom"), method_spec("prefix"), "a way of its own"),
        (make("t5"), method_spec("prefix"), "several kinds"),
        (make("gpt2"), method_spec("prefix", 64), "at most 64"),
        (make("llama"), replace(method_spec("prefix"), layers=(7,)), "no layer 7"),
    ):
        with pytest.raises(lc.UserError, match=words):
            lc.attach(model, spec)
    for call, words in (
        (lambda: method_spec("botleneck"), "did you mean 'bottleneck'"),
        (lambda: method_spec("full", 3), "no size"),
        (lambda: method_spec("lora", 0), "from 1"),
        (lambda: lc.LoraSpec(targets=()), "no target"),
        (lambda: lc.LoraSpec(targets=(), prefix=-1), "whole number"),
    ):
        with pytest.raises(lc.UserError, match=words):
            call()


# ---- on the command line ---------------------------------------------------------------------------------------------
def test_the_command_line_knows_them_by_name_and_size() -> None:
    from app.commands.options import spec_of
    from app.runs.run import RunRequest, describe

    def of(**more: Any) -> lc.LoraSpec:
        return spec_of("q,v", 8, 16.0, "all", "alpha/r", "gaussian", 0.0, **more)

    assert of(method="bottleneck:12") == method_spec("bottleneck", 12) and of(method="full") == method_spec("full")
    assert of(bottleneck=3, prefix=2) == lc.LoraSpec(bottleneck=3, prefix=2)
    with pytest.raises(lc.UserError, match="as in bottleneck:16"):
        of(method="bottleneck:x")
    said = {n: describe(RunRequest(model="m", task="sentiment", spec=method_spec(n).to_dict())) for n in METHODS}
    assert said == {
        "full": "all in full", "last-layer": "top1 in full", "bitfit": "bias", "bottleneck": "bottleneck 16",
        "prefix": "prefix 8", "lora": "q v · r 8", "lora-prefix": "q v · r 4 · prefix 4"}  # fmt: skip
