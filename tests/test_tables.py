"""Tables for spreadsheets: what is read back is what was given, and no cell is a formula."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from app.tables import as_csv

CELLS = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)  # fmt: skip


@given(st.lists(st.lists(CELLS | st.sampled_from(("=1+1", "+cmd", "-2+3", "@x", "\tx", "\r=1", "-1.5", "+3e5")),
                         min_size=2, max_size=4), min_size=1, max_size=4))  # fmt: skip
def test_no_cell_is_a_formula_and_every_other_is_as_it_was(rows: list[list[object]]) -> None:
    back = list(csv.reader(io.StringIO(as_csv(rows), newline="")))
    assert len(back) == len(rows)
    for row, read in zip(rows, back, strict=True):
        assert len(row) == len(read)
        for value, text in zip(row, read, strict=True):
            if text.startswith(("=", "+", "-", "@", "\t", "\r")):
                float(text)  # only numbers may begin so
            assert text in ("" if value is None else str(value), f"'{value}")


def test_numbers_stay_numbers() -> None:
    assert as_csv([[-1.5, 2, None, "-1.5", "+3e5", "=1+1", "-2+3"]]) == "-1.5,2,,-1.5,+3e5,'=1+1,'-2+3\r\n"
