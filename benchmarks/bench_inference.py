"""Comparing, merged and unmerged forward passes, and switching, against the base model and PEFT.

python -m benchmarks.bench_inference [--repeats 5]
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks.kit import MODEL, in_turn, record, seconds

PROMPT = "name: The Eagle | food: French | area: riverside | family friendly: yes ->"
NEW = 64


def pair() -> tuple[Any, Any, Any, Any]:
    """Our model with an adapter, and PEFT's with the same."""
    import tempfile

    import torch
    from peft import PeftModel

    import lora_core as lc

    model, tokenizer = lc.load_model(MODEL)
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16), name="e2e")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        other, _ = lc.load_model(MODEL)
        theirs = PeftModel.from_pretrained(other, folder).eval()
    return model, tokenizer, adapter, theirs


def compare(repeats: int) -> None:
    """64 new tokens of base and adapted, side by side and streamed, against generate, then generate without."""
    import torch

    import lora_core as lc

    model, tokenizer, _, theirs = pair()
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    first: list[float] = []
    model.generation_config.eos_token_id = theirs.generation_config.eos_token_id = None
    eos, tokenizer.eos_token_id = tokenizer.eos_token_id, None  # both go on to the last token

    def ours() -> float:
        at = time.perf_counter()
        *_, last = lc.generate(model, tokenizer, [PROMPT], adapters=[None, "e2e"], max_new_tokens=NEW)
        first.append(last.first_s)
        assert last.tokens == 2 * NEW, last.tokens
        return time.perf_counter() - at

    def peft() -> float:
        at = time.perf_counter()
        with torch.no_grad():
            more: dict[str, Any] = {
                "max_new_tokens": NEW,
                "min_new_tokens": NEW,
                "do_sample": False,
                "pad_token_id": eos,
            }
            theirs.generate(**ids, **more)
            with theirs.disable_adapter():
                theirs.generate(**ids, **more)
        return time.perf_counter() - at

    values = in_turn({"ours": ours, "PEFT": peft}, repeats, warmup=1)
    record("compare", f"{NEW} new tokens for base and adapted, side by side, streamed", values, peer="PEFT", unit="s",
           reach=2.0, more={"first_token_s": max(first[1:])})  # fmt: skip


def forward(repeats: int) -> None:
    """A forward pass at 1×128 and 16×256: merged against base, unmerged against base and against PEFT's."""
    import torch

    import lora_core as lc

    model, _, adapter, theirs = pair()
    base, _ = lc.load_model(MODEL)
    for rows, time_ in ((1, 128), (16, 256)):
        ids = torch.randint(0, 40000, (rows, time_), generator=torch.Generator().manual_seed(0))

        def go(m: Any, ids: Any = ids) -> float:
            with torch.no_grad():
                return seconds(lambda: m(input_ids=ids, logits_to_keep=1, use_cache=False))

        n = repeats * 3 if rows == 1 else repeats
        unmerged = in_turn({"ours": lambda: go(model), "base": lambda: go(base), "PEFT": lambda: go(theirs)}, n, 1)  # noqa: B023
        adapter.merge()
        merged = in_turn({"ours": lambda: go(model), "base": lambda: go(base)}, n, 1)  # noqa: B023
        adapter.unmerge()
        shape = f"{rows}x{time_}"
        record(f"merged {shape}", f"forward of the merged model, {shape}", merged, peer="base", unit="s", reach=1.02,
               at_least=False)  # fmt: skip
        record(f"unmerged {shape}", f"forward with the adapter unmerged, {shape}", unmerged, peer="base", unit="s",
               reach=1.05, at_least=False)  # fmt: skip
        record(f"unmerged {shape} PEFT", f"forward with the adapter unmerged, {shape}", unmerged, peer="PEFT", unit="s",
               reach=1.0)  # fmt: skip


def switching(repeats: int) -> None:
    """From one q,v adapter to another: unmerged against set_adapter, merged against unmerge + merge."""
    import lora_core as lc

    model, _, a, theirs = pair()
    b = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16), name="other")
    theirs.add_adapter("other", theirs.peft_config["default"])
    state = {"now": 0}

    def unmerged() -> float:
        state["now"] ^= 1
        names = ("e2e", "other") if state["now"] else ("other", "e2e")
        return seconds(lambda: lc.switch(model, *names))

    def set_adapter() -> float:
        return seconds(lambda: theirs.set_adapter("other" if state["now"] else "default"))

    record("switch", "q,v adapter to another, unmerged", in_turn(
        {"ours": unmerged, "PEFT": set_adapter}, 4 * repeats, 2), peer="PEFT", unit="s", reach=1.0)  # fmt: skip
    lc.switch(model, "other", "e2e")
    a.merge()
    theirs.set_adapter("default")
    theirs.merge_adapter()
    state["now"] = 0

    def remerge() -> float:
        def work() -> None:
            theirs.unmerge_adapter()
            theirs.set_adapter("other" if state["now"] else "default")
            theirs.merge_adapter()

        return seconds(work)

    record("switch merged", "q,v adapter to another, merged", in_turn(
        {"ours": unmerged, "PEFT": remerge}, 2 * repeats, 2), peer="PEFT", unit="s", reach=3.0)  # fmt: skip
    assert b.merged or a.merged


if __name__ == "__main__":
    given = sys.argv[1:]
    count = int(given[given.index("--repeats") + 1]) if "--repeats" in given else 5
    only = [g for g in given if g not in ("--repeats", str(count))]
    for name, row in (("compare", compare), ("forward", forward), ("switch", switching)):
        if not only or name in only:
            row(count)
