"""Scores of generated text. Shares are from 0 to 1; BLEU and chrF are sacrebleu's, from 0 to 100."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lora_core.tasks.task import Row, Scorer


def tidy(text: str) -> str:
    """Without spaces at the ends, with single spaces inside."""
    return " ".join(text.split())


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def group(
    predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row] = ()
) -> list[tuple[str, str, list[str]]]:
    """(prompt, prediction, references) of each distinct prompt, in the order of `rows`.

    The references are the distinct completions of that prompt in `rows` and in `known`. When a prompt occurs more
    than once in `rows`, its first prediction counts: greedy decoding gives the same text each time.
    """
    first: dict[str, str] = {}
    references: dict[str, dict[str, None]] = {}
    for prediction, row in zip(predictions, rows, strict=True):
        first.setdefault(row.prompt, prediction)
        references.setdefault(row.prompt, {})[row.completion] = None
    for row in known:
        if row.prompt in references:
            references[row.prompt][row.completion] = None
    return [(prompt, text, list(references[prompt])) for prompt, text in first.items()]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, 0..100, of sacrebleu (13a tokens, exp smoothing, case kept); several references each."""
    import sacrebleu  # 0.3 s to import, so only when something is scored

    return sacrebleu.corpus_bleu([tidy(p) for p in predictions], _streams(references)).score  # type: ignore[arg-type]


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF2, 0..100, of sacrebleu (character 6-grams, β = 2); several references each."""
    import sacrebleu

    return sacrebleu.corpus_chrf([tidy(p) for p in predictions], _streams(references)).score  # type: ignore[arg-type]


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """sacrebleu's layout: one list for the first references, one for the second …, None where there is none."""
    most = max((len(r) for r in references), default=1)
    return [[tidy(r[i]) if i < len(r) else None for r in references] for i in range(most)]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal one of their references, spaces apart."""
    hits = [tidy(p) in {tidy(r) for r in refs} for p, refs in zip(predictions, references, strict=True)]
    return mean([float(h) for h in hits])


def first_label(text: str, labels: Collection[str]) -> str | None:
    """The label that `text` begins with, or None. Case, quotes and a colon before it do not matter.

    The longest label wins ("not good" before "not"), and it must end where a word ends ("1" is not in "10").
    """
    start = tidy(text).casefold().lstrip("\"'`*:-> ") if text.strip() else ""
    whole = tidy(text).casefold()
    for label in sorted(labels, key=len, reverse=True):
        wanted = tidy(label).casefold()
        for said in (whole, start):
            if wanted and said.startswith(wanted):
                after = said[len(wanted) : len(wanted) + 1]
                if not (wanted[-1].isalnum() and after and (after.isalnum() or after in "_-")):
                    return label
    return None


def accuracy(predictions: Sequence[str], gold: Sequence[str], labels: Collection[str]) -> float:
    """Share of predictions whose first word (or words) is the right one of `labels`."""
    return mean([float(first_label(p, labels) == g) for p, g in zip(predictions, gold, strict=True)])


def parse_json(text: str) -> Any:
    """The JSON value that the whole of `text` is. Raises ValueError for anything else, repeated keys included."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(items)
        if len(record) != len(items):
            raise ValueError("a key occurs twice")
        return record

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text.strip(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def same_json(a: Any, b: Any) -> bool:
    """Equal as JSON: the order of keys does not matter, 1 and 1.0 are the same number, true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_json(x, y) for x, y in zip(a, b, strict=True))
    return (isinstance(a, (int, float)) == isinstance(b, (int, float))) and a == b


def json_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`exact match` by parsed value, `fields` (share of the reference's fields with the right value), `valid JSON`.

    A prediction that is not JSON as a whole (text before or after it included) is wrong and has no right field.
    """
    right, fields, valid = [], [], []
    for prediction, reference in zip(predictions, references, strict=True):
        wanted = parse_json(reference)
        try:
            said = parse_json(prediction)
        except ValueError:
            right.append(0.0)
            valid.append(0.0)
            fields += [0.0] * len(wanted)
            continue
        right.append(float(same_json(said, wanted)))
        valid.append(1.0)
        inside = said if isinstance(said, dict) else {}
        fields += [float(k in inside and same_json(inside[k], v)) for k, v in wanted.items()]
    return {"exact match": mean(right), "fields": mean(fields), "valid JSON": mean(valid)}


# Scorers, as a Task holds them


def score_sentences(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """BLEU over the references of each prompt, and exact match."""
    groups = group(predictions, rows, known)
    texts, references = [g[1] for g in groups], [g[2] for g in groups]
    return {"BLEU": bleu(texts, references), "exact match": exact_match(texts, references)}


def score_answers(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """Exact match against any completion of the prompt, and chrF."""
    groups = group(predictions, rows, known)
    texts, references = [g[1] for g in groups], [g[2] for g in groups]
    return {"exact match": exact_match(texts, references), "chrF": chrf(texts, references)}


def score_pairs(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """closer: the share of texts that are more like the better answer than like the worse one, by chrF; and chrF
    against the better ones, of all texts together."""
    both = [[chrf([p], [[answer]]) for answer in (r.completion, r.rejected)] for p, r in zip(predictions, rows)]
    better = chrf(predictions, [[r.completion] for r in rows])
    return {"closer": mean([float(good > bad) for good, bad in both]), "chrF": better}


def score_labels(labels: Collection[str]) -> Scorer:
    """Accuracy over `labels`; every row counts."""

    def score(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, [r.completion for r in rows], labels)}

    return score


def score_json(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """See `json_scores`."""
    return json_scores(predictions, [r.completion for r in rows])


def score_nothing(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """For rows of plain text: there is no prompt to answer, held-out loss is what there is."""
    return {}


def slot_accuracy(groups: Sequence[tuple[str, str, list[str]]], stated: Callable[[str, str], Sequence[bool]]) -> float:
    """Share of all attribute values that the predictions state; `stated(prompt, text)` answers for each value."""
    return mean([float(ok) for prompt, text, _ in groups for ok in stated(prompt, text)])
