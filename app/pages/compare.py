"""Compare: the base and the adapted model on one prompt, side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from app.pages import words
from app.pages.lab import Lab, task_of_run, title
from app.runs.recorded import recorded_texts
from app.runs.run import Run
from lora_core.errors import UserError

EXAMPLES = 12
MOST_PROMPT = 20_000  # characters
MOST_NEW = 256  # tokens
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
    """Texts of both models as they are written, then which tokens the adapter moved. Yields the whole state each time.

    asked: run, prompt, k (directions kept; None for all), page and seq (echoed: the page drops older answers).
    Expected errors come as {"error"}.
    """
    page, seq = str(asked.get("page", ""))[:40], asked.get("seq", 0)
    seq = seq if isinstance(seq, int) else 0
    TICKETS.take(page, seq)
    echo = {"seq": seq, "run": asked.get("run"), "prompt": asked.get("prompt"), "k": asked.get("k")}
    state: dict[str, Any] = {"base": "", "adapted": "", "tokens": None, "done": False}
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
        threading.Thread(target=self._work, name="compare", daemon=True).start()
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

    def _write(self) -> None:
        import lora_core as lc
        from lora_core.tasks import prompt_text

        run = self.lab.run(self.asked.get("run"))
        prompt = self.asked.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("write a prompt, or pick a held-out example")
        if len(prompt) > MOST_PROMPT:
            raise UserError(f"the prompt has {len(prompt):,} characters; at most {MOST_PROMPT:,} are read")
        if run.adapter is None:
            raise UserError(f"{title(run)} has no adapter to compare with")
        k = self.asked.get("k")
        k = k if isinstance(k, int) and not isinstance(k, bool) and k >= 0 else None
        with self.lab.session.model(run.request.model) as loaded:
            if self._ended():
                return
            name = self.lab.session.adapter(loaded, run.id, run.adapter, k) if k != 0 else None
            info = lc.get_adapter(loaded.model, f"run-{run.id}").info if name else {}
            template = str(info.get("template") or run.request.template or "{prompt} ->")
            longest = min(MOST_NEW, int((info.get("suggested") or {}).get("max_new_tokens", 64)))
            text = prompt_text(loaded.tokenizer, prompt, template)
            last = None
            for last in lc.generate(loaded.model, loaded.tokenizer, [text], [None, name], max_new_tokens=longest,
                                    stop=self._ended):  # fmt: skip
                base, adapted = last.texts[0]
                self._tell(base=base.strip(), adapted=adapted.strip())
            if last is None or self._ended():
                return
            self._tell(seconds=last.seconds)
            tokens: list[dict[str, Any]] = []
            if name and last.texts[0][1].strip():
                found = lc.token_differences(loaded.model, loaded.tokenizer, prompt, last.texts[0][1].strip(), name,
                                             template=template)  # fmt: skip
                tokens = shown([t.to_dict() for t in found])
            self._tell(tokens=tokens, done=True)


def shown(tokens: Any) -> list[dict[str, Any]]:
    """Tokens for the page: text, how far log p moved (nats), and the likeliest of both models."""
    return [{"t": t["text"], "d": round(t["adapted_logprob"] - t["base_logprob"], 3),
             "p": [t["base_logprob"], t["adapted_logprob"]],
             "base": [list(x) for x in t["base_top"]], "adapted": [list(x) for x in t["adapted_top"]]}
            for t in tokens]  # fmt: skip


def loss_at(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """The held-out loss with ΔW cut to k directions, on the very rows that the run measured its own on."""
    import lora_core as lc
    from lora_core.evaluate import spread

    run = lab.run(body.get("run"))
    k = body.get("k")
    if run.adapter is None or not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise UserError("there is nothing to measure")
    with lab.session.model(run.request.model) as loaded:
        config = run.request.config
        with lab.session.words:
            task = task_of_run(run, loaded.tokenizer)
        name = lab.session.adapter(loaded, run.id, run.adapter, k) if k else None
        rows = spread(task.test, int(config.get("eval_rows", 64)))
        found = lc.evaluate(loaded.model, loaded.tokenizer, rows, template=task.template, adapters=[name],
                            max_tokens=int(config.get("max_tokens", 256)))  # fmt: skip
    return {"run": run.id, "k": k, "loss": found[name].loss, "rows": found[name].rows}
