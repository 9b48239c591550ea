"""What one training costs in privacy, as the accountant needs to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["patient", "record"]


@dataclass(frozen=True, kw_only=True)
class SpendEvent:
    """``steps`` releases of a clipped sum with Gaussian noise, each over a fresh Poisson sample.

    ``sampling_rate`` is the probability that a unit is in a step's sample; ``noise_multiplier``
    is the noise's standard deviation in units of the clipping norm. Neighbouring data sets
    differ by adding or removing one ``unit``. With ``honest_sites`` > 1 this site adds only
    1/√honest_sites of that noise, and the rest comes from the other sites in the masked sum.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    unit: Unit
    honest_sites: int = 1
