"""What one layer contributes to per-sample gradients, in the cheapest exact form.

A *contribution* answers three questions about a layer's parameters: how long is each sample's gradient
(squared), what is the weighted sum of all of them, and, if it must be, what are they one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class Contribution(Protocol):
    """Per-sample gradients of some parameters, over a batch of B samples."""

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        ...

    def weighted_sum(self, factors: Tensor) -> list[tuple[Parameter, Tensor]]:
        """Return each parameter with the sum over samples of factor times gradient."""
        ...

    def one_by_one(self) -> list[tuple[Parameter, Tensor]]:
        """Return each parameter with its gradients ``[B, ...]``."""
        ...

    def drop(self, bad: Tensor) -> None:
        """Make the samples where ``bad`` is true contribute nothing, whatever they held."""
        ...


@dataclass
class Instantiated:
    """Gradients that were cheapest to write out: parameter -> ``[B, ...]``."""

    gradients: list[tuple[Parameter, Tensor]]

    def squared_norms(self) -> Tensor:
        return torch.stack([g.flatten(1).square().sum(1) for _, g in self.gradients]).sum(0)

    def weighted_sum(self, factors: Tensor) -> list[tuple[Parameter, Tensor]]:
        return [(p, (factors.to(g.dtype) @ g.flatten(1)).view_as(p)) for p, g in self.gradients]

    def one_by_one(self) -> list[tuple[Parameter, Tensor]]:
        return self.gradients

    def drop(self, bad: Tensor) -> None:
        self.gradients = [
            (p, g.masked_fill(bad.view(-1, *[1] * (g.dim() - 1)), 0.0)) for p, g in self.gradients
        ]


@dataclass
class OuterProducts:
    """A linear map over T positions: the gradient is Σ_t g_t a_tᵀ, and Σ_t g_t for the bias.

    ``inputs`` is ``[B, T, in]``, ``grads`` is ``[B, T, out]``. With one position the norm is a
    product of norms; with few, Gram matrices (Li et al. 2022) are cheaper than the gradients.
    """

    weight: Parameter
    bias: Parameter | None
    inputs: Tensor
    grads: Tensor

    def squared_norms(self) -> Tensor:
        positions, wide, tall = self.inputs.shape[1], self.inputs.shape[2], self.grads.shape[2]
        norms = self.grads.new_zeros(len(self.grads))
        if self.weight.requires_grad:
            if positions == 1:
                norms = self.inputs.square().sum((1, 2)) * self.grads.square().sum((1, 2))
            elif positions * (wide + tall) < wide * tall:
                left = self.inputs @ self.inputs.transpose(1, 2)
                right = self.grads @ self.grads.transpose(1, 2)
                norms = (left * right).sum((1, 2)).clamp(min=0)
            else:
                products = self.grads.transpose(1, 2) @ self.inputs
                norms = products.square().sum((1, 2))
        if self.bias is not None and self.bias.requires_grad:
            norms = norms + self.grads.sum(1).square().sum(1)
        return norms

    def weighted_sum(self, factors: Tensor) -> list[tuple[Parameter, Tensor]]:
        scaled = self.grads * factors.view(-1, 1, 1)
        found = []
        if self.weight.requires_grad:
            total = scaled.flatten(0, 1).T @ self.inputs.flatten(0, 1)
            found.append((self.weight, total.view_as(self.weight)))
        if self.bias is not None and self.bias.requires_grad:
            found.append((self.bias, scaled.sum((0, 1))))
        return found

    def one_by_one(self) -> list[tuple[Parameter, Tensor]]:
        found = []
        if self.weight.requires_grad:
            products = self.grads.transpose(1, 2) @ self.inputs
            found.append((self.weight, products.view(-1, *self.weight.shape)))
        if self.bias is not None and self.bias.requires_grad:
            found.append((self.bias, self.grads.sum(1)))
        return found

    def drop(self, bad: Tensor) -> None:
        self.inputs = self.inputs.masked_fill(bad.view(-1, 1, 1), 0.0)
        self.grads = self.grads.masked_fill(bad.view(-1, 1, 1), 0.0)
