"""EHR events on the study's grid: ``[record, step, variable]``, NaN where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hospitium_client.data.records import Records
from hospitium_client.data.tables import (
    labels,
    moments,
    numbers,
    optional,
    read_table,
    refuse,
    refuse_twice,
    texts,
)
from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hospitium_client.data.mapping import LongTable, WideTable
    from hospitium_common.study import Study
    from hospitium_common.study.schema import EventSchema, Variable

HOURS_PER_UNIT = {"hours": 1.0, "minutes": 1 / 60}


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """One entry per measurement: record number, hours since the window began, variable, value."""

    records: NDArray[np.int64]
    hours: NDArray[np.float64]
    variables: NDArray[np.int64]
    values: NDArray[np.float64]


def load_long(directory: Path, mapping: LongTable, study: Study, schema: EventSchema) -> Records:
    """Load one row per measurement; rows of variables that the study does not use are not read."""
    stays, path = _Stays.read(directory, mapping, schema), directory / mapping.events
    table = read_table(
        path,
        [mapping.key_column, mapping.time_column, mapping.variable_column, mapping.value_column],
    )
    names = {mapping.columns.get(v.name, v.name): i for i, v in enumerate(schema.variables)}
    variable = table[mapping.variable_column].astype(str).str.strip().map(names)
    used = table[variable.notna()]
    if used.empty:
        wanted = ", ".join(variable.name for variable in schema.variables)
        raise DataRejected(
            f"{path}: expected measurements of {wanted}, got none; map names in dataset.toml "
            "under [columns]"
        )
    found = Measurements(
        records=stays.positions(texts(used, mapping.key_column, path), path),
        hours=_hours(table, used, mapping, path, stays),
        variables=variable.dropna().to_numpy().astype(np.int64),
        values=numbers(used, mapping.value_column, path, mapping.missing),
    )
    return _assemble(stays, mapping, study, schema, found, path)


def load_wide(directory: Path, mapping: WideTable, study: Study, schema: EventSchema) -> Records:
    """Load one row per record and time, a column for each variable."""
    stays, path = _Stays.read(directory, mapping, schema), directory / mapping.events
    columns = [mapping.columns.get(variable.name, variable.name) for variable in schema.variables]
    table = read_table(path, [mapping.key_column, mapping.time_column, *columns])
    records = stays.positions(texts(table, mapping.key_column, path), path)
    stacked = np.stack([numbers(table, c, path, mapping.missing) for c in columns])
    found = Measurements(
        records=np.tile(records, len(columns)),
        hours=np.tile(_hours(table, table, mapping, path, stays), len(columns)),
        variables=np.repeat(np.arange(len(columns)), len(table)),
        values=stacked.ravel(),
    )
    return _assemble(stays, mapping, study, schema, found, path)


@dataclass(frozen=True, kw_only=True)
class _Stays:
    """The table of labels: one row per record, in the order of the record numbers."""

    path: Path
    table: pd.DataFrame
    names: NDArray[np.str_]

    @classmethod
    def read(cls, directory: Path, mapping: LongTable | WideTable, schema: EventSchema) -> _Stays:
        path = directory / mapping.labels
        needed = [mapping.key_column, mapping.patient_column, mapping.label_column]
        if mapping.admission_column is not None:
            needed.append(mapping.admission_column)
        statics = [mapping.columns.get(static.name, static.name) for static in schema.statics]
        table = read_table(path, needed + statics)
        names = texts(table, mapping.key_column, path)
        keys = pd.DataFrame({"record": names}, index=table.index)
        refuse_twice(keys, ["record"], path, "every record once")
        return cls(path=path, table=table, names=names)

    def positions(self, keys: NDArray[np.str_], events: Path) -> NDArray[np.int64]:
        """Return record numbers; -1 for records that nobody labelled."""
        found = pd.Index(self.names).get_indexer(pd.Index(keys)).astype(np.int64)
        if len(keys) and (found < 0).all():
            raise DataRejected(
                f"{self.path}: expected labels for the records of {events.name}, got none of them"
            )
        return found


def _assemble(
    stays: _Stays, mapping: LongTable | WideTable, study: Study, schema: EventSchema,
    found: Measurements, events: Path,
) -> Records:  # fmt: skip
    """Put measurements on the grid of the records that the table of labels names."""
    path, table = stays.path, stays.table
    names = [mapping.columns.get(static.name, static.name) for static in schema.statics]
    columns = [numbers(table, name, path, mapping.missing) for name in names]
    fixed = np.stack(columns, axis=1) if columns else np.zeros((len(table), 0))
    return Records(
        values=grid(schema, len(table), found, str(events)),
        statics=plausible(fixed.astype(np.float32), schema.statics),
        targets=labels(table, mapping.label_column, study.task.classes, path),
        patients=texts(table, mapping.patient_column, path),
        sites=optional(table, mapping.site_column, path),
        split=optional(table, mapping.split_column, path),
        synthetic=mapping.synthetic,
    )


def grid(schema: EventSchema, count: int, found: Measurements, where: str) -> NDArray[np.float32]:
    """Write measurements into their cells ``[record, step, variable]``: a step's last one stays.

    Raises:
        DataRejected: there are records, and not one plausible measurement in any window.
    """
    order = np.argsort(found.hours, kind="stable")
    records, hours = found.records[order], found.hours[order]
    variables, values = found.variables[order], found.values[order]
    low = np.array([v.low for v in schema.variables])[variables]
    high = np.array([v.high for v in schema.variables])[variables]
    usable = (records >= 0) & (values >= low) & (values <= high)
    usable &= (hours >= 0) & (hours < schema.window_hours)
    if count and not usable.any():
        raise DataRejected(
            f"{where}: expected measurements within the study's ranges in its window of "
            f"{schema.window_hours:g} hours, got none for any record; check times and units"
        )
    steps = (hours[usable] / schema.step_hours).astype(np.int64)
    cells = np.full((count, schema.steps, len(schema.variables)), np.nan, np.float32)
    cells[records[usable], np.minimum(steps, schema.steps - 1), variables[usable]] = values[usable]
    return cells


def plausible(values: NDArray[np.float32], variables: Sequence[Variable]) -> NDArray[np.float32]:
    """Return values ``[record, variable]`` with NaN for those outside the study's ranges."""
    low = np.array([v.low for v in variables], np.float32)
    high = np.array([v.high for v in variables], np.float32)
    return np.where((values >= low) & (values <= high), values, np.float32(np.nan))


