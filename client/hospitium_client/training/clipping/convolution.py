"""Contributions of convolutions: pixels' Gram matrices, or written-out gradients.

Which is cheaper depends on how many pixels meet how many channels; both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from hospitium_client.training.clipping.contributions import (
    Contribution,
    OuterProducts,
    gram_norms,
    sum_of,
    without,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


FEW_CHANNELS = 4
"""Up to here the whole batch unfolded is small, and torch unfolds it fastest."""
CACHED = 1 << 19
"""Images are unfolded in parts of about this many numbers, which stay in cache."""
Pair = tuple[int, int]


def convolution(layer: nn.Conv2d, inputs: Tensor, grads: Tensor) -> Contribution:
    """Return the contribution of an ungrouped, zero-padded convolution.

    ``inputs`` is ``[B, in, height, width]``, ``grads`` is ``[B, out, height', width']``. Gram
    matrices cost pixels² · channels and a second pass for the sum; written-out gradients cost
    pixels · taps · in · out once.
    """
    pixels_in, pixels_out = inputs[0, 0].numel(), grads[0, 0].numel()
    gram = pixels_in**2 * layer.in_channels + pixels_out**2 * layer.out_channels
    written = pixels_out * layer.weight[0].numel() * layer.out_channels
    if gram < written // 2 and layer.weight.requires_grad:
        return PixelGrams(layer, inputs, grads)
    if _spread(layer) == 1 and (layer.stride == (1, 1) or layer.padding == (0, 0)):
        seen = inputs[:, :, :: layer.stride[0], :: layer.stride[1]]
        if seen.shape[2:] == grads.shape[2:]:  # 1×1 kernels read single pixels
            return _unfolded(layer, seen.flatten(2), grads)
    if layer.in_channels <= FEW_CHANNELS:
        columns = functional.unfold(
            inputs, layer.kernel_size, layer.dilation, _padding(layer), layer.stride
        )
        return _unfolded(layer, columns, grads)
    return Written(layer, inputs, grads)


def _unfolded(layer: nn.Conv2d, columns: Tensor, grads: Tensor) -> OuterProducts:
    return OuterProducts(
        layer.weight, layer.bias, columns.transpose(1, 2), grads.flatten(2).transpose(1, 2)
    )


def _spread(layer: nn.Conv2d) -> int:
    return layer.kernel_size[0] * layer.kernel_size[1]


def _padding(layer: nn.Conv2d) -> Pair:
    if isinstance(layer.padding, str):
        raise TypeError(layer.padding)  # `layers` sends these to the general rule
    up, left = layer.padding
    return up, left


def _bias_gradients(layer: nn.Conv2d, grads: Tensor) -> Tensor | None:
    if layer.bias is None or not layer.bias.requires_grad:
        return None
    return grads.sum((2, 3))


@dataclass
class PixelGrams:
    """Norms from Gram matrices of the image itself, not of its unfolded copy.

    Patches p and q meet in Σ_taps ⟨x[p + tap], x[q + tap]⟩: the pixels' Gram matrix, shifted along
    its diagonal once per tap and added up (after Li et al. 2022, without the unfolding).
    """

    layer: nn.Conv2d
    inputs: Tensor
    grads: Tensor

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        images, signals = self.inputs.flatten(2), self.grads.flatten(2)
        of_grads = torch.bmm(signals.transpose(1, 2), signals)
        norms = gram_norms(self._patches(torch.bmm(images.transpose(1, 2), images)), of_grads)
        bias = _bias_gradients(self.layer, self.grads)
        return norms if bias is None else norms + bias.square().sum(1)

    def _patches(self, pixels: Tensor) -> Tensor:
        """From ``[B, P, P]`` over pixels to ``[B, P', P']`` over output positions."""
        (high, wide), (rows, columns) = self.inputs.shape[2:], self.grads.shape[2:]
        up, left = _padding(self.layer)
        (step_y, step_x), (tap_y, tap_x) = self.layer.stride, self.layer.dilation
        padded = functional.pad(
            pixels.view(-1, high, wide, high, wide), (left, left, up, up, left, left, up, up)
        )
        total = pixels.new_zeros(len(pixels), rows, columns, rows, columns)
        for tap in range(_spread(self.layer)):
            row, column = divmod(tap, self.layer.kernel_size[1])
            y = slice(row * tap_y, row * tap_y + (rows - 1) * step_y + 1, step_y)
            x = slice(column * tap_x, column * tap_x + (columns - 1) * step_x + 1, step_x)
            total += padded[:, y, x, y, x]
        return total.view(-1, rows * columns, rows * columns)

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        layer, scaled = self.layer, self.grads * factors.view(-1, 1, 1, 1)
        weight: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]  # torch has no types here
            self.inputs, layer.weight.shape, scaled, layer.stride, layer.padding, layer.dilation
        )
        found = [(layer.weight, weight)]
        bias = _bias_gradients(layer, scaled)
        if bias is not None and layer.bias is not None:
            found.append((layer.bias, bias.sum(0)))
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        layer = self.layer
        columns = functional.unfold(
            self.inputs, layer.kernel_size, layer.dilation, _padding(layer), layer.stride
        )
        yield from _unfolded(layer, columns, self.grads).one_by_one()

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        self.inputs, self.grads = without(self.inputs, bad), without(self.grads, bad)


class Written:
    """Written-out gradients of a convolution, from images unfolded a few samples at a time.

    The unfolded part and the products over it stay in cache; channels come last, so that every
    kernel tap is one copy of whole rows.
    """

    def __init__(self, layer: nn.Conv2d, inputs: Tensor, grads: Tensor) -> None:
        self._layer = layer
        self._each: Tensor | None = None
        self._bias = _bias_gradients(layer, grads)
        if layer.weight.requires_grad:
            self._each = self._products(inputs, grads)

    def _products(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Return ``[B, out, tap · in]``."""
        layer, batch, (rows, columns) = self._layer, len(inputs), grads.shape[2:]
        up, left = _padding(layer)
        (step_y, step_x), (tap_y, tap_x) = layer.stride, layer.dilation
        padded = functional.pad(inputs, (left, left, up, up)).permute(0, 2, 3, 1)
        taps, channels = _spread(layer), layer.in_channels
        part = max(1, min(batch, CACHED // (rows * columns * taps * channels)))
        unfolded = inputs.new_empty(part, rows, columns, taps, channels)
        each = inputs.new_empty(batch, layer.out_channels, taps * channels)
        signals = grads.flatten(2)
        for begin in range(0, batch, part):
            images = padded[begin : begin + part]
            for tap in range(taps):
                row, column = divmod(tap, layer.kernel_size[1])
                y = slice(row * tap_y, row * tap_y + (rows - 1) * step_y + 1, step_y)
                x = slice(column * tap_x, column * tap_x + (columns - 1) * step_x + 1, step_x)
                unfolded[: len(images), :, :, tap] = images[:, y, x]
            torch.bmm(
                signals[begin : begin + part],
                unfolded[: len(images)].view(len(images), rows * columns, taps * channels),
                out=each[begin : begin + part],
            )
        return each

    def _in_place(self, gradients: Tensor) -> Tensor:
        """View ``[..., out, tap · in]`` as the weight is laid out."""
        high, wide = self._layer.kernel_size
        shape = (-1, self._layer.out_channels, high, wide, self._layer.in_channels)
        return gradients.view(shape).permute(0, 1, 4, 2, 3)

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        parts = []
        if self._each is not None:
            parts.append(torch.linalg.vector_norm(self._each.flatten(1), dim=1).square())
        if self._bias is not None:
            parts.append(self._bias.square().sum(1))
        return sum_of(parts)

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        found, layer = [], self._layer
        if self._each is not None:
            found.append((layer.weight, self._in_place(factors @ self._each.flatten(1))[0]))
        if self._bias is not None and layer.bias is not None:
            found.append((layer.bias, factors @ self._bias))
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        if self._each is not None:
            yield self._layer.weight, self._in_place(self._each)
        if self._bias is not None and self._layer.bias is not None:
            yield self._layer.bias, self._bias

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        if self._each is not None:
            self._each = without(self._each, bad)
        if self._bias is not None:
            self._bias = without(self._bias, bad)
