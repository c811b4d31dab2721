"""What all tabs share, without a browser: the explanations, and the norms of the formula strip."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import app
from app.pages import help, train
from app.pages.formula import norms
from app.runs.run import Run
from tests.pages_kit import ask

STATIC = Path(app.__file__).parent / "static"


def test_every_symbol_and_every_setting_is_explained() -> None:
    settings = [name for _, name, *_ in train.MORE] + ["steps", "lr", "batch_size", "seed"]
    for key in (*help.SYMBOLS, *help.ADAPT, *settings):
        entry = help.HELP[key]
        assert set(entry) == {"name", "what", "grows", "paper"}, key
        assert all(20 < len(entry[k]) < 260 for k in ("what", "grows")), key
        assert re.search(r"(?i)section|appendix|arxiv|not in the paper", entry["paper"]), key
    used = {key for file in STATIC.glob("*.js") for key in re.findall(r'\b(?:mark|what)\("(\w+)"', file.read_text())}
    assert used and used <= set(help.HELP), used - set(help.HELP)


def test_the_frozen_norms_are_those_of_the_model(page: TestClient, model: str) -> None:
    import lora_core as lc

    facts = ask(page, "model", name=model)
    answer = ask(page, "weights", name=facts["name"])
    loaded, _ = lc.load_model(model)
    W0 = loaded.get_parameter("model.layers.1.self_attn.v_proj.weight")
    assert answer["norms"]["v"][1] == pytest.approx(float((W0.detach().double() ** 2).sum().sqrt()), rel=1e-4)
    assert set(answer["norms"]) == {m["name"] for m in facts["matrices"]}
    assert all(len(row) == facts["layers"] for row in answer["norms"].values())
    assert ask(page, "weights", name="another")["norms"] == {}  # none is loaded for it


def test_slices_of_a_fused_matrix_have_norms_of_their_own() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    found = norms(gpt2)
    W = gpt2.get_parameter("transformer.h.0.attn.c_attn.weight").detach()
    assert found["k"][0] == pytest.approx(float(torch.linalg.vector_norm(W[:, 8:16])), abs=1e-3)


@pytest.mark.slow
def test_an_address_with_a_form_but_no_run_means_the_usual_settings(page: TestClient, run: Run) -> None:
    plain = ask(page, "boot")
    assert plain["run"] == run.id and plain["form"] == plain["base"] and plain["form"]["spec"]["rank"] == 4
    linked = page.get("/lab/api/boot", params={"s.alpha": "3"}).json()
    assert linked["form"]["spec"]["rank"] == 8 and linked["base"]["spec"]["rank"] == 4
    both = page.get("/lab/api/boot", params={"s.alpha": "3", "run": str(run.id)}).json()
    assert both["form"]["spec"]["rank"] == 4
    lost = ask(page, "boot", model="no such model")
    assert "no model" in lost["fault"]