def _hours(
    table: pd.DataFrame, used: pd.DataFrame, mapping: LongTable | WideTable, path: Path,
    stays: _Stays,
) -> NDArray[np.float64]:  # fmt: skip
    """Return the hours since the window began of the used rows of a table."""
    if mapping.time_unit != "timestamp":
        hours = numbers(used, mapping.time_column, path) * HOURS_PER_UNIT[mapping.time_unit]
        refuse(used, np.isnan(hours), path, mapping.time_column, "a time")
        return hours
    if mapping.admission_column is None:  # any row may be a record's first, used or not
        times = moments(table, mapping.time_column, path)
        first = times.groupby(texts(table, mapping.key_column, path)).transform("min")
        return (times - first).loc[used.index].dt.total_seconds().to_numpy(np.float64) / 3600
    times = moments(used, mapping.time_column, path)
    admitted = moments(stays.table, mapping.admission_column, stays.path)
    if (times.dt.tz is None) != (admitted.dt.tz is None):
        raise DataRejected(
            f"{path}, column {mapping.time_column!r}: expected times with an offset from UTC "
            f"exactly if {mapping.admission_column!r} of {stays.path.name} has one"
        )
    start = pd.Series(admitted.array, index=stays.names).reindex(
        texts(used, mapping.key_column, path)
    )
    since = times.reset_index(drop=True) - start.reset_index(drop=True)
    return since.dt.total_seconds().to_numpy(np.float64) / 3600
