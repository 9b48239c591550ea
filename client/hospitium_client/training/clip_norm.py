"""The clipping norm: fixed, or following a quantile of the gradients' norms (Andrew et al. 2021).

A norm that follows is moved after every step by a noisy count of the units that were not clipped.
The count costs privacy; the gradients' noise is raised so that both together are one Gaussian
mechanism with the plan's noise multiplier z: 1/z² = 1/z_gradients² + 1/(2 z_count)². The factor 2
is there because a unit moves the centred count (every unit adds ±1/2) by one half.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from hospitium_client.training.noise import SecureNoise
    from hospitium_client.training.private import PrivateStepPlan

RATE = 0.2
"""How fast the logarithm of the norm moves, per step and missed share (the paper's value)."""
COUNT_NOISE = 0.05
"""Standard deviation of the count's noise as a share of the expected units (the paper's value)."""
DEAREST_COUNT = 2.5
"""The count's noise is at least so many z: it raises the gradients' noise by 2 % at most."""
SMALLEST_NORM, LARGEST_NORM = 1e-4, 1e4


def count_noise(noise_multiplier: float, expected: float) -> float:
    """Return the standard deviation of the noise on a step's count of unclipped units."""
    return max(COUNT_NOISE * expected, DEAREST_COUNT * noise_multiplier)


def gradient_noise(noise_multiplier: float, expected: float) -> float:
    """Return the noise multiplier left for the gradients, slightly above the plan's.

    **Guarantees:** gradients and count together cost what the plan's noise multiplier costs.
    """
    count = 1.0 / (2.0 * count_noise(noise_multiplier, expected)) ** 2
    return 1.0 / math.sqrt(1.0 / noise_multiplier**2 - count)


class FixedNorm:
    """The plan's clipping norm; ``noise`` is the deviation of the noise on a clipped sum.

    ``divisor`` turns the noisy sum into a gradient: the expected number of units.
    """

    def __init__(self, plan: PrivateStepPlan, expected: float) -> None:
        self.value, self.noise, self.divisor = plan.clip_norm, plan.own_noise, expected

    def see(self, norms: Tensor) -> None:
        """Take in the norms ``[units]`` of a part of a step."""

    def step(self, noise: SecureNoise) -> None:
        """Move on after a step."""


class FollowedNorm:
    """A clipping norm that follows ``plan.clip_quantile``; gradients count in units of it.

    So a site with short gradients moves the model as far as one with long ones, and the learning
    rate does not depend on the norm.
    """

    def __init__(self, plan: PrivateStepPlan, quantile: float, expected: float) -> None:
        self.value, self._quantile, self._expected = plan.clip_norm, quantile, expected
        self._multiplier = gradient_noise(plan.noise_multiplier, expected)
        self._count_noise = count_noise(plan.noise_multiplier, expected)
        self._centred = 0.0

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on a clipped sum."""
        return self._multiplier * self.value

    @property
    def divisor(self) -> float:
        """What turns the noisy sum into a gradient."""
        return self._expected * self.value

    def see(self, norms: Tensor) -> None:
        """Take in the norms ``[units]`` of a part of a step; NaN and infinity count as clipped."""
        self._centred += int((norms <= self.value).sum()) - len(norms) / 2

    def step(self, noise: SecureNoise) -> None:
        """Move the norm after a step, by the noisy count alone."""
        spread = float(noise.normal((1,), self._count_noise))
        share = (self._centred + spread) / self._expected + 0.5
        moved = self.value * math.exp(-RATE * (min(max(share, 0.0), 1.0) - self._quantile))
        self.value, self._centred = min(max(moved, SMALLEST_NORM), LARGEST_NORM), 0.0


def clip_norm_of(plan: PrivateStepPlan, expected: float) -> FixedNorm | FollowedNorm:
    """Return the clipping norm of a training run, for ``expected`` units per step."""
    if plan.clip_quantile is None:
        return FixedNorm(plan, expected)
    return FollowedNorm(plan, plan.clip_quantile, expected)


class ClipNorms:
    """The norms that a site's rounds ended with, in its home: a round done again begins alike."""

    def __init__(self, home: Path) -> None:
        self._path = home / "clip_norms.json"

    def before(self, training_round: int, first: float) -> float:
        """Return the norm that a round begins with; ``first`` is the study's."""
        earlier = [(number, norm) for number, norm in self._read() if number < training_round]
        return max(earlier)[1] if earlier else first

    def note(self, training_round: int, norm: float) -> None:
        """Keep the norm that a round ended with."""
        kept = dict(self._read()) | {training_round: norm}
        write_durably(self._path, json.dumps(sorted(kept.items())).encode())

    def _read(self) -> list[tuple[int, float]]:
        if not self._path.exists():
            return []
        return [(int(number), float(norm)) for number, norm in json.loads(self._path.read_bytes())]
