"""Fuzzed adapters: folders in PEFT's format, and single files by kohya's and diffusers' names."""

from __future__ import annotations

import json
import math
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz_files import KINDS, MODULES, PREFIX, SHAPES, Kit, strange
from tests.fuzz_values import ANY, NUMBERS, TEXTS, changed
from tests.fuzz_watch import told

# ---- adapters' folders
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "base_model_name_or_path": "x",
    "task_type": "CAUSAL_LM",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "layer_replication": None,
    "target_parameters": None,
    "inference_mode": True,
}
EVIL = st.sampled_from(
    [
        "(a|a)*$",
        "(a+)+b",
        "(.*)*x",
        "a?" * 60 + "a" * 60,
        "(a|a)" * 30 + "b",
        ".*.*.*.*.*x",
        ".*" * 4 + "x",
        "(?:.*a){12}",
        "[" * 500,
        "a{1,99999}",
        "a{99999999999}",
        "(?P<n>a)(?P=n)",
        "\\1",
        "(?i)q_proj",
        "(?<=a)b",
        "q_proj|v_proj",
        ".*q_proj",
        "model\\.layers\\.\\d+\\.self_attn\\.(q|v)_proj",
        "all-linear",
        "((((((((a))))))))*",
        "x" * 5000,
        "(?#" * 50,
        "\\",
        "(",
        "^",
        "(\\w+\\.)*q",
        "([a-z]+)*_",
        "a|b|" * 300,
        "[^" + "a" * 900 + "]*" * 4,
        "(?=.*){9}",
        "\\d{3}" * 300,
        "(a?){40}b",
    ]
)
EVIL_OR = st.one_of(EVIL, st.text(alphabet=".*+?()|[]{}^$\\adq_x02,", max_size=30))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    kind = draw(st.sampled_from([np.float32, np.float16, np.float64, np.int32, np.float32]))
    for module, (rows, cols) in SHAPES.items():
        if draw(st.integers(0, 9)) == 0:
            continue
        r = draw(st.sampled_from([4, 4, 4, 4, 1, 0, 64, 500]))
        A, B = (np.full(s, 0.5, kind) for s in ((r, cols), (rows, r)))
        if draw(st.integers(0, 9)) == 0:
            A = A * kind(draw(st.sampled_from([math.nan, math.inf, 0.0]))) if kind != np.int32 else A
        if draw(st.integers(0, 9)) == 0:
            B = B.reshape(draw(st.sampled_from([(-1,), (1, *B.shape), B.shape[::-1]])))
        name = draw(
            st.sampled_from([module] * 6 + [f"{module}.base_layer", "a" * 30, "a" * 3000, "9" * 5000, "x." * 400, ""])
        )
        prefix = draw(st.sampled_from([PREFIX] * 8 + ["", "model."]))
        out[f"{prefix}{name}.lora_A.weight"], out[f"{prefix}{name}.lora_B.weight"] = A, B
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(
            st.sampled_from(
                [
                    f"{PREFIX}lm_head.weight",
                    f"{PREFIX}{MODULES[0]}.lora_magnitude_vector",
                    "x",
                    "\0",
                    "é",
                    f"{PREFIX}{MODULES[0]}.lora_embedding_A",
                    f"{PREFIX}model.embed_tokens.lora_embedding_A",
                    f"{PREFIX}{MODULES[0]}.bias",
                    "lora_A.weight",
                    "٣.lora_A.weight",
                ]
            )
        )
        out[name] = np.ones(draw(st.sampled_from([(32,), (4, 32), (0,), (), (1, 1, 1)])), kind)
    return out


@st.composite
def adapter_cases(draw: st.DrawFn) -> dict[str, Any]:
    config = draw(changed(CONFIG))
    if draw(st.integers(0, 3)) == 0:
        config["target_modules"] = draw(st.one_of(EVIL_OR, st.lists(EVIL_OR, max_size=3)))
    for name in ("rank_pattern", "alpha_pattern"):
        if draw(st.integers(0, 5)) == 0:
            config[name] = draw(st.dictionaries(EVIL_OR, st.one_of(st.just(4), NUMBERS), max_size=4))
    text = (
        json.dumps(config)
        if draw(st.integers(0, 9))
        else draw(st.sampled_from(["", "{", "[]", "[" * 100_000, "NaN", "{}", '{"r":1,"r":2}']))
    )
    lab = draw(
        st.one_of(
            st.none(),
            st.none(),
            st.none(),
            changed(
                {
                    "spec": {"rank": 4},
                    "sites": [
                        {"path": MODULES[0], "key": MODULES[0], "target": "q", "layer": 0, "rank": 4, "scaling": 2.0}
                    ],
                    "info": {},
                }
            ),
        )
    )
    return {
        "config": text,
        "lab": lab,
        "tensors": draw(tensors()),
        "kind": draw(KINDS),
        "weights": draw(st.sampled_from(["safetensors"] * 12 + ["bin", "both", "text", "torn"])),
    }


