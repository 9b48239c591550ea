"""Contributions of convolutions: pixels' Gram matrices, or written-out gradients.

Which is cheaper depends on how many pixels meet how many channels; both are exact. One to three
dimensions, any stride, dilation, groups and padding; transposed ones too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.contributions import (
    Contribution,
    OuterProducts,
    gram_norms,
    without,
)
from hospitium_client.training.clipping.standardised import Standardised
from hospitium_client.training.clipping.written import Taps, Written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.autograd.function import FunctionCtx
    from torch.nn.modules.conv import _ConvNd

    from hospitium_client.training.clipping.recording import Recording
    from hospitium_common.models.small_cnn import StandardisedConv2d

FEW_CHANNELS = 4
"""Up to here the whole batch unfolded is small, and serves both the forward and the gradients."""
SHIFT = 15
"""Adding up a shifted Gram matrix counts, per entry, as so many multiplications in one.

It takes the time of twice as many; Gram matrices have the lead because they also save memory.
"""


def convolution(layer: _ConvNd, inputs: Tensor, grads: Tensor) -> Contribution:
    """Return the contribution of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

    ``inputs`` is ``[B, in, *size]``, ``grads`` is ``[B, out, *places]``. Gram matrices cost
    pixels² · (channels + shifts) and half a pass for the sum more than written-out gradients,
    which cost pixels · taps · in · out once.
    """
    padding = list(layer._reversed_padding_repeated_twice)  # whichever way it was given
    if layer.padding_mode != "zeros":
        inputs = functional.pad(inputs, padding, mode=layer.padding_mode)
        padding = [0] * len(padding)
    if layer.groups == 1 and layer.weight.requires_grad:
        if Taps.of(layer).count == 1 and not any(padding):
            return _single_pixels(layer, inputs, grads)
        gram = inputs[0, 0].numel() ** 2 * layer.in_channels
        gram += grads[0, 0].numel() ** 2 * (layer.out_channels + SHIFT * Taps.of(layer).count)
        if gram < grads[0, 0].numel() * layer.weight.numel() // 2:
            return PixelGrams(layer, inputs, grads, padding)
    images = functional.pad(inputs, padding)
    return Written(layer, images=images, signals=grads, of_bias=_bias_gradients(layer, grads))


def transposed_convolution(layer: _ConvNd, inputs: Tensor, grads: Tensor) -> Contribution:
    """Return the contribution of a transposed convolution: one with the two ends swapped."""
    images = functional.pad(grads, list(layer._reversed_padding_repeated_twice))
    return Written(layer, images=images, signals=inputs, of_bias=_bias_gradients(layer, grads))


def standardised_convolution(
    layer: StandardisedConv2d, inputs: Tensor, grads: Tensor
) -> Contribution:
    """Return the contribution of a convolution whose filters are functions of its weights."""
    images = functional.pad(inputs, list(layer._reversed_padding_repeated_twice))
    of_bias = _bias_gradients(layer, grads)
    return Standardised(layer, Written(layer, images=images, signals=grads, of_bias=of_bias))


def _single_pixels(layer: _ConvNd, inputs: Tensor, grads: Tensor) -> Contribution:
    """Kernels of one tap are linear maps of single pixels."""
    window = next(Taps.of(layer).windows(grads.shape[2:]))
    seen = inputs[(slice(None), slice(None), *window)]
    return OuterProducts(layer.weight, layer.bias, _by_place(seen), _by_place(grads))


def _by_place(values: Tensor) -> Tensor:
    """View ``[B, channel, *size]`` as ``[B, pixels, channel]``."""
    return values.flatten(2).transpose(1, 2)


def _bias_gradients(layer: _ConvNd, grads: Tensor) -> Tensor | None:
    if layer.bias is None or not layer.bias.requires_grad:
        return None
    return grads.flatten(2).sum(2)


@dataclass
class PixelGrams:
    """Norms from Gram matrices of the image itself, not of its unfolded copy.

    Patches p and q meet in Σ_taps ⟨x[p + tap], x[q + tap]⟩: the pixels' Gram matrix, shifted along
    its diagonal once per tap and added up (after Li et al. 2022, without the unfolding).
    ``padding`` (as `functional.pad` takes it) are zeros around ``inputs``.
    """

    layer: _ConvNd
    inputs: Tensor
    grads: Tensor
    padding: list[int]

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        images, signals = self.inputs.flatten(2), self.grads.flatten(2)
        of_grads = torch.bmm(signals.transpose(1, 2), signals)
        norms = gram_norms(self._patches(torch.bmm(images.transpose(1, 2), images)), of_grads)
        bias = _bias_gradients(self.layer, self.grads)
        return norms if bias is None else norms + bias.square().sum(1)

    def _patches(self, pixels: Tensor) -> Tensor:
        """From ``[B, P, P]`` over pixels to ``[B, P', P']`` over output positions."""
        size, places = self.inputs.shape[2:], self.grads.shape[2:]
        padded = functional.pad(pixels.view(-1, *size, *size), self.padding * 2)
        total = pixels.new_zeros(len(pixels), *places, *places)
        for window in Taps.of(self.layer).windows(places):
            total += padded[(slice(None), *window, *window)]
        return total.view(-1, places.numel(), places.numel())

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        layer = self.layer
        scaled = self.grads * factors.view(-1, *[1] * (self.grads.dim() - 1))
        images, none = functional.pad(self.inputs, self.padding), [0] * len(layer.stride)
        weight = torch.ops.aten.convolution_backward(
            scaled, images, layer.weight.detach(), None, layer.stride, none, layer.dilation,
            False, none, 1, [False, True, False],
        )[1]  # fmt: skip
        found = [(layer.weight, weight)]
        bias = _bias_gradients(layer, scaled)
        if bias is not None and layer.bias is not None:
            found.append((layer.bias, bias.sum(0)))
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        images, of_bias = functional.pad(self.inputs, self.padding), _bias_gradients
        yield from Written(
            self.layer, images=images, signals=self.grads, of_bias=of_bias(self.layer, self.grads)
        ).one_by_one()

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        self.inputs, self.grads = without(self.inputs, bad), without(self.grads, bad)


def is_narrow(layer: nn.Conv2d) -> bool:
    """Whether `recorded_convolution` can take a layer's place."""
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.in_channels <= FEW_CHANNELS
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and Taps.of(layer).count > 1
    )


