"""From the sums of one training round to the next model: a pure function, so it can be audited."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.errors import PeerProtocolError
from hospitium_common.schedule import (
    fewest_groups,
    protocol_round,
    secagg_policy,
    training_stage,
)
from hospitium_common.secagg.fixed_point import rounding_error
from hospitium_server import aggregation, guard
from hospitium_server.combination import combine
from hospitium_server.evaluation import figures
from hospitium_server.registry import GroupRecord, RoundRecord, Version
from hospitium_server.secure_sum import total_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hospitium_common.metrics import EvaluationSums, TailLayout, TrainingSums
    from hospitium_common.secagg.quantiser import Quantiser
    from hospitium_common.study import Study
    from hospitium_server.aggregation import OptimizerState
    from hospitium_server.secure_sum import GroupSum, RoundTotals

    Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RoundInput:
    """What a training round started from: the ``base`` model, and what is known of earlier rounds.

    ``number`` counts training rounds from 1; ``history`` holds the records of all versions.
    """

    study: Study
    tail_layout: TailLayout
    number: int
    base: Version
    quantiser: Quantiser
    history: Sequence[RoundRecord]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The model after a round, and how the base did at the sites that received it.

    Where the round's update was not used the model is the base. ``received`` are totals over the
    groups that were used; ``score`` is what the validation gate goes by.
    """

    parameters: NDArray[np.float32]
    optimizer: OptimizerState
    record: RoundRecord
    received: EvaluationSums | None
    score: float


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A group whose sum honest sites could have sent."""

    total: GroupSum
    sums: TrainingSums
    mean: Vector
    record: GroupRecord
    error: float
    noise: float


def take_step(given: RoundInput, totals: RoundTotals) -> Step:
    """Check every group's sum, combine the means of those that pass, and move the model.

    The median bears fewer than half of the groups that came to a sum being bad. Those that are
    found out count among them: the round is used if most groups pass.

    **Guarantees:** a sum that no sites keeping to the study could have made moves nothing.
    """
    looked_at = [_look(given, group) for group in totals.groups]
    used = [group for group in looked_at if isinstance(group, _Group)]
    records = tuple(group.record if isinstance(group, _Group) else group for group in looked_at)
    few = len(looked_at) < fewest_groups(given.study)
    if few or 2 * len(used) <= len(looked_at):
        reason = "; ".join(group.rejected for group in records if group.rejected)
        reason = "too few groups came to a sum" if few else reason
        return _unmoved(given, totals, records, reason)
    update = combine([group.mean for group in used], given.study)
    optimizer, parameters = aggregation.apply(
        given.study, given.base.optimizer, given.base.parameters, update
    )
    sums = given.tail_layout.training(total_words(group.total.tail for group in used))
    sites = sum(len(group.total.survivors) for group in used)
    norm = float(np.linalg.norm(update))
    record = round_record(
        totals, given.number, groups=records, update_norm=norm,
        norm_bound=max(group.record.norm_bound for group in used),
        quantisation_error=max(group.error for group in used) / max(norm, 1e-30),
        rounding_to_noise=max(group.error / group.noise if group.noise else 0.0 for group in used),
        clipped_fraction=sums.clipped / (sites * given.quantiser.size),
        scaled_down=sums.scaled_down, dropped_contributions=sums.dropped,
        second_moments=_moments(given, used),
    )  # fmt: skip
    scores = [score(group.sums.validation, given.study) for group in used]
    return Step(
        parameters=parameters, optimizer=optimizer, record=record, received=sums.validation,
        score=_median([one for one in scores if not math.isnan(one)]),
    )  # fmt: skip


def score(sums: EvaluationSums, study: Study) -> float:
    """Return by what the validation gate judges a model; higher is better."""
    seen = figures(sums, study)
    return seen.auroc if study.robustness.gate_metric == "auroc" else -seen.loss


def round_record(
    totals: RoundTotals, number: int, *, groups: tuple[GroupRecord, ...] = (),
    update_norm: float = 0.0, norm_bound: float = 0.0, quantisation_error: float = 0.0,
    rounding_to_noise: float = 0.0,
    clipped_fraction: float = 0.0, scaled_down: int = 0, dropped_contributions: int = 0,
    second_moments: tuple[float, ...] = (), records: int = 0, rejected: str = "",
    model_of: int | None = None,
) -> RoundRecord:  # fmt: skip
    """Return what is kept of a round; its duration is filled in by whoever holds the clock."""
    return RoundRecord(
        round=number, survivors=totals.survivors, missing=dict(totals.missing),
        attempts=totals.attempts, bytes_sent=totals.bytes_sent,
        bytes_received=totals.bytes_received, update_norm=update_norm, norm_bound=norm_bound,
        quantisation_error=quantisation_error, rounding_to_noise=rounding_to_noise,
        clipped_fraction=clipped_fraction,
        scaled_down=scaled_down, dropped_contributions=dropped_contributions,
        second_moments=second_moments, result=totals.result.hex(), groups=groups,
        records=records, rejected=rejected, model_of=model_of,
    )  # fmt: skip


def model_of(version: Version) -> int:
    """Return in which version this version's model appeared first."""
    first = version.record.model_of
    return version.number if first is None else first


