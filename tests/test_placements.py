"""Where LoRA goes besides the layers' matrices: embeddings, heads, norms, biases, experts; and DoRA and the mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import bits, targets_of
from zoo import CONFIGS, inputs, make, out

import lora_core as lc
from lora_core.adapter import put_on
from lora_core.selection import find_direct, find_ends

every = pytest.mark.parametrize("name", CONFIGS)
CAUSAL = [n for n in CONFIGS if find_ends(make(n)).keys() == {"embed", "head"}]


def parts_of(model: Any) -> tuple[str, ...]:
    """All targets around the layers that this model has."""
    found = list(find_ends(model))
    for t in ("norm", "bias"):
        try:
            find_direct(model, lc.LoraSpec(targets=(t,)))
        except lc.UserError:
            continue
        found.append(t)
    return tuple(found)


def stirred(adapter: lc.Adapter, seed: int = 3) -> lc.Adapter:
    """Factors and copies as after training: each a little off its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.1)
    return adapter


@every
def test_the_laws_for_embeddings_heads_norms_and_biases(name: str) -> None:
    model = make(name)
    base, weights = out(model), bits(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    for targets in (parts_of(model), (*parts_of(model), *targets_of(model))):
        adapter = lc.attach(model, lc.LoraSpec(targets=targets, rank=2))
        assert torch.equal(out(model), base), "attached, it computes the very same bits"
        stirred(adapter)
        changed = out(model)
        assert (changed - base).abs().max() > 1e-4
        model(**inputs(model)).logits.square().sum().backward()
        wanted = {id(p) for p in adapter.parameters()}
        assert {id(p) for p in model.parameters() if p.grad is not None} <= wanted
        assert all(p.grad is not None for n, p in adapter.named_parameters() if "position" not in n and "pos" not in n)
        adapter.merge()
        torch.testing.assert_close(out(model), changed, rtol=0, atol=1e-9)
        adapter.unmerge()
        torch.testing.assert_close(out(model), changed, rtol=0, atol=0)
        with adapter.disabled():
            assert torch.equal(out(model), base)
        adapter.detach()
        assert torch.equal(out(model), base) and all(torch.equal(v, weights[n]) for n, v in bits(model).items())
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


@every
def test_rows_with_their_own_norms_biases_and_embeddings(name: str) -> None:
    if name == "deberta-v2":
        pytest.skip("projects its position table once for all rows (test_families says so)")
    model = make(name)
    stirred(lc.attach(model, lc.LoraSpec(targets=(*parts_of(model), *targets_of(model)), rank=2), name="a"), 1)
    stirred(lc.attach(model, lc.LoraSpec(targets=parts_of(model), rank=3), name="b"), 2)
    alone = {}
    for n in ("a", "b", None):
        lc.switch(model, None, n)
        alone[n] = out(model)
    names = ["b", None, "a"]
    try:
        with lc.rows(model, names):
            mixed = out(model)
    except ValueError as e:  # position tables and the like, computed once for all rows
        assert "for all rows together" in str(e)
        return
    for i, n in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[n][i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_tied_matrix_is_one_and_changes_everywhere(name: str) -> None:
    model = make(name)
    ends = find_ends(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (ends["embed"] is ends["head"]) == tied
    a = lc.attach(model, lc.LoraSpec(targets=("embed", "head"), rank=2))
    assert len(a.sites) == (1 if tied else 2)
    assert [*a.sites][0] in (ends["embed"].key, ends["head"].key)
    a.detach()
    for target in ("embed", "head"):
        a = stirred(lc.attach(model, lc.LoraSpec(targets=(target,), rank=2)))
        (key,) = a.sites
        want, delta, site = out(model), a.delta(key).dense(), a.sites[key]
        a.detach()
        by_hand = copy.deepcopy(model)
        with torch.no_grad():
            W = by_hand.get_submodule(site.path).weight
            W += delta.T if site.transposed else delta
        torch.testing.assert_close(out(by_hand), want, rtol=0, atol=1e-10)
        untied = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        assert untied == (not tied), "nothing is untied behind one's back"


def test_a_head_that_is_its_own_although_the_config_says_tied() -> None:
    model = make("llama, tied, with biases")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    assert model.config.tie_word_embeddings
    ends = find_ends(model)
    assert ends["embed"].also == () and ends["head"].target == "head"


def test_the_heads_path_on_a_tied_model_is_the_tied_matrix() -> None:
    model = make("llama, tied, with biases")
    a = lc.attach(model, lc.LoraSpec(targets=("lm_head",), rank=2))
    assert list(a.sites) == ["model.embed_tokens"] and a.sites["model.embed_tokens"].also == ("lm_head",)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "albert", "deberta-v2"])
def test_a_classifiers_head_is_trained_in_full(name: str) -> None:
    model = make(name)
    base, weights = out(model), bits(model)
    a = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=2, full=("head",)))
    names = {n for n, p in model.named_parameters() if "lora" not in n} - {
        f"{type(model).base_model_prefix}.{n}" for n, _ in model.base_model.named_parameters()}  # fmt: skip
    assert set(a.copies) == names and names
    assert torch.equal(out(model), base)
    stirred(a)
    changed = out(model)
    a.merge()
    torch.testing.assert_close(out(model), changed, rtol=0, atol=1e-10)
    a.detach()
    assert torch.equal(out(model), base) and all(torch.equal(v, weights[n]) for n, v in bits(model).items())


