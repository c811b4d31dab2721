"""Train on a running page from a program: lists the models, counts a budget, trains for some steps, prints the losses.

    lora-lab serve                                  # in another terminal
    python scripts/train_by_program.py http://127.0.0.1:7860
    python scripts/train_by_program.py "http://192.168.1.7:7860/?key=…"      # a page that asks for a key
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import httpx  # noqa: E402
from gradio_client import Client  # noqa: E402


def connected(link: str) -> Client:
    """A client of the page at a link; of one with a key, as whoever opened it."""
    parts = urlsplit(link)
    base, headers = f"{parts.scheme}://{parts.netloc}", {}
    if parts.query:  # the key makes a cookie, as in a browser
        entry = httpx.get(link)
        if entry.status_code != 303:
            raise SystemExit(entry.text)
        headers = {"Cookie": "; ".join(f"{k}={v}" for k, v in entry.cookies.items())}
    return Client(base, headers=headers, verbose=False, analytics_enabled=False, download_files=False)


def trained(client: Client, model: str, task: str, spec: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The run, once it is over."""
    number = client.predict(model, task, spec, config, api_name="/start")
    while (run := client.predict(number, api_name="/run"))["live"]:
        print(run["says"], flush=True)
        time.sleep(1)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="train on a running page")
    parser.add_argument("link", help="where the page is, with its key if it has one")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()

    client = connected(given.link)
    for model in client.predict(api_name="/models"):
        print(f"{model['name']:16}{model['parameters'] / 1e6:6.0f} M  {'here' if model['cached'] else 'to be fetched'}")
    spec = {"targets": ["q", "v"], "rank": given.rank}
    config = {"steps": given.steps, "batch_size": 4, "eval_rows": 8, "max_tokens": 64}
    budget = client.predict(given.model, spec, config, api_name="/budget")
    print(f"{budget['trainable']:,} trainable parameters")
    run = trained(client, given.model, given.task, spec, config)
    print(run["sentence"] or run["error"])
    for row in client.predict(run["run"], api_name="/losses"):
        print(*("" if value is None else value for value in row), sep="\t")
    client.close()


if __name__ == "__main__":
    main()
