"""The clipped sum over units: what differential privacy adds its noise to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hospitium_client.training.clipping.contributions import sum_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hospitium_client.training.clipping.contributions import Contribution

SMALLEST_NORM = 1e-6


@dataclass(frozen=True)
class ClippedSum:
    """Sum of the units' gradients, each scaled to at most the clipping norm; norms ``[units]``.

    ``dropped`` counts units whose gradient was not finite; they contribute exactly nothing.
    """

    gradients: list[tuple[Tensor, Tensor]]
    norms: Tensor
    dropped: int


def clipped_sum(
    contributions: Sequence[Contribution],
    *,
    unit_of: Tensor,
    units: int,
    weights: Tensor,
    clip_norm: float,
) -> ClippedSum:
    """Clip each unit's gradient (the weighted sum over its records) once, and add them up.

    ``unit_of`` and ``weights`` are ``[B]``. The contributions are used up.

    **Guarantees:** adding or removing one unit changes the result by at most ``clip_norm`` in
    the Euclidean norm over all parameters together.
    """
    if units == len(unit_of):
        norms = sum_of([c.squared_norms() for c in contributions]).sqrt() * weights
    else:
        norms = sum_of([_unit_norms(c, unit_of, units, weights) for c in contributions]).sqrt()
    bad = ~torch.isfinite(norms)
    if bad.any():
        for one in contributions:
            one.drop(bad[unit_of])
    scale = (clip_norm / (norms + SMALLEST_NORM)).clamp(max=1.0).masked_fill(bad, 0.0)
    factors = weights * scale[unit_of]
    gradients = [pair for one in contributions for pair in one.weighted_sum(factors)]
    return ClippedSum(gradients, norms, int(bad.sum()))


def _unit_norms(one: Contribution, unit_of: Tensor, units: int, weights: Tensor) -> Tensor:
    """Return squared norms ``[units]``: a unit's records are added up before anything is clipped.

    Only one parameter's gradients are written out at a time.
    """
    total = weights.new_zeros(units)
    for _, each in one.one_by_one():
        flat = each.flatten(1) * weights[:, None]
        summed = flat.new_zeros(units, flat.shape[1]).index_add_(0, unit_of, flat)
        total += summed.square_().sum(1)
    return total
