"""From records to what a model sees: normalised, gaps filled and marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hospitium_client.samples import Samples
from hospitium_common.normalisation import SUM_SCALE, on_scale, ranges
from hospitium_common.study.schema import EventSchema, ImageSchema, TableSchema

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hospitium_client.data.records import Records
    from hospitium_common.normalisation import Normalisation
    from hospitium_common.study import Study

    Floats = NDArray[np.float32]


LARGEST_SCORE = 10.0
"""Standardised values stay within ±10: one odd value must not rule a gradient."""


def feature_sums(records: Records, study: Study) -> NDArray[np.int64]:
    """Return ``[patients | sum of means | sum of mean squares, feature]`` for the normalisation.

    Values are mapped from their public range to 0…1. Every patient has one part in each column:
    the mean of all values measured, and the mean of their squares, in steps of 2^-20. Images
    count their pixels' mean and mean square.

    **Guarantees:** the first row counts patients, and a patient moves each sum by at most 1 (2^20
    steps), however many records or measurements there are.
    """
    schema = study.data
    _, owners = np.unique(records.patients, return_inverse=True)
    if isinstance(schema, ImageSchema):
        means = records.values.mean(axis=(2, 3), dtype=np.float64)
        squares = (records.values**2).mean(axis=(2, 3), dtype=np.float64)
        return _patient_sums(means[:, None], squares[:, None], owners)
    low, high = ranges(study).T
    columns = np.split(
        np.arange(len(low)), [len(low) - records.statics.shape[1]]
    )  # variables first, then statics
    parts = []
    for at, values in zip(columns, _measured(records, schema), strict=True):
        scaled = np.clip((values - low[at]) / (high[at] - low[at]), 0, 1)
        parts.append(_patient_sums(scaled, scaled**2, owners))
    return np.concatenate(parts, axis=1)


def _patient_sums(
    values: NDArray[np.float64], squares: NDArray[np.float64], owners: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Average values ``[record, measurement, feature]`` per patient, then add up the patients."""
    patients, features = int(owners.max(initial=-1)) + 1, values.shape[2]
    count, total, total_squares = np.zeros((3, patients, features))
    np.add.at(count, owners, np.count_nonzero(~np.isnan(values), axis=1))
    np.add.at(total, owners, np.nansum(values, axis=1))
    np.add.at(total_squares, owners, np.nansum(squares, axis=1))
    often = np.maximum(count, 1)
    sums = np.stack(
        [
            np.count_nonzero(count, axis=0),
            (total / often).sum(axis=0) * SUM_SCALE,
            (total_squares / often).sum(axis=0) * SUM_SCALE,
        ]
    )
    whole: NDArray[np.int64] = np.rint(sums).astype(np.int64)
    return whole


def _measured(
    records: Records, schema: EventSchema | TableSchema
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return variables and statics on their scale, each ``[record, measurement, feature]``."""
    values, statics = records.values.astype(np.float64), records.statics.astype(np.float64)
    if isinstance(schema, TableSchema):
        return on_scale(values[:, None], schema.columns), statics[:, None]
    return on_scale(values, schema.variables), on_scale(statics[:, None], schema.statics)


def prepare(records: Records, normalisation: Normalisation, study: Study) -> Samples:
    """Return samples for the study's model.

    Images are centred and scaled per channel. Events become ``[record, step, feature]`` with,
    per variable, the last value carried forward, whether it was measured in this step, and how
    long ago (1 = the whole window, or never); statics ride along with their own flags; the last
    feature marks real steps. Table rows keep a flag per column if the study asks for it.
    Standardised values are clipped to ±10.
    """
    schema = study.data
    if isinstance(schema, ImageSchema):
        inputs = _clipped(normalisation.apply(records.values, axis=1))
    elif isinstance(schema, EventSchema):
        inputs = _events(records, normalisation, schema)
    else:
        scaled = _clipped(normalisation.apply(on_scale(records.values, schema.columns), axis=1))
        measured = ~np.isnan(scaled)
        inputs = np.nan_to_num(scaled, nan=0.0)
        if schema.missing == "mask":
            inputs = np.concatenate([inputs, measured], axis=1, dtype=np.float32)
    _, patients = np.unique(records.patients, return_inverse=True)
    return Samples(
        inputs=torch.from_numpy(np.ascontiguousarray(inputs, np.float32)),
        targets=torch.from_numpy(records.targets.copy()),
        patients=torch.from_numpy(patients.astype(np.int64)),
    )


def _clipped(values: Floats) -> Floats:
    return np.clip(values, -LARGEST_SCORE, LARGEST_SCORE)


def carried_forward(values: Floats) -> tuple[Floats, Floats]:
    """Return the last value seen along axis 1 and the steps since; NaN and -1 before the first."""
    steps = np.arange(values.shape[1])[None, :, None]
    last = np.maximum.accumulate(np.where(np.isnan(values), -1, steps), axis=1)
    filled = np.take_along_axis(values, np.maximum(last, 0), axis=1)
    since = np.where(last >= 0, steps - last, -1).astype(np.float32)
    return np.where(last >= 0, filled, np.nan).astype(np.float32), since


def _events(records: Records, normalisation: Normalisation, schema: EventSchema) -> Floats:
    count, steps, variables = records.values.shape
    values = on_scale(records.values, schema.variables)
    scaled = (values - normalisation.means[:variables]) / normalisation.deviations[:variables]
    filled, since = carried_forward(_clipped(scaled.astype(np.float32)))
    features = np.zeros((count, steps, schema.features), np.float32)
    features[..., :variables] = np.nan_to_num(filled, nan=0.0)
    features[..., variables : 2 * variables] = ~np.isnan(records.values)
    features[..., 2 * variables : 3 * variables] = np.where(since < 0, 1.0, since / steps)
    statics = records.statics.shape[1]
    known = on_scale(records.statics, schema.statics)
    scaled = (known - normalisation.means[variables:]) / normalisation.deviations[variables:]
    fixed = _clipped(scaled.astype(np.float32))
    at = 3 * variables
    features[..., at : at + statics] = np.nan_to_num(fixed, nan=0.0)[:, None]
    features[..., at + statics : at + 2 * statics] = ~np.isnan(fixed)[:, None]
    features[..., -1] = 1.0
    return features
