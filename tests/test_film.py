"""The film of a training: right spectra, from B = 0 on, at a small share of the time."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.runs import film as film_module
from app.runs.film import SHARE, Film
from app.runs.store import RunStore
from tests.pages_kit import model_folder, trained


def test_spectra_grow_from_zero_to_those_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_core.files import read_adapter

    monkeypatch.setattr(film_module, "SHARE", 10.0)  # steps of a tiny model are quicker than any picture
    store = RunStore(tmp_path, recorded=tmp_path / "nothing")
    run = trained(store, model_folder(tmp_path), config={"steps": 8, "lr": 1e-2})
    pictures = [(e["kind"], e["step"], e["sigma"]) for e in store.events(run.id) if e.get("sigma")]
    assert [(k, s) for k, s, _ in pictures] == [("base", 0), *(("step", s) for s in range(1, 9)), ("end", 8)]
    assert all(v == [0.0] * 4 for v in pictures[0][2].values()), "B is zero at the start"
    assert run.adapter is not None
    stored = read_adapter(run.adapter).sites
    assert set(stored) == set(pictures[-1][2])
    for key, s in stored.items():
        dense = s.scaling * s.B.astype(np.float64) @ s.A.astype(np.float64)
        assert pictures[-1][2][key] == pytest.approx(np.linalg.svd(dense, compute_uv=False)[:4], rel=1e-3, abs=1e-9)
        growth = [p[key][0] for _, _, p in pictures]
        assert growth[1] > 0 and growth[-1] > growth[1]


@pytest.mark.parametrize(("step_s", "picture_s"), [(1.0, 0.01), (0.1, 0.02), (0.01, 0.05)])
def test_pictures_stay_a_small_share_of_the_training(step_s: float, picture_s: float,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    now = [0.0]

    def spectra(adapter: Any) -> dict[str, Any]:
        now[0] += picture_s
        return {"k": SimpleNamespace(singular_values=(1.23456, 0.5))}

    monkeypatch.setattr(import_module("lora_core.spectra"), "spectra", spectra)
    adapter: Any = SimpleNamespace(sites={"k": 1}, spec=SimpleNamespace(dora=False))
    taken, film = [], Film(adapter, 400, clock=lambda: now[0])
    assert film.begin(0.0) == {"k": [1.235, 0.5]}
    for step in range(1, 401):
        if film.after(step, step * step_s):
            taken.append(step)
    assert film.spent <= SHARE * 400 * step_s or not taken, (film.spent, taken)
    assert len(taken) <= film_module.PICTURES + film_module.EARLY
    assert film.after(400, 400 * step_s, end=True), "the last one is always there"
    if picture_s < SHARE * step_s / 2:
        assert taken[:5] == [1, 2, 3, 4, 9] and taken[-1] > 385


def test_dora_has_no_film() -> None:
    adapter: Any = SimpleNamespace(sites={"k": 1}, spec=SimpleNamespace(dora=True))
    film = Film(adapter, 10)
    assert film.begin(0.0) is None and film.after(1, 1.0) is None and film.after(10, 1.0, end=True) is None
