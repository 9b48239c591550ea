"""From a layer's recorded inputs and output gradients to its contribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.contributions import Instantiated, OuterProducts

if TYPE_CHECKING:
    from torch.nn import Parameter

    from hospitium_client.training.clipping.contributions import Contribution


def contribution(layer: nn.Module, inputs: Tensor, grads: Tensor) -> Contribution:
    """Return a layer's contribution; layers without a rule of their own take the general one."""
    if type(layer) is nn.Linear:
        return OuterProducts(layer.weight, layer.bias, _positions(inputs), _positions(grads))
    if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
        return _convolution(layer, inputs, grads)
    if type(layer) in (nn.GroupNorm, nn.LayerNorm):
        return _norm(layer, inputs, grads)
    if type(layer) is nn.Embedding and layer.padding_idx is None:
        return _embedding(layer, inputs, grads)
    return _general(layer, inputs, grads)


def _positions(values: Tensor) -> Tensor:
    """View ``[B, ..., features]`` as ``[B, positions, features]``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _convolution(layer: nn.Conv2d, inputs: Tensor, grads: Tensor) -> Contribution:
    """Shifted products where the stride is 1 and few channels meet many pixels, else unfolded."""
    pixels, taps = grads.shape[2] * grads.shape[3], layer.weight[0].numel()
    few_pixels = pixels * (taps + layer.out_channels) < taps * layer.out_channels
    if layer.stride == (1, 1) and not few_pixels and not isinstance(layer.padding, str):
        return _shifted(layer, inputs, grads)
    padding = layer.padding
    if isinstance(padding, str):
        return _general(layer, inputs, grads)
    columns = functional.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)  # type: ignore[arg-type]  # torch types padding for every dimensionality at once
    return OuterProducts(
        layer.weight, layer.bias, columns.transpose(1, 2), grads.flatten(2).transpose(1, 2)
    )


def _shifted(layer: nn.Conv2d, inputs: Tensor, grads: Tensor) -> Contribution:
    """One batched product per kernel tap, on the flattened padded image: no copy per tap.

    In a padded image of width w laid out row by row, moving the kernel by (i, j) is moving the
    whole image by i·w + j. Output gradients get the same row length, zeros at the row ends.
    """
    (pad_y, pad_x), (step_y, step_x) = layer.padding, layer.dilation  # type: ignore[misc]  # not a str, says the caller
    (tall, wide), batch = layer.kernel_size, len(inputs)
    padded = functional.pad(inputs, (pad_x, pad_x, pad_y, pad_y))
    width, rows = padded.shape[3], grads.shape[2]
    spread = functional.pad(grads, (0, width - grads.shape[3])).flatten(2)
    length = (rows - 1) * width + grads.shape[3]
    spread = spread[:, :, :length]
    flat = padded.flatten(2).transpose(1, 2)
    found: list[tuple[Parameter, Tensor]] = []
    if layer.weight.requires_grad:
        weight = inputs.new_empty(tall, wide, batch, layer.out_channels, layer.in_channels)
        for row in range(tall):
            for column in range(wide):
                at = row * step_y * width + column * step_x
                torch.bmm(spread, flat[:, at : at + length], out=weight[row, column])
        found.append((layer.weight, weight.permute(2, 3, 4, 0, 1)))
    if layer.bias is not None and layer.bias.requires_grad:
        found.append((layer.bias, grads.sum((2, 3))))
    return Instantiated(found)


def _norm(layer: nn.GroupNorm | nn.LayerNorm, inputs: Tensor, grads: Tensor) -> Contribution:
    if isinstance(layer, nn.GroupNorm):
        plain = functional.group_norm(inputs, layer.num_groups, None, None, layer.eps)
        over = tuple(range(2, grads.dim()))
    else:
        plain = functional.layer_norm(inputs, list(layer.normalized_shape), None, None, layer.eps)
        over = tuple(range(1, grads.dim() - len(layer.normalized_shape)))
    scale, shift = grads * plain, grads
    if over:
        scale, shift = scale.sum(over), shift.sum(over)
    found = [(layer.weight, scale), (layer.bias, shift)]
    return Instantiated([(p, g) for p, g in found if p is not None and p.requires_grad])


def _embedding(layer: nn.Embedding, inputs: Tensor, grads: Tensor) -> Contribution:
    batch = len(inputs)
    rows = grads.new_zeros(batch, *layer.weight.shape)
    index = inputs.reshape(batch, -1, 1).expand(-1, -1, layer.embedding_dim)
    rows.scatter_add_(1, index, _positions(grads))
    return Instantiated([(layer.weight, rows)])


def _general(layer: nn.Module, inputs: Tensor, grads: Tensor) -> Contribution:
    """Any layer that maps one tensor to one tensor, a sample at a time, through `torch.func`."""
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    values = {name: parameter.detach() for name, parameter in parameters.items()}

    def pulled_back(sample: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        def output(given: dict[str, Tensor]) -> Tensor:
            result: Tensor = torch.func.functional_call(layer, given, (sample[None],))
            return result

        _, pull = torch.func.vjp(output, values)
        found: dict[str, Tensor] = pull(gradient[None])[0]
        return found

    each = torch.func.vmap(pulled_back)(inputs, grads)
    return Instantiated([(parameters[name], each[name]) for name in parameters])
