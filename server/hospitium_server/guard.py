"""What honest sites could have sent: totals and norms that are out of it are not used.

Under secure aggregation nobody sees one site's update, so nothing here can clean it. What one site
can do is bounded instead, on what is visible: a group's sum and totals. Three anchors do not move
with what a liar claims: the study's own bounds, the totals of earlier rounds over the same or fewer
or more sites, and inequalities that hold for all honest figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.errors import PeerProtocolError
from hospitium_common.normalisation import SUM_SCALE
from hospitium_server.aggregation import check_aggregate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

    from hospitium_common.metrics import EvaluationSums, StatisticsSums
    from hospitium_common.secagg.quantiser import Quantiser
    from hospitium_common.study import Study

    Vector = NDArray[np.float64]

WEIGHT_SLACK = 1.25
"""A site's number of records may change that much between two rounds, not more."""
ROUNDING_SLACK = 4.0
"""Standard deviations of rounding that a norm bound leaves room for."""
MOMENT_GROWTH = 100.0
"""A tensor's mean square may grow or shrink at most that much from round to round."""


@dataclass(frozen=True, kw_only=True)
class KnownWeight:
    """A total weight that was accepted before, and over whom; ``exact`` or only a ceiling."""

    sites: frozenset[int]
    weight: int
    exact: bool = True


def plausible_weight(
    weight: int, sites: Collection[int], study: Study, known: Iterable[KnownWeight]
) -> int:
    """Return a group's total weight, if sites that keep to the study can have it.

    Every site weighs from 1 to the study's cap, and as much as in earlier rounds. So the total
    over some sites lies between the totals that were seen over fewer of them and over more.

    Raises:
        PeerProtocolError: a site must have lied about its weight.
    """
    here = frozenset(sites)
    least, most = float(len(here)), float(len(here) * study.cohort.weight_cap)
    for one in known:
        if here <= one.sites:
            most = min(most, one.weight * WEIGHT_SLACK)
        if one.exact and one.sites <= here:
            least = max(least, one.weight / WEIGHT_SLACK)
    if not least <= weight <= most:
        raise PeerProtocolError(
            f"expected a total weight from {math.ceil(least)} to {math.floor(most)} over sites "
            f"{_listed(here)}, got {weight}: a site does not keep to the study"
        )
    return weight


def largest_norm(
    study: Study, quantiser: Quantiser, sites: int, weight: int, rounding: float
) -> float:
    """Return the largest norm of a mean update over ``sites`` that keep to the study.

    With ``update_norm`` C no site's update is longer than C, so neither is their weighted mean,
    whatever the weights. Without it only the quantiser's bounds hold. ``rounding`` is the standard
    deviation of the sum's rounding error; ``weight`` is a total that is plausible.
    """
    cap = study.cohort.weight_cap
    ring = sites * quantiser.largest_norm * cap / weight
    given = study.robustness.update_norm
    if given is None:
        return ring
    return min(ring, given) + ROUNDING_SLACK * rounding * cap / weight


def plausible_mean(mean: Vector, norms_before: Sequence[float], bound: float) -> float:
    """Return the norm of a group's mean update, if honest sites could have made it.

    Raises:
        PeerProtocolError: it is not finite, beyond the bound, or far beyond the rounds before.
    """
    return check_aggregate(mean, norms_before, bound)


def plausible_statistics(sums: StatisticsSums, study: Study, sites: int) -> StatisticsSums:
    """Return the totals of the statistics round, if they can be totals of counts at all.

    Values lie in 0…1, so no sum exceeds its count and no sum of squares its sum.

    Raises:
        PeerProtocolError: a site made up its figures; another round of statistics is needed.
    """
    patients, means, squares = sums.features
    steps = SUM_SCALE * patients + sites
    counts = sums.class_counts
    counts_agree = bool(((counts >= 0) & (counts <= sums.records)).all())
    if study.task.labels == "exclusive":
        counts_agree = counts_agree and int(counts.sum()) == sums.records
    features_agree = (
        (patients >= 0).all()
        and (patients <= sums.records).all()
        and (squares >= -sites).all()
        and (squares <= means + sites).all()
        and (means <= steps).all()
    )
    if not (counts_agree and features_agree):
        raise PeerProtocolError(
            "statistics: expected counts and sums that agree with each other, got others: a site "
            "made up its figures. Run the study again without it"
        )
    return sums


def plausible_figures(sums: EvaluationSums, study: Study) -> EvaluationSums:
    """Return validation totals, if they can be totals of counts at all.

    Raises:
        PeerProtocolError: a count is negative, or counts of the same records do not agree.
    """
    counted = sums.histogram.sum(axis=(1, 2))
    agree = bool((counted == sums.records).all())
    if study.task.labels == "exclusive":
        agree = agree and int(sums.confusion.sum()) == sums.records
    smallest = min(
        sums.records, int(sums.histogram.min(initial=0)), int(sums.confusion.min(initial=0))
    )
    if smallest < 0 or not agree or sums.brier < 0 or sums.loss < 0:
        raise PeerProtocolError(
            "expected validation counts that agree with each other, got others: a site made up "
            "its figures"
        )
    return sums


def trusted_moments(
    claimed: Sequence[float],
    vector: Vector,
    quantiser: Quantiser,
    sites: int,
    before: Sequence[float],
) -> tuple[float, ...]:
    """Return sums of squares per tensor, within what the sum itself and the round before allow.

    For any updates x of n sites ‖Σx‖²/n ≤ Σ‖x‖² (Cauchy and Schwarz), whatever a liar adds to the
    total of squares; and per site it moves at most `MOMENT_GROWTH`-fold from the round ``before``
    (mean squares per site; empty where there are none).
    """
    ends = np.cumsum(quantiser.lengths)[:-1]
    floors = [float((piece**2).sum()) / sites for piece in np.split(vector, ends)]
    trusted = []
    for at, (claim, floor) in enumerate(zip(claimed, floors, strict=True)):
        value = max(claim, floor) if math.isfinite(claim) else floor
        usual = before[at] * sites if before else 0.0
        if usual > 0:
            value = min(max(value, usual / MOMENT_GROWTH), usual * MOMENT_GROWTH)
        trusted.append(value)
    return tuple(trusted)


def _listed(sites: Iterable[int]) -> str:
    return ", ".join(str(site) for site in sorted(sites))
