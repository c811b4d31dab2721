"""The price of an adapter, against the paper's counts, real files, torch's own counting and the page's coefficients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import targets_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

import lora_core as lc
from lora_core.budget import Budget, budget_coefficients, meta_model

SMOL = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True)  # fmt: skip


# ---- counts ----------------------------------------------------------------------------------------------------------
def test_golden_counts_without_weights() -> None:
    """|Θ| = 2·L̂·d·r (section 7.1) on the paper's models, from their shapes on the meta device."""
    gpt2_medium = meta_model(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert lc.budget(gpt2_medium, lc.LoraSpec(rank=4)).trainable == 393_216
    gpt3 = meta_model(GPT2Config(n_embd=12288, n_layer=96, n_head=96, vocab_size=50257, n_positions=2048))
    assert lc.budget(gpt3, lc.LoraSpec(rank=4)).trainable == 18_874_368
    b = lc.budget(meta_model(SMOL), lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16))
    assert (b.trainable, b.total, b.matrices) == (460_800, 134_515_008, 60)
    assert b.fraction == pytest.approx(0.0034, abs=1e-4)
    assert b.per_target == {"q": 276_480, "v": 184_320} and b.factors == b.trainable
    assert b.tied == 49152 * 576, "the embedding is the head, and counted once"


def test_golden_counts_of_encoders() -> None:
    roberta = tr.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)  # base
    b = lc.budget(meta_model(roberta), lc.LoraSpec(rank=8))
    assert b.trainable == b.factors == 12 * 2 * 8 * (768 + 768) == 294_912
    b = lc.budget(meta_model(roberta, labels=2), lc.LoraSpec(rank=8, full=("head",)))
    assert (b.factors, b.head, b.direct) == (294_912, (768 * 768 + 768) + (768 * 2 + 2), 0)  # a dense layer, then two
    assert b.trainable == 294_912 + 592_130 and b.per_target["head"] == 592_130
    xxl = meta_model(tr.DebertaV2Config(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24,
                                        intermediate_size=6144, vocab_size=128100))  # fmt: skip
    assert lc.budget(xxl, lc.LoraSpec(rank=16)).trainable == 4_718_592, "the paper's 4.7M"
    assert lc.budget(xxl, lc.LoraSpec(rank=8)).trainable == 2_359_296, "and not at the rank that it gives"


def test_what_is_counted_apart() -> None:
    """By hand: hidden 32, MLP 48, two layers, two key heads of 8, vocabulary 200."""
    model = zoo.make("llama, tied, with biases", torch.float32)
    b = lc.budget(model, lc.LoraSpec(targets=("o", "embed", "norm", "bias"), rank=2, dora=False, mask=0.1))
    vectors = {"norm": 2 * 2 * 32 + 32, "bias": 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)}
    assert b.direct == sum(vectors.values()) and b.gates == 3 * 2 and b.magnitudes == b.head == 0
    assert b.per_target == {"o": 2 * 2 * (32 + 32 + 1), "embed": 2 * (200 + 32 + 1)} | vectors
    assert b.tied == 200 * 32
    b = lc.budget(model, lc.LoraSpec(targets=("q", "v"), rank=2, dora=True, train_A=False))
    assert (b.factors, b.magnitudes) == (2 * 2 * (32 + 16), 2 * (32 + 16))
    untied = zoo.make("llama", torch.float32)
    b = lc.budget(untied, lc.LoraSpec(targets=("embed", "head"), rank=2, full=("head", "model.norm")))
    assert b.per_target == {"embed": 464, "head": 464 + 6400, "model.norm": 32} and b.tied == 0
    assert (b.factors, b.head, b.direct) == (928, 6400, 32)
    experts = lc.budget(zoo.make("mixtral", torch.float32), lc.LoraSpec(targets=("gate", "down"), rank=2))
    assert experts.per_target == {t: 2 * 3 * 2 * (32 + 48) for t in ("gate", "down")}, "of all three experts"


