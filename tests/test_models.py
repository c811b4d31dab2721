"""Loading models: the list, local folders, the hub without network, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_core import hub, models
from lora_core.errors import UserError
from lora_core.models import load_model, registry
from tests.model_folder import tiny_llama


def test_the_list() -> None:
    entries = {e.name: e for e in registry()}
    assert entries["smollm2-135m"].source == "embedded" and entries["smollm2-135m"].parameters == 134_515_008
    assert entries["minilm"].kind == "encoder"
    assert {"distilgpt2", "gpt2", "pythia-70m", "pythia-160m", "pythia-410m", "smollm2-360m", "qwen2.5-0.5b",
            "qwen3-0.6b", "opt-125m"} <= set(entries)  # fmt: skip
    others = [e for name, e in entries.items() if name not in models.embedded.WHEELS]
    assert all(e.kind == "causal-lm" and e.source == "hub" for e in others)
    assert json.dumps([e.to_dict() for e in entries.values()])


def test_the_lists_parameter_counts_are_those_of_the_architectures() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

    def llama(width: int, inner: int, layers: int, heads: int, kv: int) -> LlamaConfig:
        return LlamaConfig(vocab_size=49152, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                           num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True)  # fmt: skip

    def neox(width: int, layers: int, heads: int) -> GPTNeoXConfig:
        return GPTNeoXConfig(vocab_size=50304, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                             intermediate_size=4 * width, tie_word_embeddings=False)  # fmt: skip

    configs = {
        "smollm2-135m": llama(576, 1536, 30, 9, 3),
        "smollm2-360m": llama(960, 2560, 32, 15, 5),
        "gpt2": GPT2Config(),
        "distilgpt2": GPT2Config(n_layer=6),
        "pythia-70m": neox(512, 6, 8),
        "pythia-160m": neox(768, 12, 12),
        "pythia-410m": neox(1024, 24, 16),
        "opt-125m": OPTConfig(),
    }
    listed = {e.name: e.parameters for e in registry()}
    for name, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == listed[name], name


def test_listing_needs_no_torch() -> None:
    code = "import sys, lora_core as lc; lc.registry(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_local_folder(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"
    info = model.lora_lab
    assert (info.name, info.source, info.kind) == (str(folder.resolve()), "folder", "causal-lm")
    assert info.tokenizer is tokenizer and tokenizer.eos_token == "<|im_end|>"
    again, _ = load_model(str(folder), device="cpu", dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    ids = torch.tensor([tokenizer("the quick").input_ids])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, again(ids).logits.float(), atol=0.05)


def test_gpt2_without_a_padding_token_gets_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from tests.tokenizer_fixture import tiny_tokenizer

    core = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())  # pyright: ignore
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    _, tokenizer = load_model(tmp_path, device="cpu", dtype="float32")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


def test_an_encoder_folder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    from tests.tokenizer_fixture import tiny_tokenizer

    config = BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path)  # has no pooler: that is no fault in an encoder
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, device="cpu", dtype="float32")
    assert type(model).__name__ == "BertModel" and model.lora_lab.kind == "encoder"


def refused(name: Any, words: str) -> str:
    with pytest.raises(UserError, match=words) as caught:
        load_model(name, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_names_are_told_the_nearest() -> None:
    refused("smolm2-135m", r"no model 'smolm2-135m'; possible: .*gpt2.* \(did you mean 'smollm2-135m'\?\)")
    refused("", "no model named")
    refused("./nowhere", "no model folder './nowhere'")
    refused("/no/such/place", "no model folder")


def test_a_hub_id_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("someone/something", "not on this machine, and HF_HUB_OFFLINE .* possible without it: smollm2-135m")
    refused("pythia-70m", "model 'EleutherAI/pythia-70m' is not on this machine")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import httpx

    class Unreachable:
        def model_info(self, *_: object, **__: object) -> None:
            raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    refused("someone/something", "the hub cannot be reached from here; possible without it: .*smollm2-135m")


def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], talks: list[Any]) -> list[Any]:
    """A hub with one model of these files; returns the list of what is downloaded."""
    import huggingface_hub

    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files], sha="abc")

        def get_repo_discussions(self, name: str, **_: object) -> list[Any]:
            return talks

    asked: list[Any] = []

    def snapshot_download(name: str, *, revision: str, allow_patterns: list[str], etag_timeout: float) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tiny_llama(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_from_the_hub_only_safetensors_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = fake_hub(monkeypatch, tmp_path, ["model.safetensors", "config.json", "pytorch_model.bin"], [])
    model, _ = load_model("someone/something", device="cpu", dtype="float32")
    assert (model.lora_lab.name, model.lora_lab.source) == ("someone/something", "hub")
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("someone/something", "abc")
    assert not any("bin" in p or p.endswith(("py", "*")) and p != "tokenizer*" for p in patterns)


def test_pickles_on_the_hub_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forged = SimpleNamespace(title=hub.CONVERTED, author="mallory", status="open", num=7)
    asked = fake_hub(monkeypatch, tmp_path, ["pytorch_model.bin", "config.json"], [forged])
    refused("someone/something", "only pickles on the hub")
    assert not asked


def test_the_hubs_own_conversion_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    talk = SimpleNamespace(title=hub.CONVERTED, author=hub.CONVERTED_BY, status="open", num=3)
    asked = fake_hub(monkeypatch, tmp_path, ["pytorch_model.bin", "config.json"], [talk])
    load_model("opt-125m", device="cpu", dtype="float32")
    assert asked[0][:2] == ("facebook/opt-125m", "refs/pr/3")


def test_the_hubs_cache_is_found_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--openai-community--gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    snapshot = repo / "snapshots" / "c0ffee"
    tiny_llama(snapshot)
    (snapshot / "model.safetensors").rename(tmp_path / "elsewhere")

    def cached() -> bool:
        return next(e.cached for e in registry() if e.name == "gpt2")

    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert not cached()  # configuration alone is not a model
    (tmp_path / "elsewhere").rename(snapshot / "model.safetensors")
    assert cached()
    model, _ = load_model("gpt2", device="cpu", dtype="float32")
    assert (model.lora_lab.name, model.lora_lab.source) == ("gpt2", "hub")


def change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no model folder: there is no config.json")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "is an adapter, not a model")
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path / "file.txt", "is a file; a model is a folder")
    both = tiny_llama(tmp_path / "both")
    (both / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    refused(both, "a model and an adapter in one folder")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, "there is no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refused(folder, "only as a pickle .pytorch_model.bin.*safetensors are needed")


def test_a_models_own_code_is_never_run(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change_config(folder, auto_map=own, model_type="evil")
    refused(folder, "needs code that comes with it .model_type 'evil'.; LoRA Lab never runs such code")
    change_config(folder, model_type="llama")  # a known architecture loads as transformers' own class
    model, _ = load_model(folder, device="cpu", dtype="float32")
    assert type(model).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_configurations_that_do_not_fit(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    kept = (folder / "config.json").read_text()
    refused(change_config(folder, model_type="lama"), "model_type 'lama', which transformers does not know.*'llama'")
    refused(change_config(folder, model_type="llama", quantization_config={"bits": 4}), "stored quantised")
    (folder / "config.json").write_text(kept)
    refused(change_config(folder, architectures=["LlamaForSequenceClassification"]), "a causal language model or")
    for odd in (10**30, {"LlamaForCausalLM": 1}, "LlamaForCausalLM"):
        refused(change_config(folder, architectures=odd), "architectures are no list of names")
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json is not a JSON object")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_llama(tmp_path)
    file = folder / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if "layers.1." not in k}, file, {"format": "pt"})
    refused(folder, r"its weights lack model.layers.1.input_layernorm.weight and \d+ more")
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "cannot be loaded")
    save_file(whole, file, {"format": "pt"})
    refused(change_config(folder, hidden_size=64), "cannot be loaded")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "model-00002-of-00002.safetensors is missing")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    refused(folder, "cannot be loaded")


def test_wrong_settings_are_told_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find", lambda name: pytest.fail("went on to find the model"))
    with pytest.raises(UserError, match="no dtype 'float16'"):
        load_model("smollm2-135m", dtype="float16")
    with pytest.raises(UserError, match="no device 'tpu'"):
        load_model("smollm2-135m", device="tpu")