def test_norms_and_biases_of_chosen_layers() -> None:
    model = make("llama, tied, with biases")
    a = lc.attach(model, lc.LoraSpec(targets=("norm", "bias"), layers=(1,)))
    assert all(n.startswith("model.layers.1.") for n in a.copies)
    assert {n.rsplit(".", 2)[1] for n in a.copies if "norm" in n} == {"input_layernorm", "post_attention_layernorm"}
    a.detach()
    with pytest.raises(lc.UserError, match="'bias' hits nothing in LlamaForCausalLM"):
        lc.attach(make("llama"), lc.LoraSpec(targets=("bias",)))
    with pytest.raises(lc.UserError, match="did you mean 'model.norm'"):
        lc.attach(model, lc.LoraSpec(full=("model.nrm",)))
    with pytest.raises(lc.UserError, match="'head'.*full=\\('head',\\)"):
        lc.attach(make("bert"), lc.LoraSpec(targets=("head",)))


@pytest.mark.parametrize("setting", [{"dora": True}, {"train_A": False}, {"init": "gradient"}])
def test_what_an_embedding_cannot_have_is_said(setting: dict[str, Any]) -> None:
    with pytest.raises(lc.UserError, match="is an embedding, which cannot have"):
        lc.attach(make("llama"), lc.LoraSpec(targets=("q", "embed"), **setting))


# ---- experts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_experts_whatever_computes_them(how: str) -> None:
    model = make("mixtral", torch.float32)
    model.set_experts_implementation(how)
    base = out(model)
    a = lc.attach(model, lc.LoraSpec(targets=("gate", "up", "down"), rank=2))
    assert len(a.sites) == 2 * 3 * 3 and torch.equal(out(model), base)
    stirred(a)
    changed = out(model)
    model(**inputs(model)).logits.square().sum().backward()
    grads = [p.grad for p in a.parameters()]
    assert sum(g is not None and bool(g.any()) for g in grads) >= len(grads) / 2, "experts that were asked learn"
    a.merge()
    torch.testing.assert_close(out(model), changed, rtol=0, atol=2e-5)
    a.detach()
    assert torch.equal(out(model), base)