MODELS = {name: zoo.make(name, torch.float32) for name in zoo.CONFIGS}


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(MODELS)))
    model = MODELS[name]
    names = [*targets_of(model), "embed", "head", "norm", "bias"]
    ranks = st.integers(1, 4)
    modules = [p for p, m in model.named_modules() if p and any(True for _ in m.parameters(recurse=False))]
    modules += [n for n, _ in model.named_parameters()]
    return name, {
        "targets": tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))),
        "rank": draw(ranks),
        "layers": draw(st.sampled_from(["all", "all", (0,), (1,)])),
        **draw(st.sampled_from([{}, {"dora": True}, {"init": "pissa"}])),
        "train_A": draw(st.booleans()),
        "mask": draw(st.sampled_from([0.0, 0.1])),
        "full": tuple(draw(st.lists(st.sampled_from(["head", *modules]), max_size=1))),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(names[:3]), ranks, max_size=1)),
    }


@given(cases())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_what_attach_makes(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    """Numbers, file and refusals of whatever spec on whatever family, against the adapter itself."""
    name, settings = case
    model, spec = MODELS[name], lc.LoraSpec(**settings)
    try:
        adapter = lc.attach(model, spec)
    except lc.UserError as error:
        with pytest.raises(lc.UserError) as same:
            lc.budget(model, spec)
        assert str(same.value) == str(error)
        return
    try:
        check(model, spec, adapter, lc.budget(model, spec), tmp_path)
    finally:
        adapter.detach()


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_every_family(name: str, tmp_path: Path) -> None:
    model = zoo.make(name, torch.float32)
    ends = ("embed",) if name == "olmo" else ("embed", "norm")  # whose norms have no numbers
    spec = lc.LoraSpec(targets=(*targets_of(model), *ends), rank=3, rank_pattern={"v": 2})
    foretold = lc.budget(model, spec)
    adapter = lc.attach(model, spec)
    check(model, spec, adapter, foretold, tmp_path)


def check(model: nn.Module, spec: lc.LoraSpec, adapter: lc.Adapter, b: Budget, folder: Path) -> None:
    assert lc.budget(model, spec) == b, "an attached adapter is no part of the model"
    assert b.trainable == sum(p.numel() for p in adapter.parameters()) == sum(b.per_target.values())
    named = dict(adapter.named_parameters())
    apart = {kind: sum(named[f"{k}.{kind}"].numel() for k in adapter.sites if f"{k}.{kind}" in named) for kind in "mg"}
    assert (b.magnitudes, b.gates) == (apart["m"], apart["g"])
    assert b.head + b.direct == sum(p.numel() for p in adapter.copies.values())
    assert b.factors + b.head + b.direct + b.magnitudes + b.gates == b.trainable
    assert b.total == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in named.values())
    adapter.save(folder)
    assert b.file_bytes == (folder / "adapter_model.safetensors").stat().st_size


# ---- memory and operations -------------------------------------------------------------------------------------------
H, INNER, LAYERS = 128, 352, 4


