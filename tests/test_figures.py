"""Figures: plain dictionaries that Plotly takes, drawn from the numbers and from nothing else."""

from __future__ import annotations

import json
import math
from typing import Any

import plotly.graph_objects as go
import pytest

from app import figures


def events(n: int = 30, base: float = 3.0, fall: float = 1.2) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"kind": "base", "step": 0, "steps": n, "held_loss": base, "loss": base}]
    for i in range(1, n + 1):
        found.append({"kind": "step", "step": i, "steps": n, "loss": base - fall * i / n, "lr": 1e-3})
        if i % 10 == 0:
            found.append({"kind": "held", "step": i, "steps": n, "held_loss": base - fall * i / n + 0.1})
    return [*found, {"kind": "end", "step": n, "steps": n, "held_loss": base - fall + 0.1, "reason": "done"}]


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    return next(t for t in figure["data"] if t["name"] == name)


@pytest.mark.parametrize("figure", [
    figures.loss([]),
    figures.loss(events()),
    figures.loss(events(), ghosts=[("run 3", events(20)), ("100 % <b>", events(40))]),
    figures.spectrum([2.0, 1.0, 0.5], [0.76, 0.95, 1.0], [1.5, 1.3, 1.2], [0.4, 0.7, 1.0], needed=2),
    figures.spectrum([1.0], [1.0], [1.0], [1.0], needed=1),
    figures.spectrum([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    figures.heatmap({"q": [1.0, None], "v": [0.5, 0.2]}, "‖ΔW‖"),
    figures.heatmap({}, "effective rank", norm=False),
])  # fmt: skip
def test_plotly_accepts_every_figure_and_json_can_carry_it(figure: dict[str, Any]) -> None:
    go.Figure(figure)  # raises for a property that does not exist
    assert json.loads(json.dumps(figure, allow_nan=False)) == figure


def test_axes_have_titles_with_units() -> None:
    layout = figures.loss(events())["layout"]
    assert (layout["xaxis"]["title"]["text"], layout["yaxis"]["title"]["text"]) == ("step", "loss (nats a token)")
    layout = figures.spectrum([1.0, 0.1], [0.99, 1.0], [0.7, 0.7], [0.5, 1.0], needed=1)["layout"]
    assert "σ" in layout["yaxis"]["title"]["text"] and "%" in layout["yaxis2"]["title"]["text"]


def test_the_curve_is_the_events() -> None:
    figure = figures.loss(events())
    assert trace(figure, "training")["x"] == list(range(1, 31))
    assert trace(figure, "training")["y"][0] == pytest.approx(3.0 - 1.2 / 30)
    held = trace(figure, "held out")
    assert held["x"] == [0, 10, 20, 30] and held["y"][0] == 3.0 and held["y"][-1] == pytest.approx(1.9)
    texts = [a["text"] for a in figure["layout"]["annotations"]]
    assert "base model 3.00" in texts and "<b>1.90</b>" in texts
    assert figure["layout"]["shapes"][0]["y0"] == 3.0


def test_nothing_is_drawn_that_was_not_measured() -> None:
    figure = figures.loss([{"kind": "step", "step": 1, "steps": 5, "loss": 2.0}])
    assert not figure["layout"]["shapes"]  # no base loss known, so no line
    assert trace(figure, "held out")["y"] == []
    gaps = [{"kind": "step", "step": 1, "steps": 5, "loss": None}, {"kind": "held", "step": 1, "held_loss": math.nan}]
    broken = figures.loss(gaps)
    assert trace(broken, "training")["y"] == [] and trace(broken, "held out")["y"] == []


def test_the_axis_holds_all_values_and_stands_still_while_a_run_begins() -> None:
    whole = events()
    first = figures.loss(whole[:1])["layout"]["yaxis"]["range"]
    later = figures.loss(whole[:15])["layout"]["yaxis"]["range"]
    assert first[0] < 0.6 * 3.0 and first[1] > 3.0
    assert later[0] == pytest.approx(first[0], abs=0.2)
    low, high = figures.loss(events(fall=2.9))["layout"]["yaxis"]["range"]
    assert low < 0.2 and high > 3.0


def test_a_ghost_has_its_name_and_its_last_held_out_loss() -> None:
    figure = figures.loss(events(), ghosts=[("run 3", events(40, fall=1.0))])
    assert "run 3 2.10" in [a["text"] for a in figure["layout"]["annotations"]]
    assert figure["layout"]["xaxis"]["range"][1] > 40


def test_names_are_shown_as_they_stand() -> None:
    figure = figures.loss(events(), ghosts=[("<b>50 %</b>", events(4))])
    assert any(a["text"].startswith("&lt;b>50 %%") for a in figure["layout"]["annotations"])


def test_long_runs_are_thinned_and_keep_their_last_point() -> None:
    points = [(i, float(i)) for i in range(100_001)]
    kept = figures.thin(points)
    assert len(kept) <= figures.MOST_POINTS + 1 and kept[-1] == points[-1]
    assert figures.thin(points[:10]) == points[:10] and figures.thin([]) == []


def test_smoothing_starts_at_the_first_value_and_follows_a_constant() -> None:
    assert figures.smooth([4.0, 0.0], keep=0.75) == [4.0, 3.0]
    assert figures.smooth([2.0] * 5) == [2.0] * 5


def test_directions_that_hold_ninety_percent_are_filled() -> None:
    figure = figures.spectrum([2.0, 1.0, 0.5], [0.76, 0.95, 1.0], [1.5, 1.3, 1.2], [0.4, 0.7, 1.0], needed=2)
    assert trace(figure, "ΔW, energy")["marker"]["color"] == [figures.WARM_FILL, figures.WARM_FILL, figures.WARM_SOFT]
    assert trace(figure, "ΔW")["y"] == [2.0, 1.0, 0.5]


def test_the_norm_has_the_ramp_of_all_tabs_and_other_measures_another() -> None:
    assert figures.heatmap({"q": [1.0]}, "‖ΔW‖")["data"][0]["colorscale"] == figures.RAMP
    assert figures.heatmap({"q": [1.0]}, "effective rank", norm=False)["data"][0]["colorscale"] == "Cividis"