def test_one_experts_matrix_alone() -> None:
    model = make("mixtral")
    key = "model.layers.1.mlp.experts.gate_up_proj.2.up"
    a = stirred(lc.attach(model, lc.LoraSpec(targets=(key,), rank=2)))
    assert list(a.sites) == [key]
    W = model.get_submodule("model.layers.1.mlp.experts").gate_up_proj
    before, delta = W.detach().clone(), a.delta(key).dense()
    a.merge()
    torch.testing.assert_close(W[2, 48:], before[2, 48:] + delta)
    assert torch.equal(W[:2], before[:2]) and torch.equal(W[2, :48], before[2, :48]), "the others keep their bits"
    with pytest.raises(lc.UserError, match="an expert of a mixture, which cannot have dropout"):
        lc.attach(model, lc.LoraSpec(targets=(key,), rank=2, dropout=0.1), name="b")


@pytest.mark.parametrize(("turned", "halves"), [(True, True), (True, False), (False, False)])
def test_experts_that_are_stored_otherwise(turned: bool, halves: bool) -> None:
    class Experts(torch.nn.Module):
        """Like gpt-oss' and llama4's: (experts, in, out), and gate and up in turns."""

        def __init__(self) -> None:
            super().__init__()
            self.is_transposed, self.is_concatenated = turned, halves
            self.gate_up_proj = torch.nn.Parameter(torch.randn((2, 5, 12) if turned else (2, 12, 5)).double())
            self.down_proj = torch.nn.Parameter(torch.randn((2, 6, 5) if turned else (2, 5, 6)).double())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            W, D = (w if turned else w.transpose(1, 2) for w in (self.gate_up_proj, self.down_proj))
            h = x @ W
            gate, up = h.chunk(2, -1) if halves else (h[..., ::2], h[..., 1::2])
            return (gate * up) @ D

    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Experts()])
    experts: Any = model.layers[0]
    x = torch.randn(2, 3, 5).double()
    a = stirred(lc.attach(model, lc.LoraSpec(targets=("gate", "up", "down"), rank=2)))
    want, deltas, W0 = experts(x), {k: d.dense() for k, d in a.deltas().items()}, {k: a.W0(k) for k in a.sites}
    W = {k: W0[k] + deltas[k] for k in W0}
    for e in range(2):
        gate, up = (x[e] @ W[f"layers.0.gate_up_proj.{e}.{t}"].T for t in ("gate", "up"))
        torch.testing.assert_close((gate * up) @ W[f"layers.0.down_proj.{e}"].T, want[e])
    a.merge()
    torch.testing.assert_close(experts(x), want)


# ---- DoRA ----------------------------------------------------------------------------------------------------------
@every
def test_the_laws_with_dora(name: str) -> None:
    model = make(name)
    base, weights = out(model), bits(model)
    targets = targets_of(model)
    if name in ("mixtral", "qwen2_moe"):
        targets = ("q", "k", "v", "o")
    a = lc.attach(model, lc.LoraSpec(targets=targets, rank=2, dora=True))
    assert torch.equal(out(model), base)
    stirred(a)
    changed = out(model)
    for key, s in a.sites.items():  # its own equation, by hand
        f, W0 = a.factors(key), a.W0(key)
        V = W0 + f.scaling * f.B @ f.A
        assert f.m is not None
        want = f.m[:, None] * V / V.norm(dim=1, keepdim=True) - W0
        torch.testing.assert_close(a.delta(key).dense(), want.detach(), rtol=1e-9, atol=1e-10)
        assert a.delta(key).shape == (s.out, s.in_)
    a.merge()
    torch.testing.assert_close(out(model), changed, rtol=0, atol=1e-9)
    a.detach()
    assert torch.equal(out(model), base) and all(torch.equal(v, weights[n]) for n, v in bits(model).items())