def adapter(case: dict[str, Any], kit: Kit) -> None:
    import lora_core as lc
    from lora_core.compress import Plan
    from lora_core.foreign import open_any

    folder = kit.fresh()
    (folder / "adapter_config.json").write_text(case["config"], encoding="utf-8", errors="surrogatepass")
    if case["lab"] is not None:
        (folder / "lora_lab.json").write_text(json.dumps(case["lab"]), encoding="utf-8")
    data = saved(case["tensors"])
    if case["weights"] in ("bin", "both"):
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Path("x")))
    if case["weights"] not in ("bin",):
        data = b"not weights" if case["weights"] == "text" else data[:-3] if case["weights"] == "torn" else data
        strange(folder / "adapter_model.safetensors", case["kind"], data)
    stored = told(lambda: lc.read_adapter(folder)) if hasattr(lc, "read_adapter") else told(lambda: read(folder))
    opened = told(lambda: open_any(folder))
    if opened is not None and opened.stored is not None:
        looked_at(opened.stored)
    if stored is None:
        return
    assert case["weights"] != "bin", "a pickle was read"
    told(lambda: Plan(stored).size(Plan(stored).most))
    attached = told(lambda: lc.load_adapter(kit.model, folder, "case", allow_zero=True))
    if attached is not None:
        attached.detach()


def read(folder: Path) -> Any:
    from lora_core.files import read_adapter

    return read_adapter(folder)


def looked_at(stored: Any) -> None:
    """The spectra as the page shows them: finite, in order, and with a word for each."""
    import lora_core as lc
    from lora_core.audit import audit_spectra

    found = told(lambda: dict(lc.spectra(stored)))
    for s in (found or {}).values():
        sigma = np.array(s.singular_values)
        assert np.isfinite(sigma).all() and (np.diff(sigma) <= 1e-6 * max(1.0, *sigma, 0.0)).all()
    if found:
        told(lambda: audit_spectra(found))


def saved(given: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of any names, written by hand."""
    kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64"}
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at, blobs = 0, []
    for name, value in given.items():
        blob = np.ascontiguousarray(value).tobytes()
        entries[name] = {
            "dtype": kinds[str(value.dtype)],
            "shape": list(value.shape),
            "data_offsets": [at, at + len(blob)],
        }
        at += len(blob)
        blobs.append(blob)
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(blobs)


# ---- single files: kohya's and diffusers' names
PATHS = st.sampled_from(
    [
        "lora_unet_down_blocks_0_attentions_0_to_q",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
        "unet.down_blocks.0.attn1.to_q",
        "transformer.blocks.1.ff.net.0.proj",
        "lora_unet_" + "9" * 5000,
        "a",
        f"{PREFIX}{MODULES[0]}",
        "text_encoder.x." + "y_" * 200,
        "",
        ".",
        "lora_te1_" + "_1" * 150,
    ]
)
ENDS = st.sampled_from(
    [
        ("lora_down.weight", "lora_up.weight"),
        ("lora_A.weight", "lora_B.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("hada_w1_a", "hada_w1_b"),
        ("lora_A.default.weight", "lora_B.default.weight"),
    ]
)


@st.composite
def single_cases(draw: st.DrawFn) -> dict[str, Any]:
    out: dict[str, np.ndarray] = {}
    for _ in range(draw(st.integers(1, 4))):
        path, (down, up) = draw(PATHS), draw(ENDS)
        r, kind = draw(st.sampled_from([2, 4, 0, 5000])), draw(st.sampled_from([np.float32, np.float16, np.int64]))
        more = draw(st.sampled_from([(), (), (1, 1), (3, 3), (0,), (1,) * 6]))
        if draw(st.integers(0, 9)):
            out[f"{path}.{down}"] = np.full((r, 6, *more), draw(st.sampled_from([0, 1, 1, 1])), kind)
        if draw(st.integers(0, 9)):
            out[f"{path}.{up}"] = np.ones((8, draw(st.sampled_from([r, r, r, 3])), *([1] * len(more))), kind)
        if draw(st.booleans()):
            value = (
                draw(st.sampled_from([1, 4, 0, -1, 10**9]))
                if kind == np.int64
                else draw(st.sampled_from([1.0, 0.0, -1.0, math.nan, math.inf, 6e4]))
            )
            out[f"{path}.alpha"] = np.array(value, kind).reshape(draw(st.sampled_from([(), (1,)])))
        if draw(st.integers(0, 5)) == 0:
            out[f"{path}.lora_mid.weight"] = np.ones(draw(st.sampled_from([(2, 2, 3, 3), (4,), (4, 4, 1)])), kind)
    keys = ("ss_network_alpha", "lora_adapter_metadata", "adapter_config", "ss_base_model", "ss_tag_frequency", "x")
    values = st.one_of(
        TEXTS,
        ANY.map(json.dumps),
        st.sampled_from(
            ['{"lora_alpha": 8, "alpha_pattern": {"q": 1e999}}', '{"lora_alpha": NaN, "alpha_pattern": 3}']
        ),
    )
    metadata = draw(st.one_of(st.none(), st.dictionaries(st.sampled_from(keys), values)))
    return {"tensors": out, "metadata": metadata, "kind": draw(KINDS)}


def single(case: dict[str, Any], kit: Kit) -> None:
    from lora_core.foreign import open_any

    path = kit.fresh() / "style.safetensors"
    strange(path, case["kind"], saved(case["tensors"], case["metadata"]))
    opened = told(lambda: open_any(path))
    if opened is not None:
        json.dumps([opened.metadata, opened.remarks, opened.base], allow_nan=False)
        assert opened.stored is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            looked_at(opened.stored)
