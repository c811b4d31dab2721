"""Which models there are, and how one is loaded: embedded in a package, a local folder, or from the hub.

Rules: weights come from safetensors only, code that comes with a model is never run, and nothing is fetched that is
already here. torch and transformers are imported when a model is loaded, not before.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lora_core import embedded, hub
from lora_core.errors import UserError, nearest, unknown
from lora_core.home import read_json

Kind = Literal["causal-lm", "encoder"]
Source = Literal["embedded", "hub", "folder"]
DEFAULT = "smollm2-135m"
ENCODERS = ("bert", "roberta", "electra", "distilbert", "mpnet", "albert", "deberta-v2")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One line of the list of models.

    parameters  how many numbers the model has; tied weights count once
    source      where it comes from: "embedded" (a Python package) or "hub"
    cached      whether it is on this machine, so that loading it needs no network
    hub_id      its name on the hub, or None
    """

    name: str
    parameters: int
    source: Source
    cached: bool
    kind: Kind
    about: str
    hub_id: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What `load_model` notes on the model as `model.lora_lab`.

    name    by which `load_model` finds it again: a registry name, a hub id, or a folder's absolute path
    folder  where its files are
    labels  of a model with a classification head: their names, in the order of the logits; else empty
    drawn   parameters that the files lack and that were drawn at random: a new head's
    """

    name: str
    tokenizer: Any
    source: Source
    kind: Kind
    folder: Path
    labels: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()


# name: (hub id, parameters, kind, about)
_LIST: dict[str, tuple[str, int, Kind, str]] = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, "causal-lm",
                     "the default: small, follows instructions, comes inside a Python package"),
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2", 22_713_216, "encoder",
               "a small BERT encoder for classification, comes inside a Python package"),
    "distilgpt2": ("distilbert/distilgpt2", 81_912_576, "causal-lm", "GPT-2 with half of its layers"),
    "gpt2": ("openai-community/gpt2", 124_439_808, "causal-lm", "GPT-2 small, the paper's family"),
    "pythia-70m": ("EleutherAI/pythia-70m", 70_426_624, "causal-lm", "GPT-NeoX family, the smallest of the list"),
    "pythia-160m": ("EleutherAI/pythia-160m", 162_322_944, "causal-lm", "GPT-NeoX family"),
    "pythia-410m": ("EleutherAI/pythia-410m", 405_334_016, "causal-lm", "GPT-NeoX family"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, "causal-lm",
                     "the default's bigger sibling, follows instructions"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", 494_032_768, "causal-lm", "many languages"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", 596_049_920, "causal-lm", "many languages, can reason step by step"),
    "opt-125m": ("facebook/opt-125m", 125_239_296, "causal-lm", "a GPT-3 look-alike"),
}  # fmt: skip


def registry() -> list[ModelEntry]:
    """The models that have a name here. `cached` is found out without network."""
    entries = []
    for name, (hub_id, parameters, kind, about) in _LIST.items():
        inside = name in embedded.WHEELS
        cached = embedded.is_kept(name) if inside else hub.cached_folder(hub_id) is not None
        source: Source = "embedded" if inside else "hub"
        entries.append(ModelEntry(name=name, parameters=parameters, source=source, cached=cached, kind=kind,
                                  about=about, hub_id=hub_id))  # fmt: skip
    return entries


def load_model(name: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto",
               labels: Sequence[str] | None = None) -> tuple[Any, Any]:  # fmt: skip
    """(model, tokenizer), ready for inference or for `attach`; notes a ModelInfo as `model.lora_lab`.

    name    a name of `registry()`, a local folder (config.json and safetensors), or a hub id "owner/name"
    device  "auto" (cuda, else mps, else cpu) or a device of torch
    dtype   "auto" (what this machine's own timing says is fastest), "float32" or "bfloat16"
    labels  names of at least two labels: the model then has a classification head for them in place of its own. A head
            that the files lack is drawn at random, the same bits every time: LoraSpec(full=("head",)) trains it

    A causal language model, or for an encoder the bare encoder. Weights in safetensors only; never remote code.
    Raises UserError for a name that is nothing of these, and for a model that cannot be had or read.
    """
    from lora_core.machine import pick_device, pick_dtype

    where = pick_device(device)  # wrong settings are told before anything is fetched
    number = pick_dtype(dtype, where)
    names = _labels(labels) if labels is not None else ()  # in the order of the logits once the model is there
    folder, known_as, source = find(name)
    model, tokenizer, kind, drawn = load_folder(folder, dtype=number, name=known_as, labels=names)
    if where != "cpu":
        model.to(where)
    model.eval()
    names = tuple(model.config.id2label[i] for i in range(len(names)))
    model.lora_lab = ModelInfo(name=known_as, tokenizer=tokenizer, source=source, kind=kind, folder=folder,
                               labels=names, drawn=drawn)  # fmt: skip
    return model, tokenizer


def empty_model(name: str | os.PathLike[str], *, dtype: str = "auto", labels: int | None = None) -> Any:
    """The model's shapes without its weights (on torch's meta device): enough for `budget` and `layer_shapes`.

    labels: how many a classifier has, which then has a head for them. Takes milliseconds and no memory, whatever the
    model's size. Errors as in `load_model`.
    """
    from lora_core.machine import pick_dtype

    number = pick_dtype(dtype)
    folder, known_as, _ = find(name)
    _kind(_config(folder, known_as), known_as, classifies=bool(labels))
    import torch
    from transformers import AutoConfig

    from lora_core.budget import meta_model

    with _told(known_as):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return meta_model(config, labels=labels, dtype=getattr(torch, number))


def find(name: str | os.PathLike[str]) -> tuple[Path, str, Source]:
    """(folder, name to note, source) of a model; fetched first where that is needed. Errors as in `load_model`."""
    text = os.fspath(name).strip()
    if not text:
        raise UserError(f"no model named; possible: {' '.join(_LIST)}, a local folder, or a hub id such as owner/name")
    entry = next((n for n in _LIST if n == text.casefold()), None)
    if entry in embedded.WHEELS:
        return embedded.fetch(entry), entry, "embedded"
    if entry:
        return hub.download(_LIST[entry][0], _at_hand()), entry, "hub"
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder, str(folder.resolve()), "folder"
    if folder.exists():
        raise UserError(f"model '{text}' is a file; a model is a folder with config.json and safetensors")
    if text.startswith((".", "/", "~")) or "\\" in text or not hub.HUB_ID.match(text):
        if text.startswith((".", "/", "~")) or "/" in text or "\\" in text:
            raise UserError(f"no model folder '{text}'; possible: {' '.join(_LIST)}, or a folder that is there")
        raise unknown("model", text, _LIST)
    meant = next((n for n, known in _LIST.items() if known[0].casefold() == text.casefold()), None)
    if meant in embedded.WHEELS:
        return embedded.fetch(meant), meant, "embedded"
    return hub.download(text, _at_hand()), text, "hub"


def kind_of(name: str | os.PathLike[str]) -> Kind:
    """Whether a model writes text or is an encoder, from its config. Errors as in `load_model`."""
    folder, known_as, _ = find(name)
    return _kind(_config(folder, known_as), known_as, classifies=True)


def load_folder(
    folder: Path, *, dtype: str, name: str | None = None, labels: Sequence[str] = ()
) -> tuple[Any, Any, Kind, tuple[str, ...]]:
    """(model, tokenizer, kind, parameters drawn at random) from a folder in transformers' format, on the CPU.

    `name` is for error messages; `labels` as in `load_model`.
    """
    name = name or str(folder)
    config = _config(folder, name)
    kind = _kind(config, name, classifies=bool(labels))
    if fault := hub.missing_weights(folder):
        raise UserError(f"model '{name}' cannot be loaded: {fault}")
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from lora_core.quiet import quiet
    from lora_core.starts import seeded

    build: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModel
    plain: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    head: dict[str, Any] = {}
    if labels:
        build, own = AutoModelForSequenceClassification, config.get("id2label")
        own = list(map(str, own.values())) if isinstance(own, dict) else []
        labels = own if sorted(own) == sorted(labels) else labels  # a trained head has its labels in its own order
        head = {"num_labels": len(labels), "id2label": dict(enumerate(labels)),
                "label2id": {label: i for i, label in enumerate(labels)}}  # fmt: skip
    with _told(name), quiet(), seeded(0):
        # "sdpa", torch's fused attention, is transformers' own choice wherever a model's class supports it
        model, report = build.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **plain, **head
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **plain)
    body = f"{model.base_model_prefix}." if labels else ""
    lacking = sorted(report["missing_keys"])
    drawn = tuple(k for k in lacking if labels and not k.startswith(body)
                  or kind == "encoder" and k.startswith(f"{body}pooler."))  # fmt: skip
    if missing := [k for k in lacking if k not in drawn]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model '{name}' cannot be loaded: its weights lack {missing[0]}{more}")
    _complete(tokenizer, config)
    if labels and model.config.pad_token_id is None:  # a decoder's head reads the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, kind, drawn


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Files that make no model end in one sentence; what transformers raises for them may be anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model '{name}' cannot be loaded: {_first_line(error)}") from error


def _labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Names of labels, checked."""
    if isinstance(labels, str) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise UserError(f'labels are {labels!r}; give their names, as in labels=("negative", "positive")')
    twice = next((a for a, b in itertools.pairwise(sorted(labels)) if a == b), None)
    if twice is not None:
        raise UserError(f"label '{twice}' is given twice; every label has a name of its own")
    if len(labels) < 2:
        raise UserError(f"{len(labels)} label{'s' if not labels else ''} given; a classifier needs at least two")
    return tuple(labels)