def middle(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model that is large enough for its activations to say something."""
    size: dict[str, Any] = dict(hidden_size=H, intermediate_size=INNER, num_hidden_layers=LAYERS,
                                num_attention_heads=8, vocab_size=300, bos_token_id=1, eos_token_id=2,
                                pad_token_id=3)  # fmt: skip
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=H, n_layer=LAYERS, n_head=8, vocab_size=300, resid_pdrop=0, embd_pdrop=0,
                                 attn_pdrop=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    elif kind == "bert":
        config = tr.BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **size)
    else:
        more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
        config = {"llama": LlamaConfig, "phi3": tr.Phi3Config, "qwen3": tr.Qwen3Config, "gemma2": tr.Gemma2Config,
                  "mixtral": tr.MixtralConfig}[kind](num_key_value_heads=4, **size, **more)  # fmt: skip
        if kind in ("qwen3", "gemma2"):
            config.head_dim = 16
        config._experts_implementation = "eager"
    build: Any = tr.AutoModelForSequenceClassification if kind == "bert" else tr.AutoModelForCausalLM
    return build.from_config(config).to(dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"train_A": False, "mask": 0.1}, {"init": "pissa", "targets": ("q", "norm")},
                                 {"dora": True}])  # fmt: skip
def test_the_parts_of_memory_are_what_torch_holds(dtype: torch.dtype, how: dict[str, Any]) -> None:
    """Bytes of weights, gradients and Adam's statistics after a step, of LoRA and of full fine-tuning."""
    model = middle("llama", dtype)
    spec = lc.LoraSpec(rank=4, **how)
    b = lc.budget(model, spec, tokens=64)

    def held(params: list[nn.Parameter]) -> tuple[int, int]:
        optimizer = torch.optim.AdamW(params)
        model(input_ids=torch.randint(5, 200, (4, 16))).logits.float().mean().backward()
        optimizer.step()
        moments = [v for s in optimizer.state.values() for n, v in s.items() if n.startswith("exp_avg")]
        return sum(p.grad.nbytes for p in params if p.grad is not None), sum(v.nbytes for v in moments)

    full = held(list(model.parameters()))
    master = 1 if dtype != torch.bfloat16 else 2  # Adam works on the float32 master copy
    assert (b.full_memory.gradients, b.full_memory.optimiser) == (full[0], full[1] * master)
    assert b.full_memory.weights == b.full_bytes == sum(p.nbytes for p in model.parameters())
    assert b.full_memory.copies == (4 * b.total if dtype == torch.bfloat16 else 0)
    model.zero_grad()
    adapter = lc.attach(model, spec)
    params = list(adapter.parameters())
    assert (b.memory.gradients, b.memory.optimiser) == held(params)
    assert b.memory.copies == sum(p.detach().clone().nbytes for p in params), "train() keeps the last good numbers"
    anchors = [t for k in adapter.sites for t in (adapter.factors(k).A0, adapter.factors(k).B0) if t is not None]
    assert b.memory.weights == sum(p.nbytes for p in model.parameters()) + sum(t.nbytes for t in anchors)
    assert b.train_bytes == sum(b.to_dict()["memory"].values()) < b.full_train_bytes


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("how", [{"targets": ("q", "v")}, {"targets": ("up", "down")}, {"targets": None},
                                 {"targets": ("v",), "layers": (2, 3)}, None])  # fmt: skip
def test_activations_are_about_what_autograd_keeps(kind: str, how: dict[str, Any] | None) -> None:
    model = middle(kind)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    if how is None:
        foretold = lc.budget(model, lc.LoraSpec(), tokens=256, labelled=0).full_memory.activations
    else:
        spec = lc.LoraSpec(rank=4, **{**how, "targets": how["targets"] or targets_of(model)})
        foretold = lc.budget(model, spec, tokens=256, labelled=0).memory.activations
        own |= {p.untyped_storage().data_ptr() for p in lc.attach(model, spec).parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t  # held, so that none comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model.base_model(input_ids=torch.randint(5, 200, (4, 64)), use_cache=False)[0]
    assert hidden.requires_grad and foretold == pytest.approx(sum(n for n, _ in kept.values()), rel=0.3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "phi3", "mixtral", "bert"])
@pytest.mark.parametrize("how", [
    {}, {"targets": None}, {"targets": ("up", "down"), "layers": (1, 3)}, {"targets": None, "train_A": False},
    {"init": "pissa"}, {"targets": ("o",), "dora": True}, {"targets": ("q", "embed"), "mask": 0.1},
    {"targets": ("o", "norm")}, {"full": ("head",)}, {"targets": ("head",)}, None])  # fmt: skip
def test_operations_are_what_torch_counts(kind: str, how: dict[str, Any] | None) -> None:
    """Products of matrices, less those of attention's scores, against torch's counter.

    Dropout keeps the fused function away, whose products in place the counter does not see.
    """
    model = middle(kind)
    if how is None:
        foretold = lc.budget(model, lc.LoraSpec(), tokens=64, labelled=64).full_step_flops
    else:
        how = {"targets": ("q", "v")} | how
        dropout = 0.0 if kind == "mixtral" else 1e-6
        try:
            spec = lc.LoraSpec(rank=4, dropout=dropout, **{**how, "targets": how["targets"] or targets_of(model)})
            b = lc.budget(model, spec, tokens=64, labelled=64)
        except lc.UserError as error:  # a tied head trained in full, a classifier's head as a matrix
            assert "head" in str(error)
            return
        foretold = b.step_flops
        assert foretold < b.full_step_flops * 1.05
        lc.attach(model, spec)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(5, 200, (4, 16))).logits.float().sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "bmm" not in str(op) and "attention" not in str(op))
    assert foretold == pytest.approx(products, rel=0.03)


