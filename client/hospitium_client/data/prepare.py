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


def feature_sums(records: Records, study: Study) -> NDArray[np.int64]:
    """Return ``[count | sum | sum of squares, feature]`` for the federated normalisation.

    Values are mapped from their public range to 0…1 and summed in steps of 2^-20; images count
    their pixels' means, so that no word grows with their size.
    """
    schema = study.data
    if isinstance(schema, ImageSchema):
        means = records.values.mean(axis=(2, 3), dtype=np.float64)
        squares = (records.values.astype(np.float64) ** 2).mean(axis=(2, 3))
        columns, squared = means, squares
    else:
        low, high = ranges(study).T
        values = _feature_columns(records, schema)
        columns = (values - low) / (high - low)
        squared = columns**2
    count = np.count_nonzero(~np.isnan(columns), axis=0)
    total = np.nansum(columns, axis=0) * SUM_SCALE
    total_squares = np.nansum(squared, axis=0) * SUM_SCALE
    sums: NDArray[np.int64] = np.rint(np.stack([count, total, total_squares])).astype(np.int64)
    return sums


def prepare(records: Records, normalisation: Normalisation, study: Study) -> Samples:
    """Return samples for the study's model.

    Images are centred and scaled per channel. Events become ``[record, step, feature]`` with,
    per variable, the last value carried forward, whether it was measured in this step, and how
    long ago (1 = the whole window, or never); statics ride along with their own flags; the last
    feature marks real steps. Table rows keep a flag per column if the study asks for it.
    """
    schema = study.data
    if isinstance(schema, ImageSchema):
        inputs = normalisation.apply(records.values, axis=1)
    elif isinstance(schema, EventSchema):
        inputs = _events(records, normalisation, schema)
    else:
        scaled = normalisation.apply(on_scale(records.values, schema.columns), axis=1)
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


def _feature_columns(records: Records, schema: EventSchema | TableSchema) -> NDArray[np.float64]:
    """Stack every measurement and every static into ``[row, feature]``, NaN in between."""
    if isinstance(schema, TableSchema):
        return on_scale(records.values.astype(np.float64), schema.columns)
    rows = records.values.reshape(-1, records.values.shape[2]).astype(np.float64)
    variables = on_scale(rows, schema.variables)
    if records.statics.shape[1] == 0:
        return variables
    statics = np.full((len(variables), records.statics.shape[1]), np.nan)
    statics[: len(records)] = on_scale(records.statics, schema.statics)
    return np.concatenate([variables, statics], axis=1)


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
    filled, since = carried_forward(scaled.astype(np.float32))
    features = np.zeros((count, steps, schema.features), np.float32)
    features[..., :variables] = np.nan_to_num(filled, nan=0.0)
    features[..., variables : 2 * variables] = ~np.isnan(records.values)
    features[..., 2 * variables : 3 * variables] = np.where(since < 0, 1.0, since / steps)
    statics = records.statics.shape[1]
    known = on_scale(records.statics, schema.statics)
    fixed = (known - normalisation.means[variables:]) / normalisation.deviations[variables:]
    at = 3 * variables
    features[..., at : at + statics] = np.nan_to_num(fixed, nan=0.0)[:, None]
    features[..., at + statics : at + 2 * statics] = ~np.isnan(fixed)[:, None]
    features[..., -1] = 1.0
    return features
