"""From a layer's recorded inputs and output gradients to its contribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.contributions import Instantiated, OuterProducts
from hospitium_client.training.clipping.convolution import convolution

if TYPE_CHECKING:
    from hospitium_client.training.clipping.contributions import Contribution

CACHED = 1 << 18
"""Elementwise products are taken in parts of about this many numbers, which stay in cache."""


def contribution(
    layer: nn.Module, inputs: Tensor, grads: Tensor, moments: tuple[Tensor, Tensor] | None = None
) -> Contribution:
    """Return a layer's contribution; layers without a rule of their own take the general one.

    ``moments`` are a GroupNorm's mean and inverse deviation ``[B, groups]``, if its forward left
    them.
    """
    if type(layer) is nn.Linear:
        return OuterProducts(layer.weight, layer.bias, _positions(inputs), _positions(grads))
    if type(layer) is nn.Conv2d and layer.groups == 1 and _zero_padded(layer):
        return convolution(layer, inputs, grads)
    if type(layer) is nn.GroupNorm:
        return _group_norm(layer, inputs, grads, moments)
    if type(layer) is nn.LayerNorm:
        return _layer_norm(layer, inputs, grads)
    if type(layer) is nn.Embedding and layer.padding_idx is None:
        return _embedding(layer, inputs, grads)
    return _general(layer, inputs, grads)


def _zero_padded(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _positions(values: Tensor) -> Tensor:
    """View ``[B, ..., features]`` as ``[B, positions, features]``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _group_norm(
    layer: nn.GroupNorm, inputs: Tensor, grads: Tensor, moments: tuple[Tensor, Tensor] | None
) -> Contribution:
    """Scale: Σ g·(x − mean)/deviation, from Σ g·x and Σ g; shift: Σ g."""
    shape = (len(inputs), layer.num_channels, -1)
    given, back = inputs.reshape(shape), grads.reshape(shape)
    if moments is None:
        grouped = inputs.reshape(len(inputs), layer.num_groups, -1)
        variance, mean = torch.var_mean(grouped, 2, correction=0)
        moments = mean, (variance + layer.eps).rsqrt()
    each = layer.num_channels // layer.num_groups
    mean, inverse = (m.view(len(inputs), -1).repeat_interleave(each, 1) for m in moments)
    step = max(1, CACHED // max(1, given[0].numel()))
    shift = back.sum(2)
    products = torch.cat(
        [
            (a * b).sum(2)
            for a, b in zip(torch.split(given, step), torch.split(back, step), strict=True)
        ]
    )
    found = [(layer.weight, (products - shift * mean) * inverse), (layer.bias, shift)]
    return Instantiated([(p, g) for p, g in found if p is not None and p.requires_grad])


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, grads: Tensor) -> Contribution:
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
    """Any layer that maps one tensor to one tensor, a sample at a time, through `torch.func`.

    Only the layer's own parameters: those of layers inside it have contributions of their own.
    """
    parameters = {n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
    values = {name: parameter.detach() for name, parameter in parameters.items()}

    def pulled_back(sample: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        def output(given: dict[str, Tensor]) -> Tensor:
            result: Tensor = torch.func.functional_call(layer, given, (sample[None],))
            return result

        pull = torch.func.vjp(output, values)[1]
        found: dict[str, Tensor] = pull(gradient[None])[0]
        return found

    each = torch.func.vmap(pulled_back)(inputs, grads)
    return Instantiated([(parameters[name], each[name]) for name in parameters])
