"""On a CUDA GPU: training against Trainer with PEFT in bfloat16, a sweep against single runs, texts against generate.

python -m benchmarks.bench_gpu [rows of this file …] [--repeats 3] [--model NAME] [--data FOLDER]

Both sides run in one process, in turn. How much of the card's own rate of large matrix products a step reaches stands
beside the training rows: 4 operations for each weight of the body and token, and 4 for each of the head and label.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kit import DATA, MODEL, in_turn, record

RANKS = (1, 2, 4, 8, 16, 64)
NEW = 64


def peak_rate() -> float:
    """Operations a second of a product of three 8192 by 8192 matrices in bfloat16."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(12):
        torch.cuda.synchronize()
        at = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        rates.append(2 * 8192**3 / (time.perf_counter() - at))
    return statistics.median(rates[2:])


def e2e(data: Path) -> Any:
    import lora_core as lc

    return lc.load_data(data / "e2e_valid.txt")


def long_rows(task: Any) -> Any:
    """Rows that are all longer than 256 tokens, so that each has exactly as many: completions one after another."""
    import dataclasses

    texts = [r.completion for r in task.train]
    rows = [dataclasses.replace(task.train[i], completion=" ".join(texts[(i * 7 + k) % len(texts)] for k in range(24)))
            for i in range(min(960, len(texts)))]  # fmt: skip
    return dataclasses.replace(task, train=tuple(rows))