def _at_hand() -> list[str]:
    """Names that need no hub."""
    return [entry.name for entry in registry() if entry.cached or entry.source == "embedded"]


def _config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(f"'{name}' is an adapter, not a model; name the model that it belongs to")
        raise UserError(f"'{name}' is no model folder: there is no config.json in it")
    if (folder / "adapter_config.json").exists():  # transformers would load both, and the adapter's base from the hub
        raise UserError(f"'{name}' holds a model and an adapter in one folder; keep them apart")
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"model '{name}' cannot be loaded: its config.json is not a JSON object")
    return config


def _kind(config: dict[str, Any], name: str, classifies: bool = False) -> Kind:
    """Causal language model or encoder; a UserError for a model that is neither, or that needs its own code.

    classifies: its own head does not matter, since it gets one for labels
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    model_type = str(config.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            own = f"model '{name}' needs code that comes with it (model_type '{model_type}')"
            raise UserError(f"{own}; LoRA Lab never runs such code")
        meant = nearest(model_type, CONFIG_MAPPING.keys())
        hint = f" (did you mean '{meant}'?)" if meant and model_type else ""
        raise UserError(f"model '{name}' has model_type '{model_type}', which transformers does not know{hint}")
    if config.get("quantization_config"):
        raise UserError(f"model '{name}' is stored quantised; LoRA Lab needs its weights as plain numbers")
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise UserError(f"model '{name}' cannot be loaded: its config.json's architectures are no list of names")
    if model_type in ENCODERS:
        return "encoder"
    writes = not names or any("LM" in str(n) or n == CAUSAL.get(model_type) for n in names)
    if model_type in CAUSAL and (classifies or writes):
        return "causal-lm"
    what = f" ({names[0]})" if names else ""
    needed = "a causal language model or a BERT-like encoder is needed"
    raise UserError(f"model '{name}' is a {model_type} model{what}; {needed}")


def _complete(tokenizer: Any, config: dict[str, Any]) -> None:
    """An end-of-text token and a padding token, which training and batches need; some tokenizers name neither."""
    if tokenizer.eos_token is None:
        ids = config.get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
