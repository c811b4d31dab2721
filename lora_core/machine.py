"""What this machine is good at: its device, and which number format its matrix products are fastest in.

Machines differ by more than ten times: with AVX512-BF16 or AMX bfloat16 products are two to four times faster than
float32, with AVX2 alone they are ten times slower. So the two are timed, once a machine: forward and backward products
of the shapes that SmolLM2-135M's MLP has. The result is kept in `home()/machine.json`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from lora_core.errors import UserError, unknown
from lora_core.home import home, read_json, write_json

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
TOKENS, IN, OUT = 512, 576, 1536  # x (512, 576), W0 (1536, 576): the up matrix of SmolLM2-135M and 512 tokens
MARGIN = 1.15  # bfloat16 costs precision: it must be this much faster to be chosen
BUDGET_S = 0.4  # time for one dtype; where one round takes longer, it is the warm-up and one round
# The parts of an instruction set that decide how fast matrix products are.
ISA = re.compile(r"^(avx|avx2|fma|avx512f|avx512_bf16|avx512_fp16|amx_tile|amx_bf16|asimd|sve|sve2|bf16|i8mm)$")


def device() -> str:
    """ "cuda", "mps" or "cpu": the fastest that torch can use here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def pick_device(given: str = "auto") -> str:
    """The device to use; raises UserError when torch cannot use the one that was asked for."""
    if given == "auto":
        return device()
    import torch

    kind = given.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise unknown("device", given, ["auto", "cpu", "cuda", "mps"])
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    index = given.partition(":")[2] or "0"
    if not index.isdigit() or int(index) >= count:
        raise UserError(f"no device '{given}' on this machine; possible: auto {device()}")
    return given


def pick_dtype(given: str = "auto", on: str = "auto") -> Dtype:
    """The dtype to use; "auto" is `best_dtype`. float16 is refused: it is slow on a CPU and overflows in training."""
    if given == "auto":
        return best_dtype(on)
    if given not in DTYPES:
        raise unknown("dtype", given, ["auto", *DTYPES])
    return given


def best_dtype(on: str = "auto") -> Dtype:
    """bfloat16 where this machine's own timing says that it is clearly faster, else float32; never float16."""
    import torch

    place = device() if on == "auto" else on
    if place.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if place.startswith("mps"):
        return "float32"  # bfloat16 on MPS depends on the macOS version, and fp32 is exact
    return "bfloat16" if gemm_rate("bfloat16", place) > MARGIN * gemm_rate("float32", place) else "float32"


def gemm_rate(dtype: str = "auto", on: str = "auto") -> float:
    """Floating point operations a second that matrix products reach here, in flop/s (one multiply-add is two).

    Measured once a machine (under 2 s for both dtypes) and kept; a change of chip, threads or torch measures again.
    """
    place = device() if on == "auto" else on
    name = pick_dtype(dtype, place)
    key = json.dumps({**fingerprint(), "device": _device_name(place)}, sort_keys=True)
    return _rates(place, hashlib.sha256(key.encode()).hexdigest()[:16])[name]


def fingerprint() -> dict[str, Any]:
    """What the timings depend on: chip, instruction set (those that matter), threads that torch uses, torch version."""
    import torch

    chip, isa = _chip()
    return {"chip": chip, "isa": list(isa), "threads": _threads(), "torch": torch.__version__}


def peak_bytes(on: str = "cpu") -> int:
    """The most memory that this process has used so far, in bytes: GPU memory on cuda, else resident memory."""
    if on.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(on))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # pyright: ignore[reportAttributeAccessIssue]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if platform.system() == "Darwin" else used * 1024)


def few_heaps() -> None:
    """From now on all threads of this process allocate from two heaps (glibc; elsewhere nothing happens).

    Else it makes up to eight for each processor, and what one thread has freed is of no use to the next: a server whose
    every text has a thread of its own grew by 150 MB over some hundred texts.
    """
    heaps = -8  # the name of mallopt's parameter
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(heaps, 2)


