"""Compare: what a run's ΔW does, with its dials turned, beside the base or beside other runs; as it is written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from typing import Any

from app.pages import held, owners, words
from app.pages.lab import Lab, task_of_run, title
from app.pages.session import Loaded
from app.pages.side import attached, sides_of, template_of
from app.pages.values import check
from app.runs.recorded import recorded_texts
from app.runs.run import Run
from lora_core.errors import UserError
from lora_core.machine import give_back

EXAMPLES = 12
MOST_PROMPT = 20_000  # characters
MOST_NEW = 256  # tokens
MOST_TOKENS = 192  # of a text of one's own
QUIET_S = 0.05  # between two looks at the text that is being written


class Tickets:
    """Who asked last: a newer question of the same page ends the older one."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.lock = threading.Lock()

    def take(self, page: str, seq: int) -> None:
        with self.lock:
            self.last[page] = max(seq, self.last.get(page, 0))
            while len(self.last) > 200:
                self.last.pop(next(iter(self.last)))

    def stale(self, page: str, seq: int) -> bool:
        return self.last.get(page, seq) > seq


TICKETS = Tickets()


def opened(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """What Compare shows of a run before anything is written: examples, losses, scores, the recorded texts."""
    run = lab.run(query.get("run"))
    answer: dict[str, Any] = {
        "run": run.id,
        "name": title(run),
        "recorded": run.recorded,
        "model": run.request.model,
        "rank": int(run.request.spec["rank"]),
        "live": run.live,
        "data": run.request.data_name,
        "ready": run.adapter is not None,
        "loss": losses(run),
        "score": words.score(run.score),
        "examples": [],
    }
    if run.recorded:
        answer["examples"] = [{"prompt": e["prompt"], "reference": e["reference"], "base": e["base"],
                               "adapted": e["adapted"], "tokens": shown(e["tokens"])}
                              for e in recorded_texts(run.folder)["examples"]]  # fmt: skip
    if not answer["examples"]:
        try:
            task = task_of_run(run)
        except (UserError, OSError) as error:
            return answer | {"note": str(error)}
        rows = task.score_rows(EXAMPLES) or task.test[:EXAMPLES]
        answer["examples"] = [{"prompt": r.prompt, "reference": r.completion} for r in rows]
    if not answer["ready"]:
        answer["note"] = (f"{title(run)} is still training; its texts can be written when it has ended" if run.live
                          else f"{title(run)} ended without an adapter")  # fmt: skip
    return answer


def losses(run: Run) -> dict[str, Any] | None:
    """Held-out loss of both models, as the run measured it."""
    if run.base_loss is None or run.loss is None or not run.step:
        return None
    rows = run.request.config.get("eval_rows")
    return {"base": run.base_loss, "adapted": run.loss, "rows": rows}


def stream(lab: Lab, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Texts as they are written, then which tokens the adapter moved, then held-out losses as rows are measured.
    Yields the whole state each time.

    asked: run, prompt; setting (of its dials, see settings.py; None for all of ΔW) for the base and this beside each
    other, or sides [{run, setting}, …] (run None: the base); measure (whether losses are wanted); page and seq (echoed:
    the page drops older answers). Expected errors come as {"error"}.
    """
    page, seq = owners.page(asked.get("page")), asked.get("seq", 0)
    seq = seq if isinstance(seq, int) else 0
    TICKETS.take(page, seq)
    echo = {k: asked.get(k) for k in ("run", "prompt", "setting", "sides")} | {"seq": seq}
    state: dict[str, Any] = {"texts": [], "tokens": None, "done": False}
    try:
        check("POST", "write", asked)
    except UserError as error:
        yield echo | state | {"error": str(error), "done": True}
        return
    writer = Writer(lab, asked, lambda: TICKETS.stale(page, seq))
    try:
        for news in writer.follow():
            state = {**state, **news}
            yield echo | state
    finally:
        writer.stop()


class Writer:
    """Writes on a thread of its own: a page that goes away in the middle cannot keep the model."""

    def __init__(self, lab: Lab, asked: Mapping[str, Any], stale: Any) -> None:
        self.lab, self.asked, self.stale = lab, asked, stale
        self.news: dict[str, Any] = {}
        self.change, self.over = threading.Condition(), False
        self.stopped = False

    def follow(self) -> Iterator[dict[str, Any]]:
        """What is new, as often as it changes and somebody looks."""
        work = copy_context().run  # whose question it is
        threading.Thread(target=work, args=(self._work,), name="compare", daemon=True).start()
        while True:
            with self.change:
                self.change.wait_for(lambda: self.news or self.over)
                news, self.news, over = self.news, {}, self.over
            if news:
                yield news
            if over and not self.news:
                return
            threading.Event().wait(QUIET_S)

    def stop(self) -> None:
        self.stopped = True

    def _tell(self, **news: Any) -> None:
        with self.change:
            self.news |= news
            self.change.notify_all()

    def _ended(self) -> bool:
        return self.stopped or self.stale()

    def _work(self) -> None:
        try:
            self._write()
        except UserError as error:
            self._tell(error=str(error), done=True)
        except Exception as error:
            import logging

            logging.getLogger("lora_lab.page").exception("compare")
            self._tell(error=f"that did not work ({type(error).__name__}); the server's log says more", done=True)
        finally:
            with self.change:
                self.over = True
                self.change.notify_all()
            if not self.lab.session.waiting:
                give_back()

    def _write(self) -> None:
        import lora_core as lc
        from lora_core.tasks import prompt_text

        run, prompt = self.lab.run(self.asked.get("run")), self.asked.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("write a prompt, or pick a held-out example")
        if len(prompt) > MOST_PROMPT:
            raise UserError(f"the prompt has {len(prompt):,} characters; at most {MOST_PROMPT:,} are read")
        if run.adapter is None:
            raise UserError(f"{title(run)} has no adapter to compare with")
        sides = sides_of(self.lab, run, self.asked)
        with self.lab.session.model(run.request.model) as loaded:
            if self._ended():
                return
            names = attached(self.lab, loaded, sides)
            template = template_of(self.lab, loaded, run)
            info = lc.get_adapter(loaded.model, self.lab.session.adapter(loaded, run.id, run.adapter)).info
            longest = min(MOST_NEW, int((info.get("suggested") or {}).get("max_new_tokens", 64)))
            text, last = prompt_text(loaded.tokenizer, prompt, template), None
            for last in lc.generate(loaded.model, loaded.tokenizer, [text], names, max_new_tokens=longest,
                                    stop=self._ended):  # fmt: skip
                self._tell(texts=[t.strip() for t in last.texts[0]])
            if last is None or self._ended():
                return
            self._tell(seconds=last.seconds)
            tokens: list[dict[str, Any]] = []
            written = last.texts[0][-1].strip()
            if self.asked.get("sides") is None and names[-1] and written:
                found = lc.token_differences(loaded.model, loaded.tokenizer, prompt, written, names[-1],
                                             template=template)  # fmt: skip
                tokens = shown([t.to_dict() for t in found])
            self._tell(tokens=tokens, done=True)
            if self.asked.get("measure"):
                self._measure(loaded, run, names)

    def _measure(self, loaded: Loaded, run: Run, names: list[str | None]) -> None:
        """Held-out losses of all sides on the run's own rows, a few rows at a time, for as long as nobody asks anew."""
        from lora_core.dials import Interrupted, interruptible, losses_together

        objective, items = held.encoded(self.lab, run, loaded)
        unique = list(dict.fromkeys(names))
        sums, labelled, rows = [0.0] * len(unique), 0, 0
        with interruptible(loaded.model, unique, self._ended):
            try:
                for take, values, count in losses_together(objective, items, unique):
                    sums = [a + b for a, b in zip(sums, values, strict=True)]
                    labelled, rows = labelled + count, rows + take
                    mean = dict(zip(unique, (s / labelled for s in sums), strict=True))
                    self._tell(losses=[mean[n] for n in names], rows=rows, of=len(items))
            except Interrupted:
                return


def shown(tokens: Any) -> list[dict[str, Any]]:
    """Tokens for the page: text, how far log p moved and KL, both in nats (KL None where it was not kept), and the
    likeliest of both models."""
    return [{"t": t["text"], "d": round(t["adapted_logprob"] - t["base_logprob"], 3), "kl": t.get("kl"),
             "p": [t["base_logprob"], t["adapted_logprob"]],
             "base": [list(x) for x in t["base_top"]], "adapted": [list(x) for x in t["adapted_top"]]}
            for t in tokens]  # fmt: skip


def speaks(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """How a run's adapter, as its dials stand, moves the tokens of any text.

    body: run, setting, text, prompt (which the text answers; None for a text by itself), page, seq
    """
    import lora_core as lc

    run, text = lab.run(body.get("run")), body.get("text")
    page, seq = f"text-{owners.page(body.get('page'))}", body.get("seq", 0)
    seq = seq if isinstance(seq, int) else 0
    if not isinstance(text, str) or len(text) > MOST_PROMPT:
        raise UserError(f"a text of at most {MOST_PROMPT:,} characters is expected")
    if run.adapter is None:
        raise UserError(f"{title(run)} has no adapter to compare with")
    TICKETS.take(page, seq)
    sides = sides_of(lab, run, {"setting": body.get("setting")})
    with lab.session.model(run.request.model) as loaded:
        if TICKETS.stale(page, seq):
            return {"seq": seq, "stale": True}
        name = attached(lab, loaded, sides)[1]
        found, prompt = [], body.get("prompt")
        if name and isinstance(prompt, str):
            found = lc.token_differences(loaded.model, loaded.tokenizer, prompt, text, name,
                                         template=template_of(lab, loaded, run))  # fmt: skip
        elif name:
            found = lc.text_differences(loaded.model, loaded.tokenizer, text, name, max_tokens=MOST_TOKENS)
        read = len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    return {"seq": seq, "tokens": shown([t.to_dict() for t in found]), "base": name is None,
            "cut": max(0, read - MOST_TOKENS)}  # fmt: skip
