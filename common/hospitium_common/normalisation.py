"""Means and spreads of the features over all hospitals, from one masked sum before round 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import PeerProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hospitium_common.study import Study
    from hospitium_common.study.schema import Variable

F = TypeVar("F", np.float32, np.float64)

SUM_SCALE = 2.0**20
"""Sums are taken over values mapped from their plausible range to 0…1, in steps of 2^-20."""
FEWEST_PATIENTS = 20
"""Who has a feature that fewer patients have must not show in its mean."""
SMALLEST_SPREAD = 1e-3
LARGEST_SPREAD = 0.5
"""Of values in 0…1: half of them 0, half of them 1."""


def ranges(study: Study) -> NDArray[np.float64]:
    """Return ``[feature, low | high]``: the public range of every feature, on its scale."""
    data = study.data
    if data.kind == "image":
        return np.tile([0.0, 1.0], (data.channels, 1))
    variables = data.columns if data.kind == "table" else data.variables + data.statics
    limits = np.array([(variable.low, variable.high) for variable in variables], np.float64)
    return on_scale(limits.T, variables).T


def on_scale(values: NDArray[F], variables: Sequence[Variable]) -> NDArray[F]:
    """Return values ``[..., variable]`` with the logarithm taken where the variable asks for it."""
    logarithmic = [at for at, variable in enumerate(variables) if variable.scale == "log"]
    if not logarithmic:
        return values
    scaled = values.copy()
    scaled[..., logarithmic] = np.log(values[..., logarithmic])
    return scaled


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Mean and standard deviation per feature, in the variables' own units (or their logarithm)."""

    means: NDArray[np.float64]
    deviations: NDArray[np.float64]

    @classmethod
    def from_totals(cls, totals: NDArray[np.int64], study: Study) -> Normalisation:
        """Turn ``[patients | sum of their means | of their mean squares, feature]`` into figures.

        **Guarantees:** every patient has one part in a figure, however often measured, and a
        feature of fewer than ``FEWEST_PATIENTS`` patients keeps the middle and a quarter of its
        range, so that a handful of patients does not show. Both figures stay within the range.
        """
        low, high = ranges(study).T
        count = np.maximum(totals[0], 1)
        mean = np.clip(totals[1] / SUM_SCALE / count, 0, 1)
        variance = totals[2] / SUM_SCALE / count - mean**2
        deviation = np.sqrt(np.clip(variance, SMALLEST_SPREAD**2, LARGEST_SPREAD**2))
        few = totals[0] < FEWEST_PATIENTS
        mean, deviation = np.where(few, 0.5, mean), np.where(few, 0.25, deviation)
        return cls(means=low + mean * (high - low), deviations=deviation * (high - low))

    def apply(self, values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Centre and scale along the feature axis; NaN stays NaN."""
        shape = [1] * values.ndim
        shape[axis] = -1
        means = self.means.astype(np.float32).reshape(shape)
        return (values - means) / self.deviations.astype(np.float32).reshape(shape)

    def encode(self) -> bytes:
        """Return the figures as bytes."""
        return encode_parts(self.means.tobytes(), self.deviations.tobytes())

    @classmethod
    def decode(cls, data: bytes, study: Study) -> Normalisation:
        """Read what ``encode`` wrote for this study.

        Raises:
            PeerProtocolError: the bytes do not fit the study.
        """
        reader, features = Reader(data), len(ranges(study))
        means = np.frombuffer(reader.bytes(8 * features))
        deviations = np.frombuffer(reader.bytes(8 * features))
        reader.finish()
        if not (
            np.isfinite(means).all() and np.isfinite(deviations).all() and deviations.min() > 0
        ):
            raise PeerProtocolError("expected finite means and positive deviations", blame=0)
        return cls(means=means, deviations=deviations)
