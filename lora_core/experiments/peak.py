"""The memory of a training step, measured in a process of its own: `python -m lora_core.experiments.peak MODEL lora`.

Prints {"loaded": bytes of the model after loading, "peak": the most while training}; both beside what Python and torch
take. "full" trains every weight with the same optimiser, rows and precision (float32).
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

BATCH, STEPS = 4, 2


def measure(name: str, method: str) -> dict[str, int]:
    """Train for two steps and watch the resident memory every two milliseconds."""
    import psutil
    import torch

    import lora_core as lc
    from lora_core.experiments.storage import SPEC

    rss = psutil.Process().memory_info
    before = rss().rss
    model, tokenizer = lc.load_model(name, dtype="float32", device="cpu")
    loaded = rss().rss
    task = lc.load_task("restaurant", train=BATCH * STEPS, test=1)
    most, over = [loaded], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], rss().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if method == "lora":
        config = lc.TrainConfig(steps=STEPS, batch_size=BATCH, eval_rows=0)
        for _ in lc.train(lc.attach(model, SPEC), task, config, objective="lm"):
            pass
    else:
        goal: Any = lc.CausalLM(model, tokenizer, task.template)
        model.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        items = goal.encode(task.train)
        for i in range(STEPS):
            batch = goal.batch(items[i * BATCH : (i + 1) * BATCH])
            (goal.loss(batch) / batch.labelled).backward()
            optimizer.step()
            optimizer.zero_grad()
    over.set()
    watcher.join()
    return {"loaded": loaded - before, "peak": max(most[0], rss().rss) - before}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
