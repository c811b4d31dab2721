"""Training against Trainer with PEFT: time, memory, loss; a step against the machine's own products; a cold start.

python -m benchmarks.bench_training [rows of this file …] [--repeats 3]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.kit import DATA, MODEL, Peak, child, record

ALL = ("q", "k", "v", "o", "gate", "up", "down")
NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj",
         "down": "down_proj"}  # fmt: skip
LABELS = ("negative", "positive")


# ---- one side, in a process of its own -------------------------------------------------------------------------------
def side(which: str, dtype: str, targets: str, rank: int, steps: int, batch: int = 8) -> dict[str, Any]:
    """Train SmolLM2 on the E2E file; {seconds, peak_bytes, held_loss, tokens}."""
    import lora_core as lc
    from lora_core.objective import CausalLM

    names = ALL if targets == "all" else tuple(targets.split(","))
    task = lc.load_data(DATA / "e2e_valid.txt")
    model, tokenizer = lc.load_model(MODEL, dtype=dtype)
    for p in model.parameters():  # the file is mapped: its pages become resident when they are first read
        p.detach().sum()
    objective = CausalLM(model, tokenizer, task.template)
    alpha = 2.0 * rank
    if which == "ours":
        with Peak() as peak:
            adapter = lc.attach(model, lc.LoraSpec(targets=names, rank=rank, alpha=alpha))
            at = time.perf_counter()
            events = list(lc.train(adapter, task, lc.TrainConfig(steps=steps, eval_rows=0)))
            took = time.perf_counter() - at
        each = events[-1].train_s / steps
    else:
        from benchmarks import peer

        rows = [
            {"input_ids": e.ids, "labels": [-100] * e.start + e.ids[e.start :]} for e in objective.encode(task.train)
        ]
        with Peak() as peak:
            theirs = peer.peft_model(model, [NAMES[n] for n in names], rank, alpha)
            took = peer.train(theirs, tokenizer, rows, steps=steps, batch=batch, lr=1e-3, bf16=dtype == "bfloat16")
        each = took / steps
        if steps == 1:  # for its time alone: the first step of a warm-up has rate 0
            return {"seconds": took, "step_s": each, "peak_bytes": peak.bytes, "held_loss": 0.0}
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            model, tokenizer = lc.load_model(MODEL, dtype=dtype)
            adapter = lc.load_adapter(model, folder, name="default")
    held = lc.evaluate(model, tokenizer, task.test[:: max(1, len(task.test) // 64)], template=task.template,
                       adapters=[adapter.name])[adapter.name]  # fmt: skip
    return {"seconds": took, "step_s": each, "peak_bytes": peak.bytes, "held_loss": held.loss}


def encoder_side(which: str, steps: int) -> dict[str, Any]:
    """Train MiniLM with a head on SST-2, q,v, r=8, batch 32; {seconds, accuracy}."""
    import lora_core as lc

    train, test = (lc.load_data(DATA / f"sst2_{n}.tsv") for n in ("train", "dev"))
    task = lc.load_data(DATA / "sst2_train.tsv")
    rows = (*train.train, *train.test)
    held = (*test.train, *test.test)
    names = tuple(sorted({r.completion for r in rows}))
    model, tokenizer = lc.load_model("minilm", labels=names)
    full = ("head", *(p for p in ("bert.pooler",) if any(n.startswith(p) for n in model.lora_lab.drawn)))
    if which == "ours":
        import dataclasses

        task = dataclasses.replace(task, train=rows, test=())
        adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16, full=full))
        at = time.perf_counter()
        list(lc.train(adapter, task, lc.TrainConfig(steps=steps, batch_size=32, eval_rows=0), objective="classify"))
        took = time.perf_counter() - at
    else:
        from benchmarks import peer

        number = {n: i for i, n in enumerate(names)}
        ids = tokenizer([r.prompt for r in rows], truncation=True, max_length=256)["input_ids"]
        data: list[Any] = [{"input_ids": i, "labels": number[r.completion]} for i, r in zip(ids, rows, strict=True)]
        model = peer.peft_model(model, ("query", "value"), 8, 16, "SEQ_CLS")
        took = peer.train(model, tokenizer, data, steps=steps, batch=32, lr=1e-3, labels=False)
    import torch

    right = 0
    model.eval()
    with torch.no_grad():
        for i in range(0, len(held), 64):
            part = held[i : i + 64]
            batch = tokenizer(
                [r.prompt for r in part], return_tensors="pt", padding=True, truncation=True, max_length=256
            )
            right += sum(names[k] == r.completion
                         for k, r in zip(model(**batch).logits.argmax(-1).tolist(), part, strict=True))  # fmt: skip
    return {"seconds": took, "accuracy": right / len(held)}


def step_side(rank: int, steps: int) -> dict[str, Any]:
    """Our steps, and between them the plain products of the same batch: 4·P·T of the body, and the head."""
    import torch

    import lora_core as lc
    from lora_core.objective import CausalLM, endless

    task = lc.load_data(DATA / "e2e_valid.txt")
    model, tokenizer = lc.load_model(MODEL)
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=rank, alpha=16))
    objective = CausalLM(model, tokenizer, task.template)
    items = objective.encode(task.train)
    order = endless([len(e) for e in items], 8, 0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, fused=True)
    weights = [m.weight for n, m in model.named_modules() if hasattr(m, "in_features") and "lm_head" not in n]
    head = model.get_output_embeddings().weight
    model.train()

    def ideal(batch: Any) -> float:
        x = {w.shape[1]: torch.randn(batch.tokens, w.shape[1], dtype=w.dtype) for w in weights}
        g = {w.shape[0]: torch.randn(batch.tokens, w.shape[0], dtype=w.dtype) for w in weights}
        h, p = torch.randn(batch.labelled, head.shape[1], dtype=head.dtype), None
        at = time.perf_counter()
        with torch.no_grad():
            for w in weights:
                torch.mm(x[w.shape[1]], w.T)
            p = torch.mm(h, head.T)
            torch.mm(p, head)
            for w in weights:
                torch.mm(g[w.shape[0]], w)
        return time.perf_counter() - at

    ours, bare, tokens = [], [], []
    for i in range(steps + 3):
        batch = objective.batch([items[k] for k in next(order)])
        at = time.perf_counter()
        (objective.loss(batch) / batch.labelled).backward()
        torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        took = time.perf_counter() - at
        least = ideal(batch)
        if i >= 3:
            ours.append(took)
            bare.append(least)
            tokens.append(batch.tokens)
    return {"ours": ours, "products": bare, "tokens": statistics.mean(tokens)}


# ---- rows ------------------------------------------------------------------------------------------------------------
def against_peer(row: str, what: str, targets: str, rank: int, steps: int, repeats: int, reach: float) -> None:
    """Ours and the peer in turn, each in the dtype that this machine multiplies faster in; the peer once in the other
    one too, from a part of the work, since it can take ten times as long."""
    from lora_core.machine import DTYPES, best_dtype, gemm_rate

    args, dtype = (targets, str(rank)), best_dtype()
    other = next(d for d in DTYPES if d != dtype)
    part = (1, 1) if gemm_rate(other) < gemm_rate(dtype) / 5 else (max(1, steps // 6), 8)
    got: dict[str, list[dict[str, Any]]] = {"ours": [], dtype: [], other: []}
    for i in range(repeats):
        got["ours"].append(child("benchmarks.bench_training", "--side", "ours", dtype, *args, str(steps)))
        got[dtype].append(child("benchmarks.bench_training", "--side", "peer", dtype, *args, str(steps)))
        if i == 0:
            one = child("benchmarks.bench_training", "--side", "peer", other, *args, *map(str, part))
            one["seconds"] *= steps / part[0] * 8 / part[1]
            got[other].append(one)
    best = min((dtype, other), key=lambda n: got[n][0]["seconds"])
    label = {"ours": "ours", dtype: f"PEFT in {dtype}", other: f"PEFT in {other}"}
    values = {label[name]: [d["seconds"] for d in v] for name, v in got.items()}
    more: dict[str, Any] = {
        "held_loss": {n: statistics.median(d["held_loss"] for d in v) for n, v in got.items() if n != other},
        "ours_in": dtype,
        f"{other}_from": f"{part[0]} of {steps} steps, {part[1]} of 8 rows",
    }
    record(row, what, values, peer=label[best], unit="s", reach=reach, more=more)
    if row == "training":
        peaks = {label[n]: [d["peak_bytes"] / 1e6 for d in v] for n, v in got.items()}
        record("memory", "peak resident above the loaded model while training, " + what, peaks, peer=label[best],
               unit="MB",
               reach=0.6, at_least=False)  # fmt: skip


def cold(repeats: int) -> None:
    from lora_core.models import find

    folder = find(MODEL)[0]
    data = DATA / "e2e_valid.txt"
    values: dict[str, list[float]] = {"ours": [], "PEFT script": []}
    import subprocess

    with tempfile.TemporaryDirectory() as tmp:
        for i in range(repeats):
            ours = [str(Path(sys.executable).parent / "lora-lab"), "train", "--model", MODEL, "--data", str(data),
                    "--steps", "20", "--eval-rows", "0", "--out", f"{tmp}/o{i}", "--json"]  # fmt: skip
            peer = [sys.executable, "-m", "benchmarks.peer", str(data), f"{tmp}/p{i}", "20", str(folder)]
            for name, command in (("ours", ours), ("PEFT script", peer)):
                at = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                values[name].append(time.perf_counter() - at)
    what = "command typed to adapter saved, E2E, q,v, r=8, 20 steps, nothing measured"
    record("cold start", what, values, peer="PEFT script", unit="s",
           reach=1.8)  # fmt: skip


def run(only: list[str], repeats: int) -> None:
    def wanted(name: str) -> bool:
        return not only or name in only

    if wanted("training"):
        against_peer("training", "SmolLM2-135M, E2E, q,v, r=8, 60 steps of 8", "q,v", 8, 60, repeats, 2.0)
    if wanted("step"):
        got = child("benchmarks.bench_training", "--side", "step", "8", "20")
        record("step", f"a step of {got['tokens']:.0f} tokens against the products alone", {
            "ours": got["ours"], "products": got["products"]}, peer="products", unit="s", reach=1.3,
            at_least=False)  # fmt: skip
    if wanted("training all"):
        against_peer(
            "training all", "SmolLM2-135M, E2E, all seven matrices, r=16, 20 steps of 8", "all", 16, 20, repeats, 1.8
        )
    if wanted("encoder"):
        values: dict[str, list[float]] = {"ours": [], "PEFT": []}
        accuracy: dict[str, float] = {}
        for _ in range(repeats):
            for name in values:
                one = child(
                    "benchmarks.bench_training", "--side", "encoder", "ours" if name == "ours" else "peer", "100"
                )
                values[name].append(one["seconds"])
                accuracy[name] = one["accuracy"]
        record("encoder", "MiniLM, SST-2, q,v, r=8, batch 32, 100 steps", values, peer="PEFT", unit="s", reach=2.0,
               more={"accuracy": accuracy})  # fmt: skip
    if wanted("cold start"):
        cold(repeats)


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["--side"]:
        kind, *rest = given[1:]
        if kind == "step":
            out = step_side(int(rest[0]), int(rest[1]))
        elif kind == "encoder":
            out = encoder_side(rest[0], int(rest[1]))
        else:
            out = side(kind, rest[0], rest[1], *(int(r) for r in rest[2:]))
        print(json.dumps(out))
    else:
        count = int(given[given.index("--repeats") + 1]) if "--repeats" in given else 3
        run([a for a in given if a not in ("--repeats", str(count))], count)
