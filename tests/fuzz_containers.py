"""Fuzzed safetensors' headers, zips and models' configurations."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import warnings
import zipfile
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import safetensors
from hypothesis import strategies as st

from tests.fuzz_adapters import CONFIG, looked_at, saved
from tests.fuzz_files import MODULES, PREFIX, Kit
from tests.fuzz_values import ANY, NUMBERS, TEXTS, changed
from tests.fuzz_watch import told


# ---- headers
@st.composite
def header_cases(draw: st.DrawFn) -> bytes:
    entries: list[tuple[str, Any]] = []
    at = 0
    for i in range(draw(st.integers(0, 4))):
        shape = draw(st.sampled_from([[2, 2], [4], [], [0], [1, 2]]))
        size = 4 * math.prod(shape)
        entry: Any = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
        if draw(st.integers(0, 3)) == 0:
            entry = draw(
                st.one_of(
                    changed(entry),
                    ANY,
                    st.fixed_dictionaries(
                        {
                            "dtype": st.sampled_from(["F32", "F64", "BF16", "I4", "F4", "f32", "F8_E8M0", "C64", ""]),
                            "shape": st.lists(st.one_of(NUMBERS, st.integers(-2, 5)), max_size=10),
                            "data_offsets": st.lists(st.one_of(NUMBERS, st.integers(-2, 40)), max_size=3),
                        }
                    ),
                )
            )
        entries.append(
            (draw(st.sampled_from([f"t{i}", f"t{i}", "t0", "", "\0", "x" * 900, "9" * 4500, "\ud800"])), entry)
        )
    if draw(st.integers(0, 2)) == 0:
        entries.insert(
            0, ("__metadata__", draw(st.one_of(st.dictionaries(st.text(max_size=4), st.text(max_size=4)), ANY)))
        )
    head = "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries) + "}"
    text = draw(
        st.sampled_from([head] * 8 + ["", "[]", "null", "{" * 3000, head[:-1], head + " " * 40, '{"a":' * 3000])
    ).encode()
    if draw(st.integers(0, 40)) == 0:
        text += b" " * draw(st.sampled_from([1 << 20, 66 << 20]))
    length = draw(st.sampled_from([len(text)] * 8 + [0, 1, 2**63, 2**64 - 1, len(text) - 1, len(text) + 1, 10**12]))
    body = b"\0" * draw(st.sampled_from([at, at, at, 0, at + 1, max(0, at - 1), 100]))
    whole = struct.pack("<Q", max(0, length)) + text + body
    return whole[: draw(st.sampled_from([len(whole)] * 9 + [0, 7, 8, 9]))]


def header(case: bytes, kit: Kit) -> None:
    from lora_core.peft_format import read_tensors
    from lora_core.weights import Weights, read_header

    path = kit.fresh() / "model.safetensors"
    path.write_bytes(case)
    found = told(lambda: read_header(path))
    mine = told(lambda: read_tensors(path))
    if found is not None:
        theirs = dict(safetensors.deserialize(case))  # what we take, the format's own reader takes as well
        assert set(theirs) == set(found.entries)
        for name, entry in found.entries.items():
            assert tuple(theirs[name]["shape"]) == entry.shape and case[entry.begin : entry.end] == bytes(
                theirs[name]["data"]
            )
        weights = Weights(path)
        for name in weights:
            told(lambda name=name: weights.read(name))
    if mine is not None:
        assert all(np.isfinite(v).all() for v in mine.values())


# ---- zips
MEMBERS = st.sampled_from(
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "a/adapter_config.json",
        "a/adapter_model.safetensors",
        "../evil.json",
        "../../evil.safetensors",
        "/etc/evil.json",
        "C:\\evil.json",
        "a\\..\\..\\evil.safetensors",
        "data.pkl",
        "adapter_model.bin",
        "inner.zip",
        ".hidden.json",
        "a/" * 300 + "x.json",
        "x" * 300 + ".json",
        "con.json",
        "x\0y.json",
        "é.json",
        "lora_lab.json",
        "./adapter_config.json",
        "~/x.json",
        "..",
        "a/..",
        "README.md",
        "link.safetensors",
        "\u202e.json",
    ]
)


@st.composite
def zip_cases(draw: st.DrawFn) -> dict[str, Any]:
    members = []
    for name in draw(st.lists(MEMBERS, max_size=7)):
        what = draw(st.sampled_from(["good", "good", "zeros", "text", "link", "empty"]))
        members.append(
            (
                name,
                what,
                draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])),
            )
        )
    return {
        "members": members,
        "many": draw(st.sampled_from([0] * 30 + [2500])),
        "bomb": draw(st.integers(0, 99)) == 0,
        "damage": draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3)),
        "cut": draw(st.sampled_from([1.0] * 8 + [0.5, 0.9])),
        "front": draw(st.sampled_from([b""] * 9 + [b"PK\x03\x04junk"])),
        "base": draw(st.one_of(st.none(), TEXTS)),
    }


@cache
def bomb() -> bytes:
    """A zip of 200 kB with a member of 200 MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z, z.open("bomb/model.safetensors", "w") as f:
        for _ in range(200):
            f.write(b"\0" * (1 << 20))
    return out.getvalue()


