"""The clipped sum over units: what differential privacy adds its noise to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter

    from hospitium_client.training.clipping.contributions import Contribution


@dataclass(frozen=True)
class ClippedSum:
    """Sum of the units' gradients, each scaled to at most the clipping norm; norms ``[units]``.

    ``dropped`` counts units whose gradient was not finite; they contribute exactly nothing.
    """

    gradients: list[tuple[Parameter, Tensor]]
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

    ``unit_of`` and ``weights`` are ``[B]``.

    **Guarantees:** adding or removing one unit changes the result by at most ``clip_norm`` in
    the Euclidean norm over all parameters together.
    """
    if units == len(unit_of):
        return _one_record_each(contributions, weights, clip_norm)
    return _several_records(contributions, unit_of, units, weights, clip_norm)


def _one_record_each(
    contributions: Sequence[Contribution], weights: Tensor, clip_norm: float
) -> ClippedSum:
    squared = torch.stack([c.squared_norms() for c in contributions]).sum(0)
    norms = squared.sqrt() * weights
    bad = ~torch.isfinite(norms)
    if bad.any():
        for one in contributions:
            one.drop(bad)
    factors = weights * _scale(norms, bad, clip_norm)
    gradients = [pair for one in contributions for pair in one.weighted_sum(factors)]
    return ClippedSum(gradients, norms, int(bad.sum()))


def _several_records(
    contributions: Sequence[Contribution], unit_of: Tensor, units: int, weights: Tensor,
    clip_norm: float,
) -> ClippedSum:  # fmt: skip
    """Records of one unit are added up before anything is clipped, so all are written out."""
    by_unit = []
    for parameter, each in (pair for one in contributions for pair in one.one_by_one()):
        flat = each.flatten(1) * weights[:, None]
        by_unit.append(
            (parameter, flat.new_zeros(units, flat.shape[1]).index_add_(0, unit_of, flat))
        )
    norms = torch.stack([total.square().sum(1) for _, total in by_unit]).sum(0).sqrt()
    bad = ~torch.isfinite(norms)
    factors = _scale(norms, bad, clip_norm)
    gradients = [
        (parameter, (factors @ total.masked_fill(bad[:, None], 0.0)).view_as(parameter))
        for parameter, total in by_unit
    ]
    return ClippedSum(gradients, norms, int(bad.sum()))


def _scale(norms: Tensor, bad: Tensor, clip_norm: float) -> Tensor:
    scale = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
    return scale.masked_fill(bad, 0.0)
