"""The other side: transformers' Trainer with PEFT, as its documentation shows it, on the same rows and recipe."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def peft_model(model: Any, targets: Sequence[str], rank: int, alpha: float, task_type: str = "CAUSAL_LM") -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=list(targets), task_type=task_type)
    return get_peft_model(model, config)


def train(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], *, steps: int, batch: int, lr: float,
          bf16: bool = False, labels: bool = True) -> float:  # fmt: skip
    """Seconds that Trainer.train() takes for rows of {input_ids, labels}: AdamW, linear schedule, 5 % warm-up."""
    import torch
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict[str, list[int]]:
            return rows[i]

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True) if labels else DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=batch, learning_rate=lr, lr_scheduler_type="linear",
            warmup_steps=max(1, round(0.05 * steps)), max_grad_norm=1.0, bf16=bf16, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0, use_cpu=not torch.cuda.is_available())  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=Rows(), data_collator=collate)
        at = time.perf_counter()
        with contextlib.redirect_stdout(None):
            trainer.train()
        return time.perf_counter() - at


def script(data: Path, out: Path, steps: int, folder: Path) -> None:
    """What a person would write to do what `lora-lab train` does: load, tokenise, train, save."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for line in data.read_text(encoding="utf-8").splitlines():
        prompt, _, completion = line.partition("||")
        before = tokenizer(f"{prompt} ->", add_special_tokens=False)["input_ids"]
        after = tokenizer(f" {completion}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    model = peft_model(model, ("q_proj", "v_proj"), 8, 16)
    train(model, tokenizer, rows, steps=steps, batch=8, lr=1e-3)
    model.save_pretrained(out)


if __name__ == "__main__":
    import sys

    script(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
