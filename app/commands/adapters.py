"""`lora-lab compare`, `eval`, `spectra` and `merge`: what one does with an adapter that is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from app.commands import opening
from app.commands.options import Device, Dtype, adapter_folder
from app.commands.output import Json, Result, number, say, table
from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.models import ModelInfo
    from lora_core.tasks import Row, Task

AdapterFolder = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder, or the number of a run.")]
Model = Annotated[str | None, typer.Option(help="The base model, if not the one that the adapter names.")]
PROBE = ("The quick brown fox jumps over the lazy dog.", "name : The Eagle | food : French ->", "Water boils at 100")


def compare(
    adapter: AdapterFolder,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    model: Model = None,
    template: Annotated[str | None, typer.Option(help="Instead of the one that the adapter was trained with.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most this many tokens are generated.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw only from the likeliest tokens that hold this much.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For drawing.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> Result:
    """Base and adapted text for the same prompts, side by side, greedy unless told otherwise; a classifier's labels."""
    a, tokenizer = load(adapter, model, dtype, device)
    from lora_core import generate
    from lora_core.objective import is_classifier
    from lora_core.tasks import prompt_text

    if is_classifier(a.model):
        return compare_labels(a, tokenizer, prompt, json)
    form = template or template_of(a)
    prompts = [prompt_text(tokenizer, p, form) for p in prompt]
    longest = max_new_tokens or int(dict(a.info.get("suggested") or {}).get("max_new_tokens", 64))
    texts: tuple[tuple[str, ...], ...] = ()
    for step in generate(a.model, tokenizer, prompts, [None, a.name], max_new_tokens=longest, temperature=temperature,
                         top_p=top_p, seed=seed):  # fmt: skip
        texts = step.texts
    outputs = [{"prompt": p, "base": b.strip(), "adapted": t.strip()} for p, (b, t) in zip(prompt, texts, strict=True)]
    text = "\n\n".join(f"{o['prompt']}\n  base     {o['base']}\n  adapted  {o['adapted']}" for o in outputs)
    return Result(value={"outputs": outputs, "model": info_of(a).name, "template": form}, text=text, json=json)


def compare_labels(a: Adapter, tokenizer: Any, prompts: list[str], json: bool) -> Result:
    """The label that a classifier gives each prompt, and its probability, without the adapter and with it."""
    from lora_core import Classification
    from lora_core.evaluate import only

    settings = dict(a.info.get("config") or {})
    objective = Classification(a.model, tokenizer, max_tokens=int(settings.get("max_tokens", 256)))
    sides = []
    for name in (None, a.name):
        with only(a.model, name):
            sides.append(objective.predict(prompts))
    outputs = [{"prompt": p, "base": b[0], "adapted": t[0], "base_probability": b[1], "adapted_probability": t[1]}
               for p, b, t in zip(prompts, *sides, strict=True)]  # fmt: skip
    text = "\n\n".join(f"{o['prompt']}\n  base     {o['base']} ({o['base_probability']:.2f})\n"
                       f"  adapted  {o['adapted']} ({o['adapted_probability']:.2f})" for o in outputs)  # fmt: skip
    value = {"outputs": outputs, "model": info_of(a).name, "labels": list(objective.labels)}
    return Result(value=value, text=text, json=json)