def zipped(case: dict[str, Any], kit: Kit) -> None:
    from lora_core.foreign import open_any

    folder = kit.fresh()
    (folder / "in").mkdir()
    path, out = folder / "in" / "x.zip", folder / "deep" / "out"
    good = saved(
        {f"{PREFIX}{MODULES[0]}.lora_{p}.weight": np.ones(s, np.float32) for p, s in (("A", (4, 32)), ("B", (32, 4)))}
    )
    if case["bomb"]:
        path.write_bytes(bomb())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as z:
        warnings.simplefilter("ignore")
        for name, what, method in case["members"]:
            info = zipfile.ZipInfo(name[:60_000])
            info.compress_type = method
            data = {
                "good": json.dumps(CONFIG).encode() if name.endswith("json") else good,
                "zeros": b"\0" * 100_000,
                "text": b"hello",
                "link": b"/etc/passwd",
                "empty": b"",
            }[what]
            if what == "link":
                info.create_system, info.external_attr = 3, (0o120777 << 16)
            with suppress(ValueError, UnicodeError):
                z.writestr(info, data)
        for i in range(case["many"]):
            z.writestr(f"m{i}.json", b"{}")
    data = bytearray(case["front"] + path.read_bytes())
    for where, value in case["damage"]:
        if data:
            data[min(len(data) - 1, int(where * len(data)))] = value
    path.write_bytes(bytes(data[: int(case["cut"] * len(data))]))
    opened = told(lambda: open_any(path, scratch=out, base=case["base"]))
    if opened is not None and opened.stored is not None:
        looked_at(opened.stored)
    inside = [p for p in folder.rglob("*") if p != path and p not in (folder / "in", folder / "deep", out)]
    assert all(p.parent == out and p.is_file() and not p.is_symlink() for p in inside), inside
    assert sum(p.stat().st_size for p in inside) < 64 << 20, "a bomb went off"


# ---- models' configurations
@st.composite
def config_cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "change": draw(
            st.dictionaries(
                st.sampled_from(
                    [
                        "model_type",
                        "architectures",
                        "hidden_size",
                        "intermediate_size",
                        "num_hidden_layers",
                        "num_attention_heads",
                        "num_key_value_heads",
                        "head_dim",
                        "vocab_size",
                        "max_position_embeddings",
                        "rope_theta",
                        "rope_scaling",
                        "rope_parameters",
                        "tie_word_embeddings",
                        "hidden_act",
                        "rms_norm_eps",
                        "attention_bias",
                        "torch_dtype",
                        "dtype",
                        "eos_token_id",
                        "pad_token_id",
                        "bos_token_id",
                        "auto_map",
                        "quantization_config",
                        "id2label",
                        "num_labels",
                        "initializer_range",
                        "sliding_window",
                        "layer_types",
                        "attn_implementation",
                        "_attn_implementation",
                        "tokenizer_class",
                        "transformers_version",
                        "use_cache",
                        "is_decoder",
                        "pruned_heads",
                        "chunk_size_feed_forward",
                        "x",
                    ]
                ),
                st.one_of(
                    ANY,
                    NUMBERS,
                    st.sampled_from(
                        [
                            "llama",
                            "gpt2",
                            "bert",
                            "mamba",
                            "t5",
                            "linear",
                            "dynamic",
                            "float16",
                            "gelu",
                            "evil.Model",
                            {"AutoModel": "evil.py--Evil"},
                            {"rope_type": "yarn"},
                            {"rope_type": "x", "factor": 0},
                            ["LlamaForCausalLM"],
                            ["Evil"],
                            {"quant_method": "bitsandbytes"},
                        ]
                    ),
                ),
                min_size=1,
                max_size=3,
            )
        ),
        "text": draw(st.sampled_from([None] * 12 + ["", "[]", "{", "[" * 50_000, "NaN"])),
        "drop": draw(st.sampled_from([None] * 6 + ["model_type", "hidden_size", "vocab_size", "architectures"])),
        "loaded": draw(st.integers(0, 3)) == 0,
    }


def config(case: dict[str, Any], kit: Kit) -> None:
    import lora_core as lc
    from lora_core.models import empty_model

    folder = kit.fresh() / "model"
    shutil.copytree(kit.model_folder, folder)
    told_config = json.loads((folder / "config.json").read_text()) | case["change"]
    told_config.pop(case["drop"], None)
    text = json.dumps(told_config) if case["text"] is None else case["text"]
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    shapes = told(lambda: empty_model(folder))
    if shapes is not None:
        told(lambda: lc.layer_shapes(shapes))
        told(lambda: lc.budget(shapes, lc.LoraSpec(rank=2)))
    if case["loaded"]:
        told(lambda: lc.load_model(folder, dtype="float32"))
