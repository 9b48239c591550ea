"""Reads tables strictly: a wrong cell is named by file, row and column, and never shown."""

from __future__ import annotations

import csv
import gzip
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
import pandas as pd

from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

FIRST_CSV_ROW = 2
"""As a spreadsheet counts: row 1 holds the column names."""
FIRST_PARQUET_ROW = 1
MOMENT = r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?\s*(Z|[+-]\d\d:?\d\d)?"
"""An ISO 8601 date with a time of day; group 1 is the offset from UTC, if there is one."""


def read_table(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """Read CSV (also .gz) as text, or parquet as it is; all ``needed`` columns are there.

    The index holds the row numbers that messages name, and keeps them when rows are left out.

    Raises:
        DataRejected: no such file, not a table, a row of another length than the header, or a
            column is missing.
    """
    try:
        if path.suffix == ".parquet":
            table, first, ragged = pd.read_parquet(path), FIRST_PARQUET_ROW, None
            names = list(map(str, table.columns))
        else:
            names, ragged = _survey(path)
            table, first = pd.DataFrame() if ragged else _read_csv(path), FIRST_CSV_ROW
    except Exception as error:  # damaged files raise anything, and what it says may quote a cell
        reason = error.strerror if isinstance(error, OSError) else None
        raise DataRejected(
            f"{path}: expected a table with one header row (comma-separated UTF-8, also .gz, or "
            f"parquet), got: {reason or 'a file that cannot be read as one'}"
        ) from None
    if ragged:
        raise DataRejected(
            f"{path}, row {ragged}: expected as many fields as the header has, got more or fewer; "
            'put cells that hold a comma into "quotes"'
        )
    if len(set(names)) < len(names):
        raise DataRejected(f"{path}: expected every column name once, got one twice")
    for column in needed:
        _demand_column(table, column, path)
    table.index = pd.RangeIndex(first, first + len(table))
    return table


def numbers(
    table: pd.DataFrame, column: str, path: Path, missing: Sequence[str] = ()
) -> NDArray[np.float64]:
    """Return a column as numbers; empty cells and ``missing`` markers become NaN.

    Raises:
        DataRejected: a cell holds text, NaN spelled out, or infinity.
    """
    cells = table[column]
    if pd.api.types.is_numeric_dtype(cells):
        found = cells.to_numpy(np.float64, na_value=np.nan)
        wrong = np.isinf(found)
    else:
        text = cells.astype(str).str.strip()
        gap = (text == "").to_numpy() | (cells.isna() | text.isin(list(missing))).to_numpy()
        found = pd.to_numeric(text, errors="coerce").to_numpy(np.float64, copy=True)
        found[gap] = np.nan
        wrong = ~gap & ~np.isfinite(found)
    refuse(table, wrong, path, column, "a finite number or an empty cell")
    return found


def texts(table: pd.DataFrame, column: str, path: Path) -> NDArray[np.str_]:
    """Return a column of names; none may be empty. Whole numbers read the same in every format."""
    cells = table[column]
    gap = cells.isna()
    if pd.api.types.is_float_dtype(cells) and (cells[~gap] % 1 == 0).all():
        cells = cells.astype("Int64")  # parquet turns whole numbers with a gap into floats
    found = cells.astype(str).str.strip()
    refuse(table, (gap | (found == "")).to_numpy(), path, column, "a name")
    return found.to_numpy(dtype=str)


def labels(
    table: pd.DataFrame, column: str, classes: Sequence[str], path: Path
) -> NDArray[np.int64]:
    """Return class numbers; cells hold a class name or its number from 0."""
    text = table[column].astype(str).str.strip()
    known = {str(number): number for number in range(len(classes))}
    known |= {f"{number}.0": number for number in range(len(classes))}
    known |= {name: number for number, name in enumerate(classes)}
    found = text.map(known)
    expected = f"one of {', '.join(classes)} or its number"
    refuse(table, found.isna().to_numpy(), path, column, expected)
    return found.to_numpy().astype(np.int64)


def moments(table: pd.DataFrame, column: str, path: Path) -> pd.Series[pd.Timestamp]:
    """Return a column of points in time; in UTC if the cells carry an offset.

    Raises:
        DataRejected: a cell is not an ISO 8601 date with a time of day, or only some have offsets.
    """
    cells = table[column]
    if pd.api.types.is_datetime64_any_dtype(cells):
        found, aware = cells, cells.dt.tz is not None
    else:
        text = cells.astype(str).str.strip()
        shape = text.str.extract(f"^(?:{MOMENT})$")[0]
        fits = text.str.fullmatch(MOMENT).to_numpy(bool)
        offset = shape.notna().to_numpy()
        aware = bool(offset.any())
        mixed = fits & (offset != aware)
        refuse(table, mixed, path, column, "an offset from UTC, as other rows have,")
        found = pd.to_datetime(text.where(fits), format="ISO8601", errors="coerce", utc=aware)
    wrong = found.isna().to_numpy()
    refuse(table, wrong, path, column, "a date and a time such as 2026-03-01 14:30")
    return cast("pd.Series[pd.Timestamp]", found.dt.tz_convert("UTC") if aware else found)


def optional(table: pd.DataFrame, column: str | None, path: Path) -> NDArray[np.str_] | None:
    """Return a column that the mapping may leave out."""
    if column is None:
        return None
    _demand_column(table, column, path)
    return texts(table, column, path)


def refuse_twice(table: pd.DataFrame, columns: Sequence[str], path: Path, expected: str) -> None:
    """Refuse rows that agree in all ``columns``.

    Raises:
        DataRejected: two rows do; names both.
    """
    again = table.duplicated(list(columns)).to_numpy()
    if again.any():
        second = int(np.argmax(again))
        copies = table.iloc[: second + 1].duplicated(list(columns), keep="last").to_numpy()
        first = int(np.argmax(copies))
        raise DataRejected(
            f"{path}, rows {table.index[first]} and {table.index[second]}: expected {expected}, "
            f"got one again ({int(again.sum())} rows too many); leave out the copies"
        )


def refuse(
    table: pd.DataFrame, wrong: NDArray[Any], path: Path, column: str, expected: str
) -> None:
    """Raise a ``DataRejected`` that names the first wrong row and counts the others."""
    if wrong.any():
        row = table.index[int(np.argmax(wrong))]
        more = int(wrong.sum()) - 1
        also = f" (and in {more} more rows)" if more else ""
        raise DataRejected(
            f"{path}, row {row}, column {column!r}: expected {expected}, got something else{also}"
        )


def _demand_column(table: pd.DataFrame, column: str, path: Path) -> None:
    # A file without a header has a patient's values where names should be: none is repeated here.
    if column not in table.columns:
        raise DataRejected(
            f"{path}: expected a column {column!r}, got none of that name; add it, or name the "
            "right one in dataset.toml; row 1 must hold the column names"
        )


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast("TextIO", gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _survey(path: Path) -> tuple[list[str], int | None]:
    """Return the header, and the first row of another length; empty last lines are none."""
    with _open(path) as file:
        rows = csv.reader(file, strict=True)
        header, empty = next(rows), None
        for number, row in enumerate(rows, start=FIRST_CSV_ROW):
            if not row or (len(row) == 1 and not row[0].strip()):
                empty = empty or number
            elif empty or len(row) != len(header):
                return header, empty or number
    return header, None


def _read_csv(path: Path) -> pd.DataFrame:
    with _open(path) as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False, na_filter=False, index_col=False)
