"""GroupNorm (Wu and He 2018) whose way back yields every record's gradients with its input's.

Both need Σ g and Σ g·x over the positions of each record and channel; they are summed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hospitium_client.training.clipping.contributions import Instantiated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.autograd.function import FunctionCtx

    from hospitium_client.training.clipping.recording import Recording

IMAGES = 4
"""Dimensions of ``[batch, channel, height, width]``; torch keeps no others channels-last here."""
CACHED = 1 << 18
"""Elementwise products are taken in parts of about this many numbers, which stay in cache."""
FEW_POSITIONS, FEW_CHANNELS = 1024, 8
"""Below both, with channels last, torch's own forward on a processor is four times slower."""


def recorded_group_norm(layer: nn.GroupNorm, inputs: Tensor, recording: Recording) -> Tensor:
    """Return what the layer returns; its contribution is recorded on the way back."""
    out: Tensor = _GroupNorm.apply(inputs, recording.anchor, recording, layer)  # type: ignore[no-untyped-call]  # torch types apply so
    return out


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, anchor: Tensor, recording: Recording, layer: nn.GroupNorm
    ) -> Tensor:
        last = _has_channels_last(inputs)
        inputs = inputs if last else inputs.contiguous()
        positions, each = inputs[0, 0].numel(), layer.num_channels // layer.num_groups
        if last and inputs.is_cpu and positions < FEW_POSITIONS and each < FEW_CHANNELS:
            out, mean, inverse = _forward(layer, inputs)
        else:
            out, mean, inverse = torch.native_group_norm(
                inputs, layer.weight, layer.bias, len(inputs), layer.num_channels, positions,
                layer.num_groups, layer.eps,
            )  # fmt: skip
        ctx.save_for_backward(inputs, mean, inverse)
        kept: Any = ctx
        kept.layer, kept.recording = layer, recording
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept: Any = ctx
        inputs, mean, inverse = kept.saved_tensors
        layer: nn.GroupNorm = kept.layer
        way = _backward_last if _has_channels_last(inputs) else _backward_first
        d_inputs, scale, shift = way(layer, inputs, grads[0], mean, inverse)
        both: list[tuple[Tensor, Tensor]] = [(layer.weight, scale), (layer.bias, shift)]
        found = [(parameter, each) for parameter, each in both if parameter.requires_grad]
        kept.recording.contributions.append(Instantiated(found))
        return d_inputs, torch.zeros_like(kept.recording.anchor), None, None


def _has_channels_last(values: Tensor) -> bool:
    return (
        values.dim() == IMAGES
        and values.is_contiguous(memory_format=torch.channels_last)
        and not values.is_contiguous()
    )


def _rows(values: Tensor) -> Tensor:
    """View a channels-last image as ``[B, positions, channel]``."""
    return values.permute(0, 2, 3, 1).flatten(1, 2)


def _forward(layer: nn.GroupNorm, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the mean and inverse deviation ``[B, groups]``, in two passes."""
    given, out = _rows(inputs), torch.empty_like(inputs)
    batch, positions, channels = given.shape
    step = _part(given)
    each = channels // layer.num_groups
    mean = given.sum(1).view(batch, -1, each).sum(2) / (positions * each)
    middle = mean.repeat_interleave(each, 1)[:, None]
    squares = [(a - m).square_().sum(1) for a, m in _parts(step, given, middle)]
    variance = torch.cat(squares).view(batch, -1, each).sum(2) / (positions * each)
    inverse = (variance + layer.eps).rsqrt()
    scale = inverse.repeat_interleave(each, 1)[:, None] * layer.weight
    shift = layer.bias - middle * scale
    for a, times, plus, to in _parts(step, given, scale, shift, _rows(out)):
        torch.addcmul(plus, a, times, out=to)
    return out, mean, inverse


def _backward_last(
    layer: nn.GroupNorm, inputs: Tensor, grads: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input's gradient, and those of scale and shift ``[B, channel]``."""
    given = _rows(inputs)
    back = _rows(grads.contiguous(memory_format=torch.channels_last))
    out = torch.empty_like(inputs)
    batch, positions, channels = given.shape
    step, each = _part(given), channels // layer.num_groups
    mean, inverse = mean.view(batch, -1), inverse.view(batch, -1)

    def wide(values: Tensor) -> Tensor:  # [B, groups] to [B, channel]
        return values.repeat_interleave(each, 1)

    def grouped(values: Tensor) -> Tensor:  # the mean over each group of a weighted gradient
        return (values * layer.weight).view(batch, -1, each).sum(2) / (positions * each)

    shift = back.sum(1)
    products = [(a * g).sum(1) for a, g in _parts(step, given, back)]
    scale = (torch.cat(products) - shift * wide(mean)) * wide(inverse)
    of_input = -inverse.square() * grouped(scale)
    constant = -inverse * grouped(shift) - of_input * mean
    factors = (wide(constant), wide(of_input), wide(inverse) * layer.weight)
    of_record = (factor[:, None] for factor in factors)
    for a, g, to, plus, by, times in _parts(step, given, back, _rows(out), *of_record):
        torch.addcmul(plus, a, by, out=to)
        to.addcmul_(g, times)
    return out, scale, shift


def _backward_first(
    layer: nn.GroupNorm, inputs: Tensor, grads: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """To torch, the records' channels are the channels of one record with as many more groups.

    What it then returns for scale and shift is every record's own.
    """
    batch, channels = inputs.shape[:2]
    rows = batch * channels
    d_inputs, scale, shift = torch.ops.aten.native_group_norm_backward(
        grads.reshape(1, rows, -1), inputs.reshape(1, rows, -1), mean.reshape(1, -1),
        inverse.reshape(1, -1), layer.weight.detach().repeat(batch), 1, rows,
        inputs[0, 0].numel(), batch * layer.num_groups, [True, True, True],
    )  # fmt: skip
    return d_inputs.view_as(inputs), scale.view(batch, channels), shift.view(batch, channels)


def _parts(step: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield ``step`` records of all at a time."""
    return zip(*(torch.split(one, step) for one in values), strict=True)


def _part(rows: Tensor) -> int:
    """How many records to take at a time."""
    return max(1, CACHED // max(1, rows[0].numel()))