def recorded_convolution(layer: nn.Conv2d, inputs: Tensor, recording: Recording) -> Tensor:
    """Return what a narrow convolution returns; its contribution is recorded on the way back.

    The image is unfolded once, for the forward and the gradients.
    """
    out: Tensor = _Unfolded.apply(inputs, recording.anchor, recording, layer)  # type: ignore[no-untyped-call]  # torch types apply so
    return out


def _around(layer: nn.Conv2d) -> tuple[int, int]:
    """How many zeros above and left of the image, and as many on the other sides."""
    left, _, up, _ = layer._reversed_padding_repeated_twice
    return up, left


class _Unfolded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, anchor: Tensor, recording: Recording, layer: nn.Conv2d
    ) -> Tensor:
        padding = _around(layer)
        places = Taps.of(layer).places(inputs.shape[2:], padding)
        columns = functional.unfold(
            inputs, layer.kernel_size, layer.dilation, padding, layer.stride
        )  # [B, in · taps, pixels]
        out = torch.empty(
            (len(inputs), layer.out_channels, *places), dtype=inputs.dtype, device=inputs.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        kernel = layer.weight.flatten(1).t().expand(len(inputs), -1, -1)
        rows = out.permute(0, 2, 3, 1).flatten(1, 2)
        if layer.bias is None:
            torch.bmm(columns.transpose(1, 2), kernel, out=rows)
        else:
            torch.baddbmm(layer.bias, columns.transpose(1, 2), kernel, out=rows)
        ctx.save_for_backward(inputs, columns)
        kept: Any = ctx
        kept.layer, kept.recording = layer, recording
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept: Any = ctx
        inputs, columns = kept.saved_tensors
        layer: nn.Conv2d = kept.layer
        kept.recording.contributions.append(
            OuterProducts(layer.weight, layer.bias, columns.transpose(1, 2), _by_place(grads[0]))
        )
        d_inputs = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]  # torch sets it
            d_inputs = torch.ops.aten.convolution_backward(
                grads[0], inputs, layer.weight.detach(), None, layer.stride, _around(layer),
                layer.dilation, False, [0, 0], 1, [True, False, False],
            )[0]  # fmt: skip
        return d_inputs, torch.zeros_like(kept.recording.anchor), None, None
