"""The Medical Event Data Standard (MEDS 0.3): one window per label, ending at its prediction time.

Source: https://github.com/Medical-Event-Data-Standard/meds
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hospitium_client.data.events import Measurements, grid, plausible
from hospitium_client.data.records import Records
from hospitium_client.data.tables import (
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
    from pathlib import Path

    from numpy.typing import NDArray

    from hospitium_client.data.mapping import Meds
    from hospitium_common.study import Study
    from hospitium_common.study.schema import EventSchema

EVENT_COLUMNS = ("subject_id", "time", "code", "numeric_value")
LABEL_COLUMNS = ("subject_id", "prediction_time", "boolean_value")


def load_meds(directory: Path, mapping: Meds, study: Study, schema: EventSchema) -> Records:
    """Load MEDS events up to each label's prediction time.

    The window ends at the prediction time. Statics are the last value up to then, or a value
    without a time.
    """
    if len(study.task.classes) != 2:
        raise DataRejected(
            f"{directory / mapping.labels}: expected a study of two classes for boolean_value, "
            f"got one of {len(study.task.classes)}"
        )
    codes = {mapping.codes.get(v.name, v.name): v.name for v in schema.variables + schema.statics}
    truth = _labels(directory, mapping)
    events = _events(directory, mapping, codes)
    if (events["time"].dt.tz is None) != (truth["prediction_time"].dt.tz is None):
        raise DataRejected(
            f"{directory / mapping.events}, column 'time': expected times with an offset from "
            "UTC exactly if prediction_time has one"
        )
    joined = events.merge(truth[["subject", "prediction_time", "record"]], on="subject")
    joined = joined[joined["time"].isna() | (joined["time"] <= joined["prediction_time"])]
    joined = joined.sort_values("time", kind="stable", na_position="first")
    names, records = joined["code"].map(codes), joined["record"].to_numpy(np.int64)
    values = joined["value"].to_numpy(np.float64)
    before = (joined["prediction_time"] - joined["time"]).dt.total_seconds().to_numpy() / 3600
    # A measurement at the very moment of prediction belongs to the last step.
    hours = np.minimum(schema.window_hours - before, np.nextafter(schema.window_hours, 0))
    variable = names.map({v.name: i for i, v in enumerate(schema.variables)})
    dynamic = variable.notna().to_numpy() & ~np.isnan(hours)
    found = Measurements(
        records=records[dynamic],
        hours=hours[dynamic],
        variables=variable.to_numpy(np.float64)[dynamic].astype(np.int64),
        values=values[dynamic],
    )
    statics = np.full((len(truth), len(schema.statics)), np.nan, np.float32)
    for column, static in enumerate(schema.statics):
        chosen = (names == static.name).to_numpy()
        statics[records[chosen], column] = values[chosen]
    return Records(
        values=grid(schema, len(truth), found, str(directory / mapping.events)),
        statics=plausible(statics, schema.statics),
        targets=truth["label"].to_numpy(np.int64),
        patients=truth["subject"].to_numpy(dtype=str),
        sites=_optional(truth, "site"),
        split=_optional(truth, "split"),
        synthetic=mapping.synthetic,
    )


def _labels(directory: Path, mapping: Meds) -> pd.DataFrame:
    """Return ``subject, prediction_time, label, record``, and site and split if they are there."""
    parts = []
    for path in _files(directory, mapping.labels):
        table = read_table(path, LABEL_COLUMNS)
        truth = table["boolean_value"]
        wrong = ~truth.map(lambda cell: isinstance(cell, bool | np.bool_)).to_numpy(bool)
        refuse(table, wrong, path, "boolean_value", "true or false")
        part = pd.DataFrame(
            {
                "subject": texts(table, "subject_id", path),
                "prediction_time": moments(table, "prediction_time", path),
                "label": truth.astype(bool).astype(np.int64),
            },
            index=table.index,
        )
        for name, column in (("site", mapping.site_column), ("split", mapping.split_column)):
            cells = optional(table, column, path)
            if cells is not None:
                part[name] = cells
        parts.append(part)
    joined = pd.concat(parts)
    refuse_twice(
        joined, ["subject", "prediction_time"], directory / mapping.labels,
        "one label per subject and prediction time",
    )  # fmt: skip
    joined["record"] = np.arange(len(joined))
    return joined


def _events(directory: Path, mapping: Meds, codes: dict[str, str]) -> pd.DataFrame:
    """Return ``subject, time, code, value`` of the events that the study uses."""
    parts = []
    for path in _files(directory, mapping.events):
        table = read_table(path, EVENT_COLUMNS)
        table = table[table["code"].isin(list(codes))]
        timed = table[table["time"].notna()]
        part = pd.DataFrame(
            {
                "subject": texts(table, "subject_id", path),
                "time": moments(timed, "time", path).reindex(table.index),
                "code": table["code"],
                "value": numbers(table, "numeric_value", path),
            },
            index=table.index,
        )
        if not part.empty:
            parts.append(part)
    if not parts:
        raise DataRejected(
            f"{directory / mapping.events}: expected events with the study's codes, got none; map "
            "variables to codes in dataset.toml under [codes]"
        )
    return pd.concat(parts, ignore_index=True)


def _files(directory: Path, pattern: str) -> list[Path]:
    paths = sorted(directory.glob(pattern))
    if not paths:
        raise DataRejected(f"{directory / pattern}: expected parquet files, got none")
    return paths


def _optional(table: pd.DataFrame, column: str) -> NDArray[np.str_] | None:
    return table[column].to_numpy(dtype=str) if column in table else None
