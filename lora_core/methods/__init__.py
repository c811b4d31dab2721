"""What LoRA is compared with (section 5.1 of the paper): every method is a LoraSpec, so that all of them are attached,
trained, measured, priced, saved and loaded in the same way.

    adapter = lc.attach(model, method_spec("bottleneck", 16))
    method_spec("bottleneck", size_for(model, "bottleneck", trainable=500_000))

Full fine-tuning, the last layers and BitFit train copies of the model's own parameters (`Copies` in swaps.py);
bottleneck.py and prefix.py hold the two that add something new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_core.errors import UserError, unknown
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fine-tune.

    title   for people; about: what is trained, and who proposed it
    size    what its size counts, None where it has none; usual: the size unless told
    lr      a learning rate to begin with
    make    size -> spec
    """

    name: str
    title: str
    about: str
    size: str | None
    usual: int
    lr: float
    make: Callable[[int], LoraSpec]


def _only(**fields: Any) -> LoraSpec:
    """A spec without factors."""
    return LoraSpec(targets=(), **fields)


METHODS = {
    m.name: m
    for m in (
        Method(name="full", title="full fine-tuning", size=None, usual=0, lr=1e-4,
               about="every parameter", make=lambda n: _only(full=("all",))),
        Method(name="last-layer", title="last layers", size="layers", usual=1, lr=3e-4,
               about="the last layers in full, the others frozen", make=lambda n: _only(full=(f"top{n}",))),
        Method(name="bitfit", title="BitFit", size=None, usual=0, lr=3e-3,
               about="every bias vector (Zaken et al., arXiv 2106.10199)", make=lambda n: LoraSpec(targets=("bias",))),
        Method(name="bottleneck", title="adapter layers", size="units", usual=16, lr=1e-3,
               about="small new layers behind attention and MLP (Houlsby et al., arXiv 1902.00751)",
               make=lambda n: _only(bottleneck=n)),
        Method(name="prefix", title="prefix tuning", size="tokens", usual=8, lr=1e-2,
               about="keys and values before the text, in every layer (Li & Liang, arXiv 2101.00190)",
               make=lambda n: _only(prefix=n)),
        Method(name="lora", title="LoRA", size="rank", usual=8, lr=1e-3,
               about="a low-rank update of q and v (Hu et al., arXiv 2106.09685)",
               make=lambda n: LoraSpec(targets=("q", "v"), rank=n)),
        Method(name="lora-prefix", title="LoRA and a prefix", size="rank and tokens", usual=4, lr=1e-3,
               about="both together, as the paper says that they can be (its appendix E)",
               make=lambda n: LoraSpec(targets=("q", "v"), rank=n, prefix=n)),
    )
}  # fmt: skip

# No method that the paper compares LoRA with, and younger than it: the page offers it beside them.
DORA = Method(name="dora", title="DoRA", size=None, usual=8, lr=1e-3,
              about="LoRA that trains the lengths of W's rows by themselves (Liu et al., arXiv 2402.09353)",
              make=lambda n: LoraSpec(targets=("q", "v"), rank=n, dora=True))  # fmt: skip


def method_spec(name: str, size: int | None = None) -> LoraSpec:
    """The spec of a method; size: units of a bottleneck, tokens of a prefix, rank, layers; None for the usual one.

    Raises UserError for an unknown method, and for a size that it has not.
    """
    if name not in METHODS:
        raise unknown("method", str(name), METHODS)
    m = METHODS[name]
    if size is not None and m.size is None:
        raise UserError(f"{m.title} trains what it trains: it has no size")
    return m.make(m.usual if size is None else _whole(size))


def size_for(model: nn.Module, name: str, trainable: int) -> int:
    """The size with which a method trains the number of parameters nearest to `trainable`; at least 1.

    All methods that have a size grow by as much for each unit of it. Raises UserError for one that has none, and where
    the model cannot have the size.
    """
    from lora_core.budget import budget

    if name in METHODS and METHODS[name].size is None:
        raise UserError(f"{METHODS[name].title} trains what it trains: it has no size")
    one = budget(model, method_spec(name, 1)).trainable
    each = budget(model, method_spec(name, 2)).trainable - one
    size = max(1, round((trainable - one) / each) + 1)
    budget(model, method_spec(name, size))
    return size


def _whole(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"size is {size!r}; it is a whole number from 1")
    return size
