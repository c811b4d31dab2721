"""Everything that PEFT can say, on every family, both ways against PEFT itself; and what it cannot say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_placements import parts_of, stirred
from tiny import targets_of
from zoo import CONFIGS, is_encoder, make, out

import lora_core as lc
from lora_core.selection import find_ends
from lora_core.sites import find_sites

every = pytest.mark.parametrize("name", CONFIGS)
MIXTURES = ("mixtral", "qwen2_moe")
TIED = "llama, tied, with biases"
ATTENTION = {"targets": ("q", "v"), "rank": 3, "alpha": 5.0}


def fresh(name: str) -> Any:
    return make(name, torch.float32)


def by_peft(name: str, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return out(PeftModel.from_pretrained(fresh(name), str(folder)).eval())


def there_and_back(name: str, a: lc.Adapter, folder: Path) -> dict[str, Any]:
    """Save; our own load gives it back, PEFT computes the same, and so do we from what PEFT reads. Gives its config."""
    want = out(a.model)
    a.save(folder)
    model = fresh(name)
    again = lc.load_adapter(model, folder)
    torch.testing.assert_close(out(model), want, rtol=0, atol=1e-6)
    assert again.spec == a.spec and list(again.sites) == list(a.sites) and list(again.copies) == list(a.copies)
    assert all(s.also == again.sites[k].also and s.target == again.sites[k].target for k, s in a.sites.items())
    torch.testing.assert_close(by_peft(name, folder), want, rtol=0, atol=2e-5)
    (folder / "lora_lab.json").unlink()
    model = fresh(name)
    lc.load_adapter(model, folder)
    torch.testing.assert_close(out(model), want, rtol=0, atol=1e-5)
    return json.loads((folder / "adapter_config.json").read_text())


def from_peft(name: str, folder: Path, **settings: Any) -> lc.Adapter:
    """An adapter that PEFT has made, with random numbers in all that it trains: our outputs are its."""
    model = fresh(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
        theirs: Any = get_peft_model(model, config).eval()
        g = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for n, p in theirs.named_parameters():
                if p.requires_grad:
                    p.mul_(float("lora_A" not in n and "lora_B" not in n and "embedding" not in n))
                    p.add_(torch.randn(p.shape, generator=g) * 0.05)
        theirs.save_pretrained(str(folder))
    want, base = out(theirs), fresh(name)
    adapter = lc.load_adapter(base, folder)
    torch.testing.assert_close(out(base), want, rtol=0, atol=1e-5)
    assert not torch.allclose(want, out(fresh(name)), atol=1e-4), "it does something"
    return adapter


def last_names(name: str) -> list[str]:
    """What the modules of the layers are called, as PEFT is given them."""
    return sorted({s.path.rpartition(".")[2] for s in find_sites(make(name)) if s.expert is None})


# ---- ours to PEFT --------------------------------------------------------------------------------------------------
@every
def test_all_placements_at_once(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    spec = lc.LoraSpec(targets=(*targets_of(model), *parts_of(model)), rank=3, alpha=5,
                       full=("head",) if is_encoder(model.config) else ())  # fmt: skip
    there_and_back(name, stirred(lc.attach(model, spec)), tmp_path)


@every
def test_dora_of_all_matrices_and_of_slices_alone(name: str, tmp_path: Path) -> None:
    for i, targets in enumerate((("q",), targets_of(make(name)))):
        model = fresh(name)
        targets = ("q", "k", "v", "o") if name in MIXTURES and i else targets
        a = stirred(lc.attach(model, lc.LoraSpec(targets=targets, rank=2, dora=True, scaling="alpha/sqrt(r)")))
        assert there_and_back(name, a, tmp_path / str(i))["use_dora"]


SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "a mask with closed gates": ("gpt2", {"mask": 0.1}),
    "a mask of which nothing is left": ("llama", {"mask": 1000.0, "full": ("model.norm",)}),
    "a mask with DoRA": ("gpt2", {"mask": 0.1, "dora": True}),
    "PiSSA": ("gpt_neox", {"init": "pissa"}),
    "ranks and alphas by target, in the square root": (
        TIED, {"targets": ("q", "v", "embed"), "scaling": "alpha/sqrt(r)", "rank_pattern": {"embed": 2, "v": 5},
               "alpha_pattern": {"embed": 9.0, "q": 1.0}}),
    "the head alone": ("llama", {"targets": ("head",)}),
    "a tied head by its path": (TIED, {"targets": ("lm_head",)}),
    "norms and nothing else": ("llama", {"targets": ("norm",)}),
    "biases of one layer and nothing else": (TIED, {"targets": ("bias",), "layers": (1,)}),
    "biases of the adapted modules": (TIED, {"targets": (*"qkvo", "gate", "up", "down", "bias")}),
    "norms and biases together": ("gpt2", {"targets": ("q", "norm", "bias"), "layers": (0,)}),
    "experts of one layer": ("mixtral", {"targets": ("gate", "down"), "layers": (1,)}),
    "experts' down alone": ("mixtral", {"targets": ("down",)}),
    "experts of unlike rank and alpha": (
        "mixtral", {"targets": ("gate", "up"), "rank_pattern": {"up": 2}, "alpha_pattern": {"gate": 2.0}}),
    "one expert": ("mixtral", {"targets": ("model.layers.1.mlp.experts.gate_up_proj.2.up",)}),
    "a shared expert and dense layers": ("qwen2_moe", {"targets": (
        "model.layers.0.mlp.shared_expert.down_proj", "model.layers.1.mlp.gate_proj", "q"), "dropout": 0.5}),
    "a head trained in full": ("roberta", {"full": ("head",)}),
    "an embedding trained in full": ("llama", {"full": ("model.embed_tokens",)}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_what_peft_can_say(case: str, tmp_path: Path) -> None:
    name, settings = SPECS[case]
    a = stirred(lc.attach(fresh(name), lc.LoraSpec(**{**ATTENTION, **settings})))
    if a.spec.mask:
        with torch.no_grad():
            for key in a.sites:
                a.factors(key).g[1] = 0  # type: ignore[index]
        a.shrink(1.0 if a.spec.mask > 1 else 0.0)
    config = there_and_back(name, a, tmp_path)
    assert config["peft_type"] == "LORA"
    if case == "a mask with closed gates":
        assert config["r"] == 4, "of 3 and 3 directions one each is closed"
    if case.startswith("biases of the adapted"):
        assert config["bias"] == "lora_only"
    if case == "experts of one layer":
        assert config["target_parameters"] == [f"model.layers.1.mlp.experts.{p}_proj" for p in ("gate_up", "down")]


UNSAID: dict[str, tuple[str, dict[str, Any]]] = {
    "adapted and trained in full": ("llama", {"full": ("model.layers.0.self_attn",)}),
    "a name that another module ends with": ("distilbert", {"full": ("classifier",)}),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_peft_cannot_say_it_refuses_and_we_read(case: str, tmp_path: Path) -> None:
    name, settings = UNSAID[case]
    a = stirred(lc.attach(fresh(name), lc.LoraSpec(**{**ATTENTION, **settings})))
    want = out(a.model)
    a.save(tmp_path)
    with pytest.raises((ValueError, KeyError), match="LORA_LAB"):
        PeftModel.from_pretrained(fresh(name), str(tmp_path))
    assert "PEFT has no words for" in json.loads((tmp_path / "adapter_config.json").read_text())["not_for_peft"]
    model = fresh(name)
    lc.load_adapter(model, tmp_path)
    torch.testing.assert_close(out(model), want, rtol=0, atol=1e-6)
    (tmp_path / "lora_lab.json").unlink()
    with pytest.raises(lc.UserError, match="LORA_LAB adapter"):
        lc.load_adapter(model, tmp_path)


# ---- PEFT to ours --------------------------------------------------------------------------------------------------
@every
@pytest.mark.parametrize("how", ["plain", "dora", "tied"])
def test_pefts_own_on_every_family(name: str, how: str, tmp_path: Path) -> None:
    model = make(name)
    settings: dict[str, Any] = {"target_modules": last_names(name), "fan_in_fan_out": name.startswith("gpt2")}
    ends = find_ends(model)
    if how == "plain":
        modules = sorted({p.rpartition(".")[2] for p, m in model.named_modules() if "norm" in type(m).__name__.lower()})
        settings |= {"bias": "all", "modules_to_save": modules, "use_rslora": True}
        settings |= {"rank_pattern": {settings["target_modules"][0]: 2}, "alpha_pattern": {r"[qv].*": 3}}
    elif how == "dora":
        settings |= {"use_dora": True, "bias": "lora_only"}
        settings |= {"modules_to_save": ["classifier"]} if is_encoder(model.config) else {}
    else:
        settings["target_modules"] += [p for s in ends.values() for p in (s.path, *s.also)]
        settings["ensure_weight_tying"] = True
        if name in MIXTURES:
            settings["target_parameters"] = ["gate_up_proj", "experts.down_proj"]
    a = from_peft(name, tmp_path, **settings)
    tied = any(s.also for s in ends.values())
    if how == "tied" and tied and name not in ("t5", "t5, gated", "bart"):  # there PEFT ties two of four
        assert [k for k, s in a.sites.items() if s.also] == [ends["embed"].key]
        a.merge()


PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "the lookup of a tied matrix alone": (TIED, {"target_modules": ["embed_tokens"]}),
    "the lookup and the head of a tied matrix, each by itself": (TIED, {"target_modules": ["embed_tokens", "lm_head"]}),
    "a tied embedding and its head trained in full": (
        TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "an embedding trained in full": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "a classifier of several layers": ("roberta", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "a sequence classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "Mixtral's old names": ("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
    "experts' gate and up alone": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "a parameter that is a module's weight": (
        "llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "layers.1.mlp.up_proj.weight"],
                  "rank_pattern": {r"q_proj\.weight": 2}, "alpha_pattern": {"up_proj.weight": 3}}),
    "a pattern of one layer": ("llama", {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {"layers.1.*q_proj": 2}}),
    "everything linear": ("llama", {"target_modules": "all-linear"}),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFTS)
def test_what_else_peft_says(case: str, tmp_path: Path) -> None:
    name, settings = PEFTS[case]
    a = from_peft(name, tmp_path, **settings)
    if case == "the lookup of a tied matrix alone":
        assert [(k, s.also) for k, s in a.sites.items()] == [("model.embed_tokens", ())]
        with pytest.raises(lc.UserError, match="shares a weight"):
            a.merge()
