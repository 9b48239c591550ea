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
class _Side:
    """Weights that meet the same gates: the gradient is Σ_t gates_t given_tᵀ, column by column.

    ``given`` ``[T, B, columns]`` is what all weights are multiplied by, side by side; the biases
    are multiplied by 1. A GRU's rows are kept in another order than torch's, by ``roll``.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    given: Tensor | None
    gates: Tensor
    roll: int = 0

    @classmethod
    def of(
        cls,
        weights: dict[Tensor, Tensor],
        biases: list[Tensor | None],
        gates: Tensor,
        roll: int = 0,
    ) -> _Side:
        """Keep what is trained; ``weights`` maps each to what it is multiplied by."""
        trained = {w: given for w, given in weights.items() if w.requires_grad}
        given = list(trained.values())
        return cls(
            tuple(trained), tuple(b for b in biases if b is not None and b.requires_grad),
            torch.cat(given, 2) if len(given) > 1 else next(iter(given), None), gates, roll,
        )  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the gradient."""
        return self.gates.shape[2], 0 if self.given is None else self.given.shape[2]

    def by_gram(self) -> Tensor:
        """Return squared norms ``[B]``."""
        steps, batch, _ = self.gates.shape
        none = self.gates.new_zeros(batch, steps, steps)
        left = none if self.given is None else _gram(self.given)
        return gram_norms(left.add_(len(self.biases)), _gram(self.gates))

    def written_out(self) -> Tensor:
        """Return squared norms ``[B]``."""
        total = self.gates.sum(0).square().sum(1) * len(self.biases)
        rows, columns = self.size
        if self.given is not None:
            step = max(1, CACHED // (rows * columns))
            for at in range(0, len(total), step):
                part = slice(at, at + step)
                left, right = self.given[:, part].permute(1, 2, 0), self.gates[:, part]
                total[part] += torch.bmm(left, right.transpose(0, 1)).square_().sum((1, 2))
        return total

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale the narrow side of the product; the gates are the wide one."""
        gates, found = self.gates.flatten(0, 1), []
        if self.given is not None:
            scaled = (self.given * factors[None, :, None]).flatten(0, 1)
            found += self._by_weight((scaled.t() @ gates).t())
        if self.biases:
            total = (factors.repeat(len(self.gates)) @ gates).roll(self.roll)
            found += [(bias, total) for bias in self.biases]
        return found

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        if self.given is not None:
            yield from self._by_weight(
                torch.bmm(self.gates.permute(1, 2, 0), self.given.transpose(0, 1))
            )
        each = self.gates.sum(0).roll(self.roll, 1)
        yield from ((bias, each) for bias in self.biases)

    def _by_weight(self, gradients: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split ``[..., rows, columns]`` into the weights' own columns."""
        rolled = gradients.roll(self.roll, -2) if self.roll else gradients
        parts = torch.split(rolled, [weight.shape[1] for weight in self.weights], -1)
        return list(zip(self.weights, parts, strict=True))

    def drop(self, bad: Tensor) -> None:
        self.gates = without(self.gates, bad, 1)
        if self.given is not None:
            self.given = without(self.given, bad, 1)


class RecurrentGradients:
    """Time comes first: ``inputs`` ``[T, B, in]``, ``states`` before each step ``[T, B, hidden]``.

    ``gates`` ``[T, B, 4 · hidden]``: an LSTM's four gate gradients serve both weights; of a GRU's
    ``[new from inputs | reset | update | new from the state]`` the first three quarters belong
    to the inputs, the last three to the states.
    """

    def __init__(
        self, parameters: Parameters, inputs: Tensor, states: Tensor, gates: Tensor
    ) -> None:
        weight_in, weight_across, bias_in, bias_across = parameters
        size = states.shape[2]
        if len(weight_across) == gates.shape[2]:  # an LSTM
            both = {weight_in: inputs, weight_across: states}
            self._sides = [_Side.of(both, [bias_in, bias_across], gates)]
        else:
            self._sides = [
                _Side.of({weight_in: inputs}, [bias_in], gates[:, :, : 3 * size], -size),
                _Side.of({weight_across: states}, [bias_across], gates[:, :, size:]),
            ]

    def squared_norms(self) -> Tensor:
        """Return ``[B]``."""
        found = []
        for side in self._sides:
            (rows, columns), steps = side.size, len(side.gates)
            cheap = steps * (rows + columns) < rows * columns
            found.append(side.by_gram() if cheap else side.written_out())
        return sum_of(found)

    def weighted_sum(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with the weighted sum of its gradients."""
        return [pair for side in self._sides for pair in side.weighted_sum(factors)]

    def one_by_one(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its gradients ``[B, ...]``."""
        for side in self._sides:
            yield from side.one_by_one()

    def drop(self, bad: Tensor) -> None:
        """Make the marked samples contribute nothing."""
        for side in self._sides:
            side.drop(bad)


def _gram(values: Tensor) -> Tensor:
    """From ``[T, B, n]`` to ``[B, T, T]``."""
    return torch.bmm(values.transpose(0, 1), values.permute(1, 2, 0))