def evaluate(
    adapter: AdapterFolder,
    data: Annotated[Path | None, typer.Option(help="A file of held-out rows, in the formats of train --data.")] = None,
    task: Annotated[str | None, typer.Option(help="Or the held-out rows of a built-in task.")] = None,
    model: Model = None,
    template: Annotated[str | None, typer.Option(help="Instead of the one that the adapter was trained with.")] = None,
    rows: Annotated[int, typer.Option(help="Measure the loss on this many rows, evenly spread; 0 for all.")] = 0,
    score_rows: Annotated[int, typer.Option(help="Generate for this many prompts to take the score; 0 for none.")] = 32,
    max_tokens: Annotated[int | None, typer.Option(help="Longer rows are cut; as in training unless told.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> Result:
    """Held-out loss and the task's score, of the base model and of the adapted one; a classifier's accuracy, and of
    pairs the share where the better answer gained more."""
    if (data is None) == (task is None):
        raise UserError("give either --data FILE or --task NAME: the held-out rows to measure on")
    from lora_core.tasks import load_held_out, load_task

    if task is not None:
        load_task(task)  # a wrong name is told before a model is loaded
    else:
        load_held_out(str(data))
    a, tokenizer = load(adapter, model, dtype, device)
    from lora_core import Classification, Preference, measure
    from lora_core.objective import choose, is_classifier
    from lora_core.preference import BETA

    settings = dict(a.info.get("config") or {})
    longest = max_tokens or int(settings.get("max_tokens", 256))
    form = template or (a.info.get("template") or None)
    classifies = is_classifier(a.model)
    held = (load_task(task, seed=int(settings.get("seed", 0))) if task is not None
            else load_held_out(str(data), template=form, tokenizer=None if classifies else tokenizer,
                               max_tokens=longest))  # fmt: skip
    for note in held.notes:
        say(note)
    chosen = list(held.test)[:: max(1, len(held.test) // rows)][:rows] if rows else list(held.test)
    name = choose(classifies, held.test)
    if name == "lm":
        base, adapted = losses(a, tokenizer, chosen, held, longest)
        measured = f"{base['tokens']:,} tokens of {len(chosen):,} held-out rows"
    else:
        objective = (Classification(a.model, tokenizer, max_tokens=longest) if classifies else
                     Preference(a, tokenizer, held.template, longest, beta=settings.get("beta", BETA)))  # fmt: skip
        found = measure(objective, chosen, adapters=[None, a.name])
        base, adapted = (found[side] | {"rows": len(chosen)} for side in (None, a.name))
        measured = f"{len(chosen):,} held-out rows"
    score_rows = 0 if classifies else score_rows
    scored = scores(a, tokenizer, held, score_rows) if score_rows else {}
    value: dict[str, Any] = {
        "objective": name,
        "base": base | {"score": scored.get(None)},
        "adapted": adapted | {"score": scored.get(a.name)},
        "rows": len(chosen),
        "of": len(held.test),
        "score_rows": len(held.score_rows(score_rows)) if score_rows else 0,
        "model": info_of(a).name,
        "template": held.template,
    }
    lines = [("", "base", "adapted")]
    lines += [(n, number(base[n]), number(adapted[n])) for n in base if n not in ("tokens", "rows")]
    lines += [(n, number(v), number(scored[a.name].get(n))) for n, v in (scored.get(None) or {}).items()]
    text = f"{table(lines, right=(1, 2))}\n\n{measured}"
    return Result(value=value, text=text, json=json)


def spectra(
    adapter: AdapterFolder,
    base: Annotated[str | None, typer.Option(help="Load this model and set each update beside its W0.")] = None,
    json: Json = False,
) -> Result:
    """Every adapted matrix's spectrum: singular values, norm, effective ranks. Needs no model and no torch; DoRA's
    updates need --base, as they depend on W0. Also of a .safetensors file with PEFT's, kohya's or diffusers' names, of
    a .zip, and of a whole model beside the --base that it was tuned from."""
    from lora_core.files import read_adapter
    from lora_core.spectra import spectra as of

    folder = adapter_folder(adapter)
    value: dict[str, Any] = {}
    matrices: list[dict[str, Any]]
    if opening.foreign(folder):
        with opening.opened(folder, base) as (found, theirs):
            matrices, value = [s.to_dict() for s in theirs.values()], opening.about(found)
            if found.difference is not None:
                base = None
            elif base is not None:
                matrices = [m | more for m, more in zip(matrices, opening.beside(found, base), strict=True)]
    elif base is None:
        stored = read_adapter(folder)
        matrices = [s.to_dict() for s in of(stored).values()]
    else:
        stored = read_adapter(folder)
        from lora_core import load_adapter, load_model

        on_base, _ = load_model(base, device="cpu", dtype="float32", labels=stored.info.get("labels"))
        attached = load_adapter(on_base, folder, "adapted")
        matrices = [s.to_dict() | more for s, more in zip(of(attached).values(), beside(attached), strict=True)]
    head = ["matrix", "rank", "norm", "stable rank", "90 % energy", "largest σ"]
    rows = [[m["path"], str(m["rank"]), f"{m['norm']:.4g}", number(m["stable_rank"], 2), str(m["energy_90"]),
             f"{max(m['singular_values'], default=0.0):.4g}"] for m in matrices]  # fmt: skip
    if base is not None:
        head += ["norm / W0's", "amplification"]
        rows = [r + [f"{m['relative_norm']:.4g}", number(m["amplification"], 2)] for r, m in zip(rows, matrices)]
    value = {"matrices": matrices, **(value or {"model": base or stored.base, "info": stored.info})}
    return Result(value=value, text=table([head, *rows], right=range(1, len(head))), json=json)


def merge(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Option(help="The folder to write: a plain transformers model with its tokenizer.")],
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="Number format of the written weights: float32 or bfloat16.")] = "float32",
    json: Json = False,
) -> Result:
    """Write base plus adapter as one plain model. max_error: the largest difference between a logit of the written
    model, read back, and of base and adapter unmerged, over all tokens of three short texts."""
    if dtype == "auto":
        raise UserError("merge writes float32 or bfloat16; auto depends on the machine, a file should not")
    from lora_core.home import writing

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    a, tokenizer = load(adapter, model, dtype, "cpu")
    if out.resolve() in (info_of(a).folder.resolve(), adapter_folder(adapter).resolve()):
        raise UserError(f"{out} holds what is being merged; name another folder")
    if (out / "adapter_config.json").exists():
        raise UserError(f"{out} holds an adapter; name another folder for the merged model")
    import torch

    from lora_core.models import load_folder
    from lora_core.quiet import quiet

    base: Any = a.model
    before = probe(base, tokenizer)
    a.merge()
    with writing(out), quiet():
        base.save_pretrained(out)
        tokenizer.save_pretrained(out)
        for weights in out.glob("*.safetensors"):  # written through a temporary file, for its owner's eyes alone
            shutil.copymode(out / "config.json", weights)
    a.unmerge()
    written = load_folder(out, dtype=dtype, labels=info_of(a).labels)[0]
    error = float(torch.max(torch.abs(probe(written.eval(), tokenizer) - before)))
    value = {"path": str(out), "max_error": error, "dtype": dtype, "model": info_of(a).name}
    return Result(value=value, text=f"{out}\nlargest difference of a logit: {error:.2g}", json=json)


# ---- what they share ----------------------------------------------------------------------------------------------
def load(adapter: str, model: str | None, dtype: str, device: str) -> tuple[Adapter, Any]:
    """(adapter on its base model, tokenizer). The base is the one given, else the one that the adapter names; with a
    head for the labels that it was trained on."""
    from lora_core.files import read_adapter

    folder = adapter_folder(adapter)
    stored = read_adapter(folder)  # a bad adapter is told before a model is loaded
    name = model or stored.base
    if not name:
        raise UserError(f"the adapter in {folder} does not say which model it belongs to; name it with --model")
    from lora_core import load_adapter, load_model

    base, tokenizer = load_model(name, device=device, dtype=dtype, labels=stored.info.get("labels"))
    return load_adapter(base, folder, "adapted"), tokenizer


def info_of(adapter: Adapter) -> ModelInfo:
    """What is known of the model that an adapter sits on."""
    return cast(Any, adapter.model).lora_lab


def template_of(adapter: Adapter) -> str:
    """The template that an adapter was trained with; one that says nothing of it gets the prompt as it stands."""
    return str(adapter.info.get("template") or "{prompt}")


def losses(a: Adapter, tokenizer: Any, rows: list[Row], task: Task, max_tokens: int) -> tuple[dict[str, Any], ...]:
    """(base, adapted): loss, perplexity, tokens and rows; in portions, with a bar that tells the time left."""
    import math

    from tqdm import tqdm

    from lora_core import evaluate as measure

    total = {None: 0.0, a.name: 0.0}
    tokens = 0
    ordered = sorted(rows, key=lambda r: len(r.prompt) + len(r.completion))  # rows of like length go together
    with tqdm(total=len(rows), desc="held-out loss", unit=" rows", disable=len(rows) < 65) as bar:
        for start in range(0, len(ordered), 64):
            some = ordered[start : start + 64]
            found = measure(a.model, tokenizer, some, template=task.template, adapters=[None, a.name],
                            max_tokens=max_tokens)  # fmt: skip
            for name, loss in found.items():
                total[name] += loss.loss * loss.tokens
            tokens += found[None].tokens
            bar.update(len(some))
    mean = [t / tokens if tokens else math.nan for t in total.values()]
    return tuple({"loss": m, "perplexity": math.exp(min(m, 700.0)), "tokens": tokens, "rows": len(rows)} for m in mean)


def scores(a: Adapter, tokenizer: Any, task: Task, limit: int) -> dict[str | None, dict[str, float]]:
    """{None: the base's scores, adapter: its scores}, from greedy texts for at most `limit` held-out prompts."""
    from lora_core import score

    rows = task.score_rows(limit)
    if rows:
        say(f"generating {2 * len(rows)} texts for the score")
    return score(a.model, tokenizer, task, adapters=[None, a.name], limit=limit) if rows else {}


def beside(a: Adapter) -> list[dict[str, float]]:
    """For each matrix: ‖W0‖_F, ‖ΔW‖_F/‖W0‖_F, and how much ΔW amplifies its own directions of W0 (section 7.3)."""
    from lora_core import amplification

    found = []
    for key in a.sites:
        delta, weight = a.delta(key), a.W0(key)
        whole = float(weight.double().norm())
        found.append({"base_norm": whole, "relative_norm": float(delta.norm()) / whole,
                      "amplification": float(amplification(delta, weight))})  # fmt: skip
    return found


def probe(model: Any, tokenizer: Any) -> Any:
    """Logits (tokens, vocabulary) in float32 of three short texts."""
    import torch

    with torch.no_grad():
        texts = [torch.tensor([tokenizer(t, add_special_tokens=False).input_ids]) for t in PROBE]
        return torch.cat([model(ids).logits[0].float() for ids in texts])
