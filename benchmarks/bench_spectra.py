"""Spectra of all 210 matrices of SmolLM2: the library against dense SVDs, the command against gradience.

python -m benchmarks.bench_spectra [--repeats 5]
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.kit import MODEL, in_turn, record, seconds

ALL = ("q", "k", "v", "o", "gate", "up", "down")


def run(repeats: int) -> None:
    import torch

    import lora_core as lc

    model, _ = lc.load_model(MODEL)
    for rank in (8, 64):
        adapter = lc.attach(model, lc.LoraSpec(targets=ALL, rank=rank, alpha=16))
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
        deltas = adapter.deltas()
        dense: dict[str, np.ndarray] = {}

        def dense_svd() -> float:
            def work() -> None:
                for key, d in deltas.items():  # noqa: B023
                    dense[key] = torch.linalg.svdvals(d.dense()).numpy()  # noqa: B023

            return seconds(work)

        slow = [dense_svd()]
        quick = in_turn({"ours": lambda: seconds(lambda: lc.spectra(adapter))}, 4 * repeats, 3)["ours"]  # noqa: B023
        # The error is told against dense SVDs in float64; float32's own is larger than what is asked for.
        found = lc.spectra(adapter)
        worst = 0.0
        for key in list(deltas)[::13]:
            want = torch.linalg.svdvals(deltas[key].double().dense()).numpy()[:rank]
            worst = max(worst, float(np.abs(np.asarray(found[key].singular_values) - want).max() / want[0]))
        record(f"spectra r={rank}", f"all singular values, effective ranks and norms of 210 matrices, r={rank}",
               {"ours": quick, "dense": slow * len(quick)}, peer="dense", unit="s", reach=400,
               more={"relative_error": worst, "milliseconds": 1000 * float(np.median(quick)),
                     "milliseconds_reach": 15 if rank == 8 else None})  # fmt: skip
        if rank == 8:
            command(adapter, repeats)
        adapter.detach()


def command(adapter: object, repeats: int) -> None:
    """`lora-lab spectra DIR --json` as typed, cold, against `gradience audit --peft-dir DIR --json`."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)  # type: ignore[attr-defined]
        scripts = Path(sys.executable).parent
        ours = [str(scripts / "lora-lab"), "spectra", folder, "--json"]
        other = [str(scripts / "gradience"), "audit", "--peft-dir", folder, "--json"]
        if importlib.util.find_spec("gradience") is None:
            print(
                "gradience is not installed (pip install --no-deps gradience==0.11.0 rich scipy pyyaml): row left out"
            )
            return

        def go(what: list[str]) -> float:
            at = time.perf_counter()
            done = subprocess.run(what, capture_output=True, text=True, check=True)
            json.loads(done.stdout[done.stdout.index("{") :])  # gradience prints a line before it
            return time.perf_counter() - at

        values = in_turn({"ours": lambda: go(ours), "gradience": lambda: go(other)}, repeats, 1)
    record("spectra command", "the command on an adapter of all 210 matrices, r=8, cold", values, peer="gradience",
           unit="s", reach=4.0)  # fmt: skip


if __name__ == "__main__":
    given = sys.argv[1:]
    run(int(given[given.index("--repeats") + 1]) if "--repeats" in given else 5)
