"""Results as pandas frames, for whoever wants to go on from there. pandas is imported at the first use only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_core.errors import UserError

if TYPE_CHECKING:
    import pandas


def to_frame(results: Any) -> pandas.DataFrame:
    """A pandas DataFrame of results: a row for each.

    results  a result that has a `to_frame` of its own (an audit, cuts, spectra, an experiment's); or any of the
             library's results, or rows of plain values, as a list, as events come, or as {name: result}, whose names
             become the column "name". Objects give the columns of their `to_dict()`.

    Raises UserError where pandas is not installed, and for what is no result.
    """
    if hasattr(results, "to_frame"):
        return results.to_frame()
    if isinstance(results, Mapping):
        return frame([{"name": name, **_row(value)} for name, value in results.items()])
    if hasattr(results, "to_dict"):
        return frame([_row(results)])
    if isinstance(results, str) or not isinstance(results, Iterable):
        raise UserError(f"{type(results).__name__} is no result: give one, a list of them, or {{name: result}}")
    return frame([_row(r) for r in results])


def frame(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """The rows as a DataFrame; UserError where pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise UserError("frames need pandas, which is not installed: pip install pandas") from None
    return pandas.DataFrame([dict(r) for r in rows])


def _row(result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if hasattr(result, "to_dict"):
        return result.to_dict()
    raise UserError(f"{type(result).__name__} is no result: it has no to_dict()")
