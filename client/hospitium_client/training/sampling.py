"""Poisson sampling over patients, with a cap on each patient's records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hospitium_client.samples import Samples
    from hospitium_client.training.noise import SecureNoise
    from hospitium_common.privacy import Unit


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The records of one step, those of a unit next to each other.

    ``unit_of`` numbers the step's units 0, 1, 2, …; ``weights`` are 1 / (records of the unit).
    """

    records: Tensor
    unit_of: Tensor
    weights: Tensor

    @property
    def units(self) -> int:
        """How many units were drawn; possibly none."""
        return int(self.unit_of[-1]) + 1 if len(self.unit_of) else 0


class PoissonSampler:
    """Draws every unit on its own with the same probability, afresh for every step.

    The stream of coins comes from a secret key: who knows which patients were drawn could take
    the amplification by sampling away.
    """

    def __init__(
        self, samples: Samples, *, unit: Unit, rate: float, cap: int, coins: SecureNoise
    ) -> None:
        self._rate, self._cap, self._coins = rate, cap, coins
        owners = samples.patients if unit == "patient" else torch.arange(len(samples))
        self._order = torch.argsort(owners, stable=True)
        self._counts = torch.bincount(owners)
        self._begins = torch.cumsum(self._counts, 0) - self._counts
        self._several = bool((self._counts > 1).any())

    def draw(self) -> Sample:
        """Return the records of the next step."""
        drawn = torch.nonzero(self._coins.uniform(len(self._counts)) < self._rate).flatten()
        if not self._several:
            return Sample(
                records=self._order[self._begins[drawn]],
                unit_of=torch.arange(len(drawn)),
                weights=torch.ones(len(drawn)),
            )
        records, counts = [], []
        for begin, count in zip(
            self._begins[drawn].tolist(), self._counts[drawn].tolist(), strict=True
        ):
            own = self._order[begin : begin + count]
            if count > self._cap:
                own = own[torch.argsort(self._coins.uniform(count))[: self._cap]]
            records.append(own)
            counts.append(len(own))
        sizes = torch.tensor(counts, dtype=torch.int64)
        return Sample(
            records=torch.cat(records) if records else torch.zeros(0, dtype=torch.int64),
            unit_of=torch.repeat_interleave(torch.arange(len(drawn)), sizes),
            weights=torch.repeat_interleave(1.0 / sizes.float(), sizes),
        )
