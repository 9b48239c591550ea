"""Epsilon of what was spent, and the noise that a planned study needs.

Opacus computes both bounds used here: Rényi (Mironov 2017; Mironov, Talwar and Zhang 2019) and PRV
(Gopi, Lee and Wutschitz 2021). Both are valid upper bounds, so the smaller one counts. Opacus's GDP
accountant is an approximation that falls below the valid bound; it is never used.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

from opacus.accountants import PRVAccountant, RDPAccountant

from hospitium_common.errors import ConfigError
from hospitium_common.privacy import SpendEvent

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST_NOISE = 1000.0
PRECISION = 5e-3
"""Calibration stops when it leaves at most this share of the budget unused."""
MOST_REFINEMENTS = 12
PRV_ERROR = 3e-3
"""Error of PRV's discretisation in units of the Rényi epsilon; the bound has it added on top."""
RDP_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [80, 128, 256, 512, 1024]

History = tuple[tuple[float, float, int], ...]


def epsilon(events: Sequence[SpendEvent], delta: float) -> float:
    """Return epsilon of all events together, at this delta; 0 for no events.

    **Guarantees:** never below the true epsilon of the composed mechanism.
    """
    return _epsilon(_merged(events), delta)


def is_within(events: Sequence[SpendEvent], delta: float, limit: float) -> bool:
    """Whether the events cost at most ``limit``; asks the slower accountant only if it matters."""
    history = _merged(events)
    return not history or _renyi(history, delta) <= limit or _epsilon(history, delta) <= limit


def calibrate_noise(
    *, epsilon: float, delta: float, sample_rate: float, steps: int,
    spent: Sequence[SpendEvent] = (),
) -> float:  # fmt: skip
    """Return the smallest noise multiplier with which ``steps`` more steps stay within epsilon.

    Raises:
        ConfigError: the budget cannot be met with any reasonable noise.
    """
    return _calibrate(epsilon, delta, sample_rate, steps, _merged(spent))


def default_delta(patients: int) -> float:
    """Return 1/N^1.1 for N patients."""
    return math.pow(max(patients, 2), -1.1)


def check_delta(delta: float, patients: int) -> None:
    """Refuse a delta that would allow the disclosure of one whole patient.

    Raises:
        ConfigError: delta ≥ 1/N.
    """
    if delta >= 1.0 / patients:
        raise ConfigError(
            f"expected delta below 1/N for this site's N patients, got {delta:g}; leave "
            "privacy.delta out of the study, or choose a smaller one"
        )


def _merged(events: Sequence[SpendEvent]) -> History:
    """Put equal mechanisms together: composition does not depend on their order."""
    merged: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.noise_multiplier, event.sampling_rate)
            merged[key] = merged.get(key, 0) + event.steps
    return tuple((noise, rate, steps) for (noise, rate), steps in sorted(merged.items()))


@lru_cache(maxsize=256)
def _calibrate(epsilon: float, delta: float, rate: float, steps: int, spent: History) -> float:
    """Bracket with the quick Rényi bound, then close in on the tighter one by false position.

    Epsilon is nearly a power of the noise, so a straight line in logarithms needs few steps.
    """

    def excess(noise: float) -> float:
        return math.log(_epsilon((*spent, (noise, rate, steps)), delta) / epsilon)

    safe = _calibrate_renyi(epsilon, delta, rate, steps, spent)
    low, high = 0.75 * safe, safe
    above, below = excess(low), excess(high)
    while above <= 0:
        low, high, below = 0.75 * low, low, above
        above = excess(low)
    for _ in range(MOST_REFINEMENTS):
        if below > -PRECISION:
            break
        # Aim at the middle of what is precise enough, on the safe side.
        fraction = (above + PRECISION / 2) / (above - below)
        middle = low * (high / low) ** fraction
        found = excess(middle)
        if found <= 0:
            high, below = middle, found
        else:
            low, above = middle, found
    return high


def _calibrate_renyi(
    epsilon: float, delta: float, rate: float, steps: int, spent: History
) -> float:
    low, high = 0.1, 1.0
    while _renyi((*spent, (high, rate, steps)), delta) > epsilon:
        low, high = high, high * 1.6
        if high > LARGEST_NOISE:
            raise ConfigError(
                f"expected a budget that {steps} steps can keep, epsilon {epsilon:g} is too small "
                "for this site; allow more, or plan fewer rounds"
            )
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        fits = _renyi((*spent, (middle, rate, steps)), delta) <= epsilon
        low, high = (low, middle) if fits else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float) -> float:
    if not history:
        return 0.0
    if any(noise <= 0 for noise, _, _ in history):
        return math.inf
    quick = _renyi(history, delta)
    return min(quick, _prv(history, delta, error=PRV_ERROR * quick))


def _renyi(history: History, delta: float) -> float:
    if any(noise <= 0 for noise, _, _ in history):
        return math.inf
    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it suggests more orders at the ends of the range
        return float(accountant.get_epsilon(delta, alphas=RDP_ORDERS))


def _prv(history: History, delta: float, error: float) -> float:
    """Return PRV's upper bound, or infinity where its discretisation does not hold."""
    accountant = PRVAccountant()
    accountant.history = list(history)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = float(accountant.get_epsilon(delta, eps_error=error))
    except (ValueError, RuntimeError, OverflowError, MemoryError):
        return math.inf
    return found if found >= 0 else math.inf
