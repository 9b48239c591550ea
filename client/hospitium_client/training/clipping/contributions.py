"""What one layer contributes to per-sample gradients, in the cheapest exact form.

A *contribution* answers three questions about a layer's parameters: how long is each sample's
gradient (squared), what is the weighted sum of all, and, if it must be, what are they one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

ROUNDING = torch.finfo(torch.float32).eps
"""A Gram matrix loses this much of the sum of its terms; the loss is added back to the norm."""


class Contribution(Protocol):
    """Per-sample gradients of some parameters, over a batch of B samples."""

    def squared_norms(self) -> Tensor:
        """Return ``[B]``, never below the true value by more than rounding of the gradient."""
        ...

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the sum over samples of factor times gradient.

        To be called last: it may use up what the contribution holds.
        """
        ...

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        ...

    def drop(self, bad: Tensor) -> None:
        """Make the samples where ``bad`` is true contribute nothing, whatever they held."""
        ...


def gram_norms(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ left∘right over ``[B, T, T]`` Gram matrices, as an upper bound ``[B]``.

    The entries may cancel; what rounding can have taken away is added, so that no gradient
    looks shorter than it is.
    """
    products = (left * right).flatten(1)
    return products.sum(1).clamp_(min=0) + ROUNDING * products.abs_().sum(1)


def without(values: Tensor, bad: Tensor, dim: int = 0) -> Tensor:
    """Return the values with the samples where ``bad`` is true set to zero."""
    shape = [1] * values.dim()
    shape[dim] = len(bad)
    return values.masked_fill(bad.view(shape), 0.0)


@dataclass
class Instantiated:
    """Gradients that were cheapest to write out: parameter -> ``[B, ...]``."""

    gradients: list[tuple[Tensor, Tensor]]

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        return sum_of([g.flatten(1).square().sum(1) for _, g in self.gradients])

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        return [(p, (factors.to(g.dtype) @ g.flatten(1)).view_as(p)) for p, g in self.gradients]

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        yield from self.gradients

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        self.gradients = [(p, without(g, bad)) for p, g in self.gradients]


def sum_of(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@dataclass
class OuterProducts:
    """A linear map over T positions: the gradient is Σ_t g_t a_tᵀ, and Σ_t g_t for the bias.

    ``inputs`` is ``[B, T, in]``, ``grads`` is ``[B, T, out]``. With one position the norm is a
    product of norms; with few, Gram matrices (Li et al. 2022) are cheaper than the gradients.
    """

    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    grads: Tensor
    products: Tensor | None = None

    def _bias_gradients(self) -> Tensor:
        return self.grads.sum(1)

    def _products(self) -> Tensor:
        """Return ``[B, in, out]``: few rows times many columns is the quicker way round."""
        return torch.bmm(self.inputs.transpose(1, 2), self.grads)

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        positions, wide, tall = self.inputs.shape[1], self.inputs.shape[2], self.grads.shape[2]
        norms = self.grads.new_zeros(len(self.grads))
        if self.weight.requires_grad:
            if positions == 1:
                norms = self.inputs.square().sum((1, 2)) * self.grads.square().sum((1, 2))
            elif positions * (wide + tall) < wide * tall:
                left = torch.bmm(self.inputs, self.inputs.transpose(1, 2))
                right = torch.bmm(self.grads, self.grads.transpose(1, 2))
                norms = gram_norms(left, right)
            else:
                products = self._products()
                if products.numel() <= self.grads.numel():
                    self.products = products  # small enough to keep for the sum
                norms = products.square().sum((1, 2))
        if self.bias is not None and self.bias.requires_grad:
            norms = norms + self._bias_gradients().square().sum(1)
        return norms

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        if self.products is not None:
            total = (factors @ self.products.flatten(1)).view(self.products.shape[1:])
            found = [(self.weight, total.t().reshape(self.weight.shape))]
            if self.bias is not None and self.bias.requires_grad:
                found.append((self.bias, factors @ self._bias_gradients()))
            return found
        scaled = self.grads * factors.view(-1, 1, 1)
        found = []
        if self.weight.requires_grad:
            total = scaled.flatten(0, 1).T @ self.inputs.flatten(0, 1)
            found.append((self.weight, total.view_as(self.weight)))
        if self.bias is not None and self.bias.requires_grad:
            found.append((self.bias, scaled.sum((0, 1))))
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        if self.weight.requires_grad:
            yield self.weight, self._products().transpose(1, 2).reshape(-1, *self.weight.shape)
        if self.bias is not None and self.bias.requires_grad:
            yield self.bias, self._bias_gradients()

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        self.inputs, self.grads = without(self.inputs, bad), without(self.grads, bad)
        if self.products is not None:
            self.products = without(self.products, bad)
