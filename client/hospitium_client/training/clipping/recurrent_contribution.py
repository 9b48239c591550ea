"""What one direction of one recurrent layer contributes, from its states and gate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from hospitium_client.training.clipping.contributions import gram_norms, sum_of, without

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CACHED = 1 << 18
"""Written-out gradients are measured in parts of about this many numbers, while in cache."""


class Parameters(NamedTuple):
    """A direction's parameters, as torch names and orders them."""

    weight_in: Tensor
    weight_across: Tensor
    bias_in: Tensor | None
    bias_across: Tensor | None


@dataclass
class RecurrentGradients:
    """Time comes first: ``inputs`` ``[T, B, in]``, ``states`` before each step ``[T, B, hidden]``.

    ``gates`` ``[T, B, 4 · hidden]``: an LSTM's four gate gradients serve both weights; of a GRU's
    ``[new from inputs | reset | update | new from the state]`` the first three quarters belong
    to the inputs, the last three to the states.
    """

    parameters: Parameters
    inputs: Tensor
    states: Tensor
    gates: Tensor

    @property
    def _is_gru(self) -> bool:
        return len(self.parameters.weight_across) < self.gates.shape[2]

    def _sides(self) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor, int]]:
        """Per weight: it, its bias, its inputs, gate gradients, and by how much rows are rolled."""
        weight_in, weight_across, bias_in, bias_across = self.parameters
        size = self.states.shape[2]
        if not self._is_gru:
            return [
                (weight_in, bias_in, self.inputs, self.gates, 0),
                (weight_across, bias_across, self.states, self.gates, 0),
            ]
        return [
            (weight_in, bias_in, self.inputs, self.gates[:, :, : 3 * size], -size),
            (weight_across, bias_across, self.states, self.gates[:, :, size:], 0),
        ]

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        steps, _, tall = self.gates.shape
        wide = self.inputs.shape[2] + self.states.shape[2]
        if steps * (wide + tall) < wide * tall:
            return self._by_grams()
        return self._written_out()

    def _by_grams(self) -> Tensor:
        """Both weights share the Gram matrices of the gates that they share."""
        of_gates = _gram(self.gates)
        if self._is_gru:
            size = self.states.shape[2]
            ends = [of_gates - _gram(self.gates[:, :, 3 * size :])]
            ends.append(of_gates - _gram(self.gates[:, :, :size]))
            return sum_of(
                [
                    gram_norms(left, right)
                    for side, right in zip(self._sides(), ends, strict=True)
                    if (left := _left(*side[:3])) is not None
                ]
            )
        lefts = [left for side in self._sides() if (left := _left(*side[:3])) is not None]
        total = lefts[0] if len(lefts) == 1 else lefts[0].add_(lefts[1])
        return gram_norms(total, of_gates)

    def _written_out(self) -> Tensor:
        numbers = max(side[0].numel() for side in self._sides())
        step, batch = max(1, CACHED // numbers), self.gates.shape[1]
        total = self.gates.new_zeros(batch)
        for weight, bias, given, back, _ in self._sides():
            if weight.requires_grad:
                for at in range(0, batch, step):
                    part = slice(at, at + step)
                    each = torch.bmm(given[:, part].permute(1, 2, 0), back[:, part].transpose(0, 1))
                    total[part] += each.square_().sum((1, 2))
            if bias is not None and bias.requires_grad:
                total += back.sum(0).square().sum(1)
        return total

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale the narrow side of each product; the gates are the wide one."""
        found = []
        steps, size = len(self.gates), self.states.shape[2]
        of_gates = factors.repeat(steps) @ self.gates.flatten(0, 1)
        for weight, bias, given, back, roll in self._sides():
            if weight.requires_grad:
                scaled = given * factors[None, :, None]
                total = (scaled.flatten(0, 1).t() @ back.flatten(0, 1)).t()
                found.append((weight, total.roll(roll, 0) if roll else total))
            if bias is not None and bias.requires_grad:
                if self._is_gru:
                    first = bias is self.parameters.bias_in
                    own = of_gates[: 3 * size].roll(roll) if first else of_gates[size:]
                    found.append((bias, own))
                else:
                    found.append((bias, of_gates))
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        for weight, bias, given, back, roll in self._sides():
            if weight.requires_grad:
                each = torch.bmm(back.permute(1, 2, 0), given.transpose(0, 1))
                yield weight, each.roll(roll, 1) if roll else each
            if bias is not None and bias.requires_grad:
                yield bias, back.sum(0).roll(roll, 1)

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        self.inputs, self.states = without(self.inputs, bad, 1), without(self.states, bad, 1)
        self.gates = without(self.gates, bad, 1)


def _gram(values: Tensor) -> Tensor:
    """From ``[T, B, n]`` to ``[B, T, T]``."""
    return torch.bmm(values.transpose(0, 1), values.permute(1, 2, 0))


def _left(weight: Tensor, bias: Tensor | None, given: Tensor) -> Tensor | None:
    """Gram of what a weight is multiplied by, and of the 1 of its bias; none if both are frozen."""
    has_bias = bias is not None and bias.requires_grad
    if not weight.requires_grad:
        return given.new_ones(given.shape[1], len(given), len(given)) if has_bias else None
    gram = _gram(given)
    return gram.add_(1.0) if has_bias else gram
