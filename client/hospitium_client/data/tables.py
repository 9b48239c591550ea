"""Reads tables strictly: a wrong cell is named by file, row and column, and never shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

FIRST_ROW = 2
"""Row numbers as a spreadsheet shows them: row 1 holds the column names."""


def read_table(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """Read CSV (also .gz) as text, or parquet as it is; all ``needed`` columns are there.

    Raises:
        DataRejected: no such file, not a table, or a column is missing.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
    except OSError as error:
        raise DataRejected(f"{path}: expected a table, got: {error.strerror}") from error
    except (ValueError, pd.errors.ParserError) as error:
        raise DataRejected(
            f"{path}: expected a table with one header row, could not read one"
        ) from error
    for column in needed:
        if column not in table.columns:
            raise DataRejected(
                f"{path}: expected a column {column!r}, got {', '.join(map(str, table.columns))}; "
                "add it, or name the right one in dataset.toml"
            )
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
        gap = (text == "").to_numpy() | text.isin(list(missing)).to_numpy()
        found = pd.to_numeric(text, errors="coerce").to_numpy(np.float64, copy=True)
        found[gap] = np.nan
        wrong = ~gap & ~np.isfinite(found)
    _refuse(wrong, path, column, "a finite number or an empty cell")
    return found


def texts(table: pd.DataFrame, column: str, path: Path) -> NDArray[np.str_]:
    """Return a column of names; none may be empty."""
    found = table[column].astype(str).str.strip().to_numpy(dtype=str)
    _refuse(found == "", path, column, "a name")
    return found


def labels(
    table: pd.DataFrame, column: str, classes: Sequence[str], path: Path
) -> NDArray[np.int64]:
    """Return class numbers; cells hold a class name or its number from 0."""
    text = table[column].astype(str).str.strip()
    known = {str(number): number for number in range(len(classes))}
    known |= {f"{number}.0": number for number in range(len(classes))}
    known |= {name: number for number, name in enumerate(classes)}
    found = text.map(known)
    _refuse(found.isna().to_numpy(), path, column, f"one of {', '.join(classes)} or its number")
    return found.to_numpy().astype(np.int64)


def optional(table: pd.DataFrame, column: str | None, path: Path) -> NDArray[np.str_] | None:
    """Return a column that the mapping may leave out."""
    if column is None:
        return None
    if column not in table.columns:
        raise DataRejected(f"{path}: expected a column {column!r}, as dataset.toml says")
    return texts(table, column, path)


def _refuse(wrong: NDArray[Any], path: Path, column: str, expected: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong)) + FIRST_ROW
        more = int(wrong.sum()) - 1
        also = f" (and in {more} more rows)" if more else ""
        raise DataRejected(
            f"{path}, row {row}, column {column!r}: expected {expected}, got something else{also}"
        )
