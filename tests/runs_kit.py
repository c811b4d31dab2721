"""What the tests of the runs share: a tiny model on disk, a training without a model, and processes that run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.runs.folder import CHECKPOINT
from app.runs.run import RunRequest
from lora_core.home import write
from lora_core.sealed import newest, remove, save_sealed

ROOT = Path(__file__).parent.parent
STAND_IN = (sys.executable, "-m", "tests.runs_kit")


def request(steps: int = 20, **more: Any) -> RunRequest:
    """A small request; `config` may hold what the stand-in understands (step_s, fail_at, size, trace, …)."""
    config = {"steps": steps, "seed": 0} | more.pop("config", {})
    return RunRequest(**{"model": "stand-in", "task": "pirate", "config": config} | more)


class StandIn:
    """A training without a model: the "adapter" is the sum of the steps, so that a wrong resume shows.

    Like the real one it writes a checkpoint (a safetensors file with the step) every few steps and continues from it.
    """

    def __init__(self, request: RunRequest, folder: Path) -> None:
        from lora_core.errors import UserError

        self.config, self.file = dict(request.config), folder / CHECKPOINT
        self.sum, self.start = 0, 0
        if self.config.get("wrong"):
            raise UserError("no model 'stand-in'")
        if (found := newest(self.file)) is not None:
            self.sum, self.start = found.state["sum"], found.step

    def train(self, stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        steps = self.config["steps"]
        began = time.perf_counter()

        def event(kind: str, **more: Any) -> dict[str, Any]:
            return {"kind": kind, "steps": steps, "seconds": time.perf_counter() - began, **more}

        yield event("base", step=self.start, held_loss=3.0, loss=3.0)
        reason, step = "done", self.start
        for step in range(self.start + 1, steps + 1):
            time.sleep(self.config.get("step_s", 0.0))
            if step == self.config.get("fail_at"):
                raise RuntimeError("the wheel came off\nof the wagon")
            if step == self.config.get("press_at"):
                raise KeyboardInterrupt
            if step == self.config.get("die_at") and not self.start:
                os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
            if step == self.config.get("hang_at") and not self.start:
                time.sleep(600)
            self.sum += step
            if trace := self.config.get("trace"):  # who trained which step, in the order of time
                with open(trace, "a", encoding="utf-8") as f:
                    f.write(f"{self.file.parent.name} {os.getpid()} {step}\n")
            yield event("step", step=step, loss=3.0 - 2.0 * step / steps)
            if step % 5 == 0 and step < steps:
                self.checkpoint(step)
            if stop() and step < steps:
                reason = "stopped"
                break
        yield event("held", step=step, held_loss=1.0)
        yield event("end", step=step, held_loss=1.0, loss=1.0, reason=reason, train_s=0.5, tokens_per_s=100.0)
        if reason == "done":
            remove(self.file)

    def checkpoint(self, step: int) -> None:
        import numpy as np

        content = np.full(self.config.get("size", 4), step % 251, np.uint8)
        save_sealed(self.file, {"x": content}, {"step": step, "sum": self.sum})

    def save(self, folder: Path, info: Mapping[str, Any]) -> None:
        folder.mkdir()
        for name, text in (("a.json", json.dumps({"sum": self.sum})), ("b.json", json.dumps(info))):
            write(folder / name, (text + " " * self.config.get("size", 0)).encode())

    def score(self, stop: Callable[[], bool]) -> dict[str, Any] | None:
        return {"name": "exact match", "base": {"exact match": 0.0}, "adapted": {"exact match": 0.5}, "rows": 16}

    def effect(self, events: Sequence[Mapping[str, Any]], stop: Callable[[], bool]) -> dict[str, Any] | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"dtype": "float32", "device": "cpu", "trainable": 7, "peak_bytes": 1}


def adapter_sum(folder: Path) -> int:
    return json.loads((folder / "adapter" / "a.json").read_text())["sum"]


def spawn(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A Python process in the repository's folder."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})}
    )


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Waits for something that happens in another process; fails after a time that only a hang reaches."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def tiny_model(folder: Path) -> Path:
    """A random Llama of 2 layers with the tests' tokenizer, as a local folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tokenizer_fixture import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, tie_word_embeddings=True, **shape, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    from app.runs import worker

    sys.exit(worker.main(sys.argv[1:], session=StandIn))