def give_back() -> None:
    """What is free of this process's memory goes back to the system (glibc); some milliseconds."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def keep_heap() -> Iterator[None]:
    """Within the block freed memory stays with this process (glibc; elsewhere nothing happens).

    A training step frees all that it took. glibc gives that back to the system and takes it again page by page, each
    of which the system must clear: some percent of a step on a CPU.
    """
    trim, mmap, pad = -1, -3, -2  # names of mallopt's parameters
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap, 32 << 20)
        libc.mallopt(pad, 64 << 20)
        libc.mallopt(trim, 2**31 - 1)
    except (OSError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        libc.mallopt(pad, 128 << 10)
        libc.mallopt(trim, 64 << 20)
        give_back()


@cache
def _threads() -> int:
    """The threads that torch began with: a page that lends some of them to a training is still the same machine."""
    import torch

    return torch.get_num_threads()


@cache
def _chip() -> tuple[str, tuple[str, ...]]:
    """The processor's name and the parts of its instruction set that decide about speed."""
    with suppress(OSError):  # Linux
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.M)
        flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
        isa = sorted({f for f in flags[1].split() if ISA.match(f)}) if flags else []
        return (name[1].strip() if name else platform.machine()), tuple(isa)
    with suppress(OSError, subprocess.SubprocessError):  # macOS
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        return name, (platform.machine(),)
    return platform.processor() or platform.machine(), (platform.machine(),)


def _device_name(on: str) -> str:
    if on.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(on)
    return on


@lru_cache(maxsize=8)
def _rates(on: str, key: str) -> dict[str, float]:
    """{dtype: flop/s}, from machine.json where it is there, else measured and kept."""
    try:
        file = home() / "machine.json"
    except UserError:  # nowhere to keep it: then it is measured in each process
        file = None
    kept = read_json(file) if file else None
    kept = kept if isinstance(kept, dict) else {}
    entry = kept[key] if isinstance(kept.get(key), dict) else {}
    rates = entry.get("rates")
    known: dict[str, float] = {}
    if isinstance(rates, dict) and all(isinstance(rates.get(d), int | float) and rates[d] > 0 for d in DTYPES):
        known = {d: float(rates[d]) for d in DTYPES}
        if not entry.get("busy"):
            return known
    busy = _busy()
    # A rate that was taken while others worked is taken again; the better one counts.
    measured = {d: max(measure(d, on), known.get(d, 0.0)) for d in DTYPES}
    if file:
        with suppress(OSError):
            told = {"device": _device_name(on), "rates": measured, "busy": busy, "measured": int(time.time())}
            write_json(file, {**kept, key: {**fingerprint(), **told}})
    return measured


def _busy() -> bool:
    """Whether other programs kept more than half of the processors during the last minute."""
    try:
        return os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows
        return False


def measure(dtype: str, on: str = "cpu", seconds: float = BUDGET_S) -> float:
    """Times y = x·W0ᵀ and its backward dx = dy·W0, in flop/s. Takes about `seconds`.

    The best of many short rounds counts, since whatever else runs on the machine can only make a round slower.
    """
    import torch

    number = getattr(torch, dtype)
    x = torch.randn(TOKENS, IN, device=on).to(number)  # (tokens, in)
    weight = torch.randn(OUT, IN, device=on).to(number)  # (out, in)
    sync = torch.cuda.synchronize if on.startswith("cuda") else (torch.mps.synchronize if on == "mps" else lambda: None)

    def once() -> float:
        start = time.perf_counter()
        y = torch.nn.functional.linear(x, weight)  # (tokens, out)
        torch.mm(y, weight)  # (tokens, in)
        sync()
        return time.perf_counter() - start

    with torch.inference_mode():
        deadline = time.perf_counter() + seconds
        once()  # the first product also picks kernels and wakes threads
        best = once()
        while time.perf_counter() < deadline:
            best = min(best, once())
    return 2 * 2 * TOKENS * IN * OUT / best


def threads() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
