"""What the notebooks' explorers are made of: a live chart, and controls, charts and a sentence in a column."""

from __future__ import annotations

from typing import Any, cast

import ipywidgets as W
import plotly.graph_objects as go

from app.figures import Figure
from app.notebook import titled


class Chart(go.FigureWidget):
    """A live Plotly figure that is given whole figures, as app.figures makes them."""

    def __init__(self, figure: Figure, title: str = "", height: int = 380) -> None:
        super().__init__(titled(figure, title, height))
        self._words, self._tall = title, height

    def put(self, figure: Figure, title: str | None = None) -> None:
        """Show this figure instead, with as few messages as that takes."""
        self._words = self._words if title is None else title
        figure = titled(figure, self._words, self._tall)
        with self.batch_update():
            traces = cast(Any, self).data
            if [t.type for t in traces] == [d.get("type", "scatter") for d in figure["data"]]:
                for trace, d in zip(traces, figure["data"]):
                    trace.update(d, overwrite=True)
            else:
                self.data = ()
                self.add_traces(figure["data"])
            self.update_layout(figure["layout"], overwrite=True)


class Explorer(W.VBox):
    """Controls, figures and one sentence."""

    def __init__(self, *rows: W.Widget) -> None:
        self.say = W.HTML()
        super().__init__([*rows, self.say], layout=W.Layout(padding="4px 0"))

    def tell(self, words: str) -> None:
        """The sentence below the figures; may hold <b>."""
        self.say.value = f"<p style='font-size:16px;line-height:1.4;margin:6px 0'>{words}</p>"
