"""EHR events on the study's grid: ``[record, step, variable]``, NaN where nothing was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hospitium_client.data.records import Records
from hospitium_client.data.tables import labels, numbers, optional, read_table, texts
from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hospitium_client.data.mapping import LongTable, Meds, WideTable
    from hospitium_common.study import Study
    from hospitium_common.study.schema import EventSchema, Variable

HOURS_PER_UNIT = {"hours": 1.0, "minutes": 1 / 60}
MEDS_EVENTS = ("subject_id", "time", "code", "numeric_value")
MEDS_LABELS = ("subject_id", "prediction_time", "boolean_value")


def load_long(directory: Path, mapping: LongTable, study: Study, schema: EventSchema) -> Records:
    """Load one row per measurement; unknown variables are left out."""
    path, record_column = (
        directory / mapping.events,
        mapping.record_column or mapping.patient_column,
    )
    table = read_table(
        path,
        [record_column, mapping.time_column, mapping.variable_column, mapping.value_column],
    )
    names = {mapping.columns.get(v.name, v.name): i for i, v in enumerate(schema.variables)}
    variable = table[mapping.variable_column].astype(str).map(names).to_numpy(np.float64)
    known = ~np.isnan(variable)
    if not known.any():
        wanted = ", ".join(variable.name for variable in schema.variables)
        raise DataRejected(
            f"{path}: expected measurements of {wanted}, got none; map names in dataset.toml "
            "under [columns]"
        )
    return _assemble(
        directory,
        mapping,
        study,
        schema,
        texts(table, record_column, path)[known],
        _hours(table, mapping, path)[known],
        variable[known].astype(np.int64),
        numbers(table, mapping.value_column, path, mapping.missing)[known],
    )


def load_wide(directory: Path, mapping: WideTable, study: Study, schema: EventSchema) -> Records:
    """Load one row per record and time, a column for each variable."""
    path, record_column = (
        directory / mapping.events,
        mapping.record_column or mapping.patient_column,
    )
    columns = [mapping.columns.get(variable.name, variable.name) for variable in schema.variables]
    table = read_table(path, [record_column, mapping.time_column, *columns])
    keys, times = texts(table, record_column, path), _hours(table, mapping, path)
    rows = np.arange(len(table))
    stacked = np.stack([numbers(table, c, path, mapping.missing) for c in columns])
    return _assemble(
        directory,
        mapping,
        study,
        schema,
        np.tile(keys, len(columns)),
        np.tile(times, len(columns)),
        np.repeat(np.arange(len(columns)), len(rows)),
        stacked.ravel(),
    )


def load_meds(directory: Path, mapping: Meds, study: Study, schema: EventSchema) -> Records:
    """Load MEDS events up to each label's prediction time.

    The window ends at the prediction time. Statics are the last value up to then, or a value
    without a time.
    """
    events = _read_parquet(directory, mapping.events, MEDS_EVENTS)
    truth = _read_parquet(directory, mapping.labels, MEDS_LABELS)
    truth = truth.reset_index(drop=True)
    truth["record"] = np.arange(len(truth))
    codes = {mapping.codes.get(v.name, v.name): v.name for v in schema.variables + schema.statics}
    events = events[events["code"].isin(list(codes))]
    joined = events.merge(truth[["subject_id", "prediction_time", "record"]], on="subject_id")
    joined = joined[joined["time"].isna() | (joined["time"] <= joined["prediction_time"])]
    if np.isinf(joined["numeric_value"].to_numpy(np.float64, na_value=np.nan)).any():
        raise DataRejected(
            f"{directory / mapping.events}, column 'numeric_value': expected finite numbers, got "
            "infinity"
        )
    joined = joined.sort_values("time", kind="stable", na_position="first")
    names = joined["code"].map(codes)
    before = (joined["prediction_time"] - joined["time"]).dt.total_seconds().to_numpy() / 3600
    at = schema.window_hours - before
    order = {v.name: i for i, v in enumerate(schema.variables)}
    variable = names.map(order)
    dynamic = variable.notna().to_numpy() & ~np.isnan(at)
    records = joined["record"].to_numpy()
    values = joined["numeric_value"].to_numpy(np.float64, na_value=np.nan)
    # A measurement at the very moment of prediction belongs to the last step.
    at = np.where(at == schema.window_hours, np.nextafter(schema.window_hours, 0), at)
    grid = _grid(
        schema, len(truth), records[dynamic], at[dynamic],
        variable.to_numpy()[dynamic].astype(np.int64), values[dynamic],
    )  # fmt: skip
    statics = np.full((len(truth), len(schema.statics)), np.nan, np.float32)
    for column, static in enumerate(schema.statics):
        chosen = (names == static.name).to_numpy()
        statics[records[chosen], column] = values[chosen]
    return Records(
        values=grid,
        statics=_plausible(statics, schema.statics),
        targets=truth["boolean_value"].astype(bool).to_numpy().astype(np.int64),
        patients=truth["subject_id"].astype(str).to_numpy(dtype=str),
        synthetic=mapping.synthetic,
    )


def _assemble(
    directory: Path,
    mapping: LongTable | WideTable,
    study: Study,
    schema: EventSchema,
    keys: NDArray[np.str_],
    times: NDArray[np.float64],
    variables: NDArray[np.int64],
    values: NDArray[np.float64],
) -> Records:
    """Put measurements on the grid of the records that the table of labels names."""
    path, record_column = (
        directory / mapping.labels,
        mapping.record_column or mapping.patient_column,
    )
    statics = [mapping.columns.get(v.name, v.name) for v in schema.statics]
    table = read_table(
        path, [record_column, mapping.patient_column, mapping.label_column, *statics]
    )
    names = texts(table, record_column, path)
    twice = pd.Series(names).duplicated().to_numpy()
    if twice.any():
        row = int(np.argmax(twice)) + 2
        raise DataRejected(f"{path}, row {row}: expected every record once, got one again")
    position = pd.Series(np.arange(len(names)), index=names)
    found = position.reindex(keys).to_numpy(np.float64)
    if np.isnan(found).all() and len(keys):
        raise DataRejected(
            f"{path}: expected labels for the records of {mapping.events}, got none of them"
        )
    known = ~np.isnan(found)
    order = np.argsort(times[known], kind="stable")
    grid = _grid(
        schema, len(names), found[known][order].astype(np.int64), times[known][order],
        variables[known][order], values[known][order],
    )  # fmt: skip
    still = [numbers(table, column, path, mapping.missing) for column in statics]
    fixed = np.stack(still, 1) if still else np.zeros((len(names), 0))
    return Records(
        values=grid,
        statics=_plausible(fixed.astype(np.float32), schema.statics),
        targets=labels(table, mapping.label_column, study.task.classes, path),
        patients=texts(table, mapping.patient_column, path),
        sites=optional(table, mapping.site_column, path),
        split=optional(table, mapping.split_column, path),
        synthetic=mapping.synthetic,
    )


def _grid(
    schema: EventSchema,
    count: int,
    records: NDArray[np.int64],
    hours: NDArray[np.float64],
    variables: NDArray[np.int64],
    values: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Write measurements, in order of time, into their cells: the last one of a step stays."""
    low = np.array([v.low for v in schema.variables])[variables]
    high = np.array([v.high for v in schema.variables])[variables]
    usable = (values >= low) & (values <= high) & (hours >= 0) & (hours < schema.window_hours)
    steps = (hours[usable] / schema.step_hours).astype(np.int64)
    grid = np.full((count, schema.steps, len(schema.variables)), np.nan, np.float32)
    grid[records[usable], np.minimum(steps, schema.steps - 1), variables[usable]] = values[usable]
    return grid


def _plausible(values: NDArray[np.float32], variables: Sequence[Variable]) -> NDArray[np.float32]:
    low = np.array([v.low for v in variables], np.float32)
    high = np.array([v.high for v in variables], np.float32)
    return np.where((values >= low) & (values <= high), values, np.float32(np.nan))


def _hours(table: pd.DataFrame, mapping: LongTable | WideTable, path: Path) -> NDArray[np.float64]:
    times = numbers(table, mapping.time_column, path) * HOURS_PER_UNIT[mapping.time_unit]
    if np.isnan(times).any():
        row = int(np.argmax(np.isnan(times))) + 2
        raise DataRejected(
            f"{path}, row {row}, column {mapping.time_column!r}: expected a time, got a gap"
        )
    return times


def _read_parquet(directory: Path, pattern: str, columns: Sequence[str]) -> pd.DataFrame:
    paths = sorted(directory.glob(pattern))
    if not paths:
        raise DataRejected(f"{directory / pattern}: expected parquet files, got none")
    parts = [read_table(path, columns)[list(columns)] for path in paths]
    return pd.concat(parts, ignore_index=True)