def _look(given: RoundInput, group: GroupSum) -> _Group | GroupRecord:
    study, sums = given.study, given.tail_layout.training(group.tail)
    number = protocol_round(training_stage(given.number))
    policy = secagg_policy(study, given.tail_layout.length, number)
    sites = len(group.survivors)
    try:
        weight = guard.plausible_weight(
            sums.weight, group.survivors, study, _known_weights(given.history)
        )
        guard.plausible_figures(sums.validation, study)
        share = study.cohort.weight_cap / weight
        mean = group.vector * share
        rounding = rounding_error(given.quantiser, policy, sites)
        bound = guard.largest_norm(study, given.quantiser, sites, weight, rounding)
        norm = guard.plausible_mean(mean, _norms(given.history), bound)
    except PeerProtocolError as error:
        return GroupRecord(survivors=group.survivors, rejected=str(error))
    record = GroupRecord(survivors=group.survivors, weight=weight, norm=norm, norm_bound=bound)
    return _Group(
        total=group, sums=sums, mean=mean, record=record, error=rounding * share,
        noise=math.sqrt(max(sums.noise_square, 0.0)) * share,
    )  # fmt: skip


def _unmoved(
    given: RoundInput, totals: RoundTotals, records: tuple[GroupRecord, ...], reason: str
) -> Step:
    base = given.base
    record = round_record(
        totals, given.number, groups=records, second_moments=base.record.second_moments,
        rejected=reason, model_of=model_of(base),
    )  # fmt: skip
    return Step(
        parameters=base.parameters, optimizer=base.optimizer, record=record, received=None,
        score=math.nan,
    )  # fmt: skip


def _moments(given: RoundInput, used: Sequence[_Group]) -> tuple[float, ...]:
    """Return the mean squares per site and tensor; over several groups their median."""
    before = given.base.record.second_moments
    rows = [
        np.array(
            guard.trusted_moments(
                _claimed_moments(given, group), group.total.vector, given.quantiser,
                len(group.total.survivors), before,
            )
        )
        / len(group.total.survivors)
        for group in used
    ]  # fmt: skip
    return tuple(float(value) for value in np.median(rows, axis=0))


def _claimed_moments(given: RoundInput, group: _Group) -> tuple[float, ...]:
    """Return the sums of squares of the sites' updates per tensor, as they say.

    Where the noise is distributed no site tells its own; the sum's squares stand for them,
    which independent noise makes as large.
    """
    if not given.study.noise_is_distributed:
        return group.sums.second_moments
    pieces = np.split(group.total.vector, np.cumsum(given.quantiser.lengths)[:-1])
    return tuple(float((piece**2).sum()) for piece in pieces)


def _known_weights(history: Sequence[RoundRecord]) -> list[guard.KnownWeight]:
    known = [
        guard.KnownWeight(sites=frozenset(made.survivors), weight=made.records, exact=False)
        for made in history
        if made.records
    ]
    return known + [
        guard.KnownWeight(sites=frozenset(group.survivors), weight=group.weight)
        for made in history
        if not made.withdrawn
        for group in made.groups
        if not group.rejected
    ]


def _norms(history: Sequence[RoundRecord]) -> list[float]:
    """Return the norms of the groups' means that were used before."""
    return [
        group.norm
        for made in history
        if not made.withdrawn and not made.rejected
        for group in made.groups
        if not group.rejected
    ]


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else math.nan