# ---- the page --------------------------------------------------------------------------------------------------------
def budget_js(c: dict[str, Any], spec: lc.LoraSpec, tokens: int, labelled: int) -> dict[str, float]:
    """static/budget.js, line by line; that the two are one is for the tests in the browser."""
    layers, lowest = (c["layers"], 0) if spec.layers == "all" else (len(spec.layers), min(spec.layers))
    depth, frozen, anchored = (c["layers"] - lowest) / c["layers"], not spec.train_A, spec.init == "pissa"
    matrices, sides, out = (layers * sum(c[of][t] for t in spec.targets) for of in ("modules", "per_rank", "out"))
    sides, out = spec.rank * sides, spec.rank * out
    n, kept = out if frozen else sides, sides * (1 + anchored)
    stages = {c["stage"][t] for t in spec.targets}
    start = min(stages)
    inputs = layers * sum(c["inputs"][i] for i in stages) + spec.rank * matrices
    ends = spec.rank * sum(
        c["per_rank"][t] * (1 + anchored) - c["out"][t] for t in spec.targets if c["stage"][t] == start
    )
    factors = 4 * out + 2 * sides + (1 if frozen else 2) * 2 * (sides - out) + 4 * sides * anchored - 2 * ends
    return {
        "trainable": n, "total": c["total"], "matrices": matrices,
        "file_bytes": c["file_bytes"] * (1 + anchored) * spec.rank * layers * sum(c["stored"][t] for t in spec.targets)
        + c["header"] * matrices,
        "train_bytes": c["weights"] + tokens * (c["act_per_token"] * depth + c["width"] * inputs)
        + labelled * c["logit_bytes"] + c["number"] * (kept + 4 * n),
        "full_train_bytes": c["weights"] + tokens * (c["act_per_token"] + c["inputs_per_token"])
        + labelled * c["logit_bytes"] + c["full_state"] * c["total"],
        "step_flops": 2 * tokens * (c["body"] * (1 + depth) - c["below"][start]) + 4 * c["head"] * labelled
        + tokens * factors,
    }  # fmt: skip


@pytest.mark.parametrize("targets", [("q", "v"), ("up", "down"), ("q", "k", "v", "o", "gate", "up", "down")])
@pytest.mark.parametrize("layers", ["all", tuple(range(6, 12)), (3,)])
@pytest.mark.parametrize("how", [{}, {"train_A": False}, {"init": "pissa"}])
@pytest.mark.parametrize("config", [SMOL, GPT2Config()])
def test_the_pages_coefficients_give_the_same(targets: Any, layers: Any, how: Any, config: Any) -> None:
    model = meta_model(config, dtype=torch.bfloat16)
    c = budget_coefficients(model)
    targets = tuple(t for t in targets if t in c["out"])
    for rank in (1, 8, 64):
        spec = lc.LoraSpec(targets=targets, layers=layers, rank=rank, **how)
        b = lc.budget(model, spec, tokens=520, labelled=240)
        for name, value in budget_js(c, spec, 520, 240).items():
            close = {"file_bytes": 0.02, "trainable": 0, "total": 0, "matrices": 0}.get(name, 1e-6)
            assert value == pytest.approx(getattr(b, name), rel=close), name


def test_lora_is_cheaper_and_by_how_much() -> None:
    b = lc.budget(meta_model(SMOL), lc.LoraSpec())
    assert b.train_bytes < b.full_train_bytes / 2 and b.file_bytes < b.full_bytes / 100
    assert b.full_memory.weights == b.full_bytes == 134_515_008 * torch.finfo(meta_model(SMOL).dtype).bits // 8  # type: ignore[arg-type]
    assert b.to_dict()["trainable"] == b.trainable


def test_the_storage_of_many_tasks() -> None:
    """More than the model for one task, far less for many: the paper's 354 GB against 35 TB (section 4.2)."""
    b = lc.budget(meta_model(SMOL), lc.LoraSpec())
    full, lora = b.storage(1)
    assert lora > full and b.storage(2)[1] < b.storage(2)[0]
    gpt3 = replace(b, full_bytes=350 * 10**9, file_bytes=35 * 10**6)
    assert gpt3.storage(100) == (35_000 * 10**9, 353_500 * 10**6)
    assert b.flops_per_token * b.tokens == pytest.approx(b.step_flops)


def test_a_spec_that_does_not_fit_is_refused() -> None:
    with pytest.raises(lc.UserError, match="no matrix 'gate' in GPT2LMHeadModel"):
        lc.budget(meta_model(GPT2Config(n_embd=32, n_layer=1, n_head=2)), lc.LoraSpec(targets=("gate",)))