def training(row: str, what: str, task: Any, model_name: str, steps: int, batch: int, repeats: int, reach: float
             ) -> None:  # fmt: skip
    """Ours and the peer, each on a model of its own that is loaded once."""
    import tempfile

    import torch

    import lora_core as lc
    from benchmarks import peer
    from lora_core.objective import CausalLM

    spec = lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16)
    model, tokenizer = lc.load_model(model_name, device="cuda", dtype="bfloat16")
    goal = CausalLM(model, tokenizer, task.template)
    items = goal.encode(task.train)
    held: dict[str, float] = {}
    peaks: dict[str, list[float]] = {"ours": [], "PEFT in bfloat16": []}
    rates: list[float] = []
    held_rows = task.test[:: max(1, len(task.test) // 64)]

    def watched(side: str, work: Callable[[], float]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = work()
        peaks[side].append((torch.cuda.max_memory_allocated() - before) / 1e6)
        return took

    def ours() -> float:
        adapter = lc.attach(model, spec)

        def work() -> float:
            at = time.perf_counter()
            events = list(lc.train(adapter, task, lc.TrainConfig(steps=steps, batch_size=batch, eval_rows=0)))
            took = time.perf_counter() - at
            late = [e for e in events if e.kind == "step"]
            half = late[len(late) // 2]
            rates.append((late[-1].tokens - half.tokens) / (late[-1].train_s - half.train_s))
            return took

        took = watched("ours", work)
        held["ours"] = lc.evaluate(model, tokenizer, held_rows, template=task.template,
                                   adapters=[adapter.name])[adapter.name].loss  # fmt: skip
        adapter.detach()
        return took

    def theirs() -> float:
        other, _ = lc.load_model(model_name, device="cuda", dtype="bfloat16")
        wrapped = peer.peft_model(other, ["q_proj", "v_proj"], 8, 16)

        def work() -> float:
            at = time.perf_counter()
            items = goal.encode(task.train)
            rows = [{"input_ids": e.ids, "labels": [-100] * e.start + e.ids[e.start :]} for e in items]
            read = time.perf_counter() - at
            return read + peer.train(wrapped, tokenizer, rows, steps=steps, batch=batch, lr=1e-3, bf16=True)

        took = watched("PEFT in bfloat16", work)
        with tempfile.TemporaryDirectory() as folder:
            wrapped.save_pretrained(folder)
            adapter = lc.load_adapter(model, folder, name="theirs")
        held["PEFT in bfloat16"] = lc.evaluate(model, tokenizer, held_rows, template=task.template,
                                               adapters=["theirs"])["theirs"].loss  # fmt: skip
        adapter.detach()
        torch.cuda.empty_cache()
        return took

    values = in_turn({"ours": ours, "PEFT in bfloat16": theirs}, repeats, warmup=1)
    peak = peak_rate()
    body = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n)
    head = model.get_output_embeddings().weight.numel()
    share = sum(len(e) - e.start for e in items) / sum(map(len, items))
    rate = statistics.median(rates) * 4 * (body + head * share)
    more = {"held_loss": held, "peak_flops": peak, "tokens_per_s": statistics.median(rates),
            "share_of_peak": rate / peak, "peak_mb": {n: statistics.median(v) for n, v in peaks.items()}}  # fmt: skip
    record(row, what, values, peer="PEFT in bfloat16", unit="s", reach=reach, more=more)
    print(more, flush=True)


def sweep(task: Any, model_name: str, steps: int, repeats: int) -> None:
    """Six ranks on one base against six runs of ours, both without loading."""
    import lora_core as lc

    model, _ = lc.load_model(model_name, device="cuda", dtype="bfloat16")
    config = lc.TrainConfig(steps=steps)
    specs = {f"r{r}": lc.LoraSpec(targets=("q", "v"), rank=r, alpha=2 * r) for r in RANKS}
    losses: dict[str, dict[str, float]] = {"sweep": {}, "alone": {}}

    def together() -> float:
        at = time.perf_counter()
        for e in lc.sweep(model, specs, task, config):
            if e.event.kind == "end":
                losses["sweep"][e.name] = e.event.held_loss or 0.0
        took = time.perf_counter() - at
        for name in specs:
            lc.get_adapter(model, name).detach()
        return took

    def apart() -> float:
        took = 0.0
        for name, spec in specs.items():
            at = time.perf_counter()
            adapter = lc.attach(model, spec, name)
            events = list(lc.train(adapter, task, config))
            took += time.perf_counter() - at
            losses["alone"][name] = events[-1].held_loss or 0.0
            adapter.detach()
        return took

    values = in_turn({"ours": together, "six runs": apart}, repeats, warmup=1)
    record("gpu sweep", f"GPU: ranks {', '.join(map(str, RANKS))}, {steps} steps each", values, peer="six runs",
           unit="s", reach=0.35, at_least=False, more={"losses": losses})  # fmt: skip
    print(losses, flush=True)


def compare(task: Any, model_name: str, repeats: int) -> None:
    """New tokens of base and adapted, side by side and streamed, against generate, then generate without."""
    import tempfile

    import torch
    from peft import PeftModel

    import lora_core as lc

    model, tokenizer = lc.load_model(model_name, device="cuda", dtype="bfloat16")
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16), name="e2e")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    other, _ = lc.load_model(model_name, device="cuda", dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        theirs = PeftModel.from_pretrained(other, folder).eval()
    prompt = task.template.replace("{prompt}", task.test[0].prompt)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to("cuda")
    model.generation_config.eos_token_id = theirs.generation_config.eos_token_id = None
    eos, tokenizer.eos_token_id = tokenizer.eos_token_id, None  # both go on to the last token
    first: list[float] = []

    def ours() -> float:
        at = time.perf_counter()
        *_, last = lc.generate(model, tokenizer, [prompt], adapters=[None, "e2e"], max_new_tokens=NEW)
        first.append(last.first_s)
        return time.perf_counter() - at

    def peft() -> float:
        at = time.perf_counter()
        with torch.no_grad():
            more: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False,
                                    "pad_token_id": eos}  # fmt: skip
            theirs.generate(**ids, **more)
            with theirs.disable_adapter():
                theirs.generate(**ids, **more)
        torch.cuda.synchronize()
        return time.perf_counter() - at

    values = in_turn({"ours": ours, "PEFT": peft}, repeats, warmup=1)
    record("gpu compare", f"GPU: {NEW} new tokens for base and adapted, side by side, streamed", values, peer="PEFT",
           unit="s", reach=2.0, more={"first_token_s": max(first[1:])})  # fmt: skip


def run(only: list[str], repeats: int, model: str, data: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure")
        return
    task = e2e(data)
    what = "SmolLM2-135M" if model == MODEL else "SmolLM2-135M's shapes with random weights"
    rows = {
        "training": lambda: training("gpu training", f"GPU: {what}, E2E, q,v, r=8, 60 steps of 8", task, model,
                                     60, 8, repeats, 4.0),
        "long": lambda: training("gpu training 32 x 256", f"GPU: {what}, q,v, r=8, 30 steps of 32 × 256",
                                 long_rows(task), model, 30, 32, repeats, 2.0),
        "sweep": lambda: sweep(task, model, 60, repeats),
        "compare": lambda: compare(task, model, repeats),
    }  # fmt: skip
    for name, row in rows.items():
        if not only or name in only:
            row()


if __name__ == "__main__":
    given = sys.argv[1:]

    def option(name: str, default: str) -> str:
        return given.pop(i + 1) if (i := given.index(name) if name in given else -1) >= 0 else default

    count, name, folder = int(option("--repeats", "3")), option("--model", MODEL), Path(option("--data", str(DATA)))
    run([a for a in given if not a.startswith("--")], count, name, folder)
