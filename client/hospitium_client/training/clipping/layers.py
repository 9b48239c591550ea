"""From a layer's recorded inputs and output gradients to its contribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.contributions import Instantiated, OuterProducts
from hospitium_client.training.clipping.convolution import (
    convolution,
    standardised_convolution,
    transposed_convolution,
)
from hospitium_common.models.small_cnn import StandardisedConv2d

if TYPE_CHECKING:
    from hospitium_client.training.clipping.contributions import Contribution

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def contribution(layer: nn.Module, inputs: Tensor, grads: Tensor) -> Contribution:
    """Return a layer's contribution; layers without a rule of their own take the general one."""
    if type(layer) is nn.Linear:
        return OuterProducts(layer.weight, layer.bias, _positions(inputs), _positions(grads))
    if type(layer) in CONVOLUTIONS and isinstance(layer, CONVOLUTIONS):
        return convolution(layer, inputs, grads)
    if type(layer) in TRANSPOSED and isinstance(layer, TRANSPOSED):
        return transposed_convolution(layer, inputs, grads)
    if type(layer) is StandardisedConv2d:
        return standardised_convolution(layer, inputs, grads)
    if type(layer) is nn.LayerNorm:
        return _layer_norm(layer, inputs, grads)
    if type(layer) is nn.Embedding and layer.padding_idx is None:
        return _embedding(layer, inputs, grads)
    return _general(layer, inputs, grads)


def _positions(values: Tensor) -> Tensor:
    """View ``[B, ..., features]`` as ``[B, positions, features]``."""
    return values.reshape(len(values), -1, values.shape[-1])


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
