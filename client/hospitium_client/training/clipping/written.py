"""Per-sample gradients of convolutions, written out."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hospitium_client.training.clipping.contributions import sum_of, without

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.nn.modules.conv import _ConvNd

CACHED = 1 << 19
"""Images are unfolded in parts of about this many numbers, which stay in cache."""


@dataclass(frozen=True)
class Taps:
    """Which pixels of a padded image every tap of a kernel meets; one entry per dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, layer: _ConvNd) -> Taps:
        """Return a layer's taps."""
        return cls(tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation))

    @property
    def count(self) -> int:
        """How many taps the kernel has."""
        return math.prod(self.kernel)

    def places(self, size: Sequence[int], around: Sequence[int]) -> list[int]:
        """Return the size of the output for an image with so many zeros on either side."""
        return [
            (have + 2 * zeros - dilation * (taps - 1) - 1) // stride + 1
            for have, zeros, dilation, taps, stride in zip(
                size, around, self.dilation, self.kernel, self.stride, strict=True
            )
        ]

    def windows(self, places: Sequence[int]) -> Iterator[tuple[slice, ...]]:
        """Yield, tap by tap, where it reads for ``places`` positions in every dimension."""
        for tap in itertools.product(*map(range, self.kernel)):
            yield tuple(
                slice(at * dilation, at * dilation + (number - 1) * stride + 1, stride)
                for at, dilation, stride, number in zip(
                    tap, self.dilation, self.stride, places, strict=True
                )
            )


class Written:
    """Written-out gradients, from images unfolded a few samples at a time.

    ``images`` ``[B, groups · narrow, *padded size]`` and ``signals``
    ``[B, groups · rows, *places]`` meet in a weight ``[groups · rows, narrow, *kernel]``: a
    convolution's inputs and output gradients, or a transposed one's the other way round.
    ``of_bias`` is ``[B, out]``.

    The unfolded part and the products over it stay in cache; channels come last, so that every
    kernel tap is one copy of whole rows.
    """

    def __init__(
        self, layer: _ConvNd, *, images: Tensor, signals: Tensor, of_bias: Tensor | None
    ) -> None:
        self._weight, self._bias, self._of_bias = layer.weight, layer.bias, of_bias
        self._taps, self._groups = Taps.of(layer), layer.groups
        self._each = self._products(images, signals) if layer.weight.requires_grad else None

    def _products(self, images: Tensor, signals: Tensor) -> Tensor:
        """Return ``[B, groups, rows, tap · narrow]``."""
        places, groups, taps = signals.shape[2:], self._groups, self._taps.count
        batch, count, narrow = len(images), places.numel(), self._weight.shape[1]
        rows = len(self._weight) // groups
        split = torch.unflatten(images.movedim(1, -1), -1, (groups, narrow)).movedim(-2, 1)
        signals = torch.unflatten(signals.flatten(2), 1, (groups, rows))
        part = max(1, min(batch, CACHED // (groups * count * taps * narrow)))
        unfolded = images.new_empty(part, groups, *places, taps, narrow)
        each = images.new_empty(batch, groups, rows, taps * narrow)
        for begin in range(0, batch, part):
            some = split[begin : begin + part]
            for tap, window in enumerate(self._taps.windows(places)):
                unfolded[: len(some), ..., tap, :] = some[(slice(None), slice(None), *window)]
            torch.bmm(
                signals[begin : begin + part].flatten(0, 1),
                unfolded[: len(some)].view(-1, count, taps * narrow),
                out=each[begin : begin + part].flatten(0, 1),
            )
        return each

    def _in_place(self, gradients: Tensor) -> Tensor:
        """View ``[..., groups, rows, tap · narrow]`` as the weight is laid out."""
        rows, narrow, *kernel = self._weight.shape
        return gradients.reshape(-1, rows, *kernel, narrow).movedim(-1, 2)

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        parts = []
        if self._each is not None:
            parts.append(torch.linalg.vector_norm(self._each.flatten(1), dim=1).square())
        if self._of_bias is not None:
            parts.append(self._of_bias.square().sum(1))
        return sum_of(parts)

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        found = []
        if self._each is not None:
            found.append((self._weight, self._in_place(factors @ self._each.flatten(1))[0]))
        if self._of_bias is not None and self._bias is not None:
            found.append((self._bias, factors @ self._of_bias))
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        if self._each is not None:
            yield self._weight, self._in_place(self._each)
        if self._of_bias is not None and self._bias is not None:
            yield self._bias, self._of_bias

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        if self._each is not None:
            self._each = without(self._each, bad)
        if self._of_bias is not None:
            self._of_bias = without(self._of_bias, bad)