def test_doras_gradient_holds_the_norm_constant() -> None:
    """Section 4.3 of DoRA: the norm has no gradient, so that of B is scaled by m/‖V‖ and no more."""
    model = make("llama")
    a = stirred(lc.attach(model, lc.LoraSpec(targets=("q",), layers=(0,), rank=2, dora=True)))
    (key,) = a.sites
    f, W0 = a.factors(key), a.W0(key)
    q = model.get_submodule(key)
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q(x).backward(g)
    V = (W0 + f.scaling * f.B @ f.A).detach()
    norm = V.norm(dim=1)
    assert f.m is not None and f.m.grad is not None and f.B.grad is not None
    torch.testing.assert_close(f.m.grad, (g * (x @ V.T)).sum(0) / norm)
    c = (f.m / norm).detach()
    torch.testing.assert_close(f.B.grad, f.scaling * (c * g).T @ (x @ f.A.T).detach())


# ---- the mask ------------------------------------------------------------------------------------------------------
def test_gates_close_and_the_rank_is_learned() -> None:
    model = make("llama")
    a = stirred(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=4, mask=0.5)))
    key = next(iter(a.sites))
    f = a.factors(key)
    assert f.g is not None
    with torch.no_grad():
        f.g.copy_(torch.tensor([0.3, -0.04, 0.049, -0.9]))
    a.shrink(lr=0.1)  # towards zero by 0.05
    torch.testing.assert_close(f.g.detach(), torch.tensor([0.25, 0.0, 0.0, -0.85], dtype=f.g.dtype))
    assert a.ranks()[key] == 2 and a.delta(key).rank == 2
    torch.testing.assert_close(a.delta(key).dense(), (f.scaling * f.B @ torch.diag(f.g) @ f.A).detach())
    want = out(model)
    a.merge()
    torch.testing.assert_close(out(model), want, rtol=0, atol=1e-10)
    a.unmerge()
    with torch.no_grad():
        f.g.zero_()
    assert a.ranks()[key] == 0 and not a.delta(key).dense().any()


def test_gates_go_through_the_fused_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    a = stirred(lc.attach(model, lc.LoraSpec(targets=("q",), rank=4, mask=0.5)))
    model(**inputs(model)).logits.square().sum().backward()
    fused = {n: p.grad.clone() for n, p in a.named_parameters() if p.grad is not None}
    assert sum(n.endswith(".g") for n in fused) == 2
    for p in a.parameters():
        p.grad = None
    monkeypatch.setattr("lora_core.adapted.Adapted._can_fuse", lambda *_: False)
    model(**inputs(model)).logits.square().sum().backward()
    for n, p in a.named_parameters():
        torch.testing.assert_close(p.grad, fused[n])


def test_two_updates_of_one_tied_weight_cannot_be_merged() -> None:
    """As PEFT's on embed_tokens and lm_head of a tied model, each of which acts in its own module alone."""
    import dataclasses

    model = make("llama, tied, with biases")
    site = find_ends(model)["embed"]
    turned = dict(path="lm_head", key="lm_head", out=site.in_, in_=site.out, transposed=False, lookup=False)
    alone = [dataclasses.replace(site, also=()), dataclasses.replace(site, also=(), **turned)]  # type: ignore[arg-type]
    spec = lc.LoraSpec(targets=("model.embed_tokens", "lm_head"), rank=2)
    tensors = {s.key: (torch.randn(2, s.in_), torch.randn(s.out, 2), 1.0) for s in alone}
    a = put_on(model, spec, "a", alone, tensors)
    with pytest.raises(lc.UserError, match="shares a weight that it adapts elsewhere"):
        a.merge()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"dora": True, "init": "pissa"}, "begins at W0 itself"),
        ({"dora": 1}, "dora is 1; it is True or False"),
        ({"mask": -1.0}, "mask is -1.0"),
        ({"mask": float("nan")}, "mask is nan"),
        ({"mask": "x"}, "mask is 'x'"),
        ({"mask": 10**400}, "mask is 1000"),  # JSON has whole numbers that no float holds
        ({"alpha": 10**400}, "alpha is 1000"),
        ({"alpha_pattern": {"q": 10**400}}, "alpha_pattern.'q'. is 1000"),
    ],
)
def test_settings_that_are_nothing(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(lc.UserError, match=says):
        lc.LoraSpec(**setting)
