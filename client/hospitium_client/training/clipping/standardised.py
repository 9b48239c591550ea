"""Contributions of convolutions whose filters are standardised weights (Qiao et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hospitium_client.training.clipping.contributions import ROUNDING
from hospitium_common.models.small_cnn import SMALLEST_NORM, standardised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from hospitium_client.training.clipping.written import Written
    from hospitium_common.models.small_cnn import StandardisedConv2d

ROW = (2, 3, 4)  # of [B, out, in, height, width]


class Standardised:
    """``of_filters`` has the records' gradients of the filters; here they go back to the weights.

    A filter is c / (n + e) with the weights' deviations c from their mean, and n = ‖c‖. Its
    gradient g goes back as h = (g − mean g) / (n + e) − s c with s = (c · g) / (n (n + e)²), and
    since c has mean 0, ‖h‖² needs no more than ‖g‖², mean g and c · g of every filter.
    """

    def __init__(self, layer: StandardisedConv2d, of_filters: Written) -> None:
        self._weight, self._of_filters = layer.weight, of_filters

    def squared_norms(self) -> Tensor:
        """Return ``[B]``, never below the true value by more than rounding of the gradient."""
        parts = [
            self._norms(each) if parameter is self._weight else each.flatten(1).square().sum(1)
            for parameter, each in self._of_filters.one_by_one()
        ]
        return torch.stack(parts).sum(0)

    def _norms(self, each: Tensor) -> Tensor:
        weight = self._weight.detach()
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        norm: Tensor = torch.linalg.vector_norm(centred, dim=(1, 2, 3))  # [out]
        inverse = 1 / (norm + SMALLEST_NORM)
        squares = each.square().sum(ROW)
        along = (each * centred).sum(ROW)
        pull = along * inverse.square() / norm.clamp(min=SMALLEST_NORM**2)
        around = each.sum(ROW).square() / weight[0].numel()
        left = (squares - around) * inverse.square() - 2 * inverse * pull * along
        lost = ROUNDING * squares * inverse.square()
        both: Tensor = (left + (pull * norm).square()).clamp(min=0) + lost
        return both.sum(1)

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        return [
            (parameter, self._to_weights(total) if parameter is self._weight else total)
            for parameter, total in self._of_filters.weighted_sum(factors)
        ]

    def _to_weights(self, gradient: Tensor) -> Tensor:
        pull = torch.func.vjp(standardised, self._weight.detach())[1]
        found: Tensor = pull(gradient)[0]
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        for parameter, each in self._of_filters.one_by_one():
            is_weight = parameter is self._weight
            yield parameter, torch.func.vmap(self._to_weights)(each) if is_weight else each

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        self._of_filters.drop(bad)
