"""One study, round by round: statistics, training, evaluation, and a checkpoint after each."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hospitium_common.errors import HospitiumError, PeerProtocolError
from hospitium_common.messages import Purpose
from hospitium_common.normalisation import Normalisation
from hospitium_common.schedule import (
    NUMBERS_PER_STAGE,
    STATISTICS_STAGE,
    protocol_round,
    secagg_policy,
    training_stage,
)
from hospitium_common.secagg.fixed_point import (
    Quantiser,
    bounds_from_second_moments,
    rounding_error,
)
from hospitium_server import aggregation
from hospitium_server.evaluation import Figures, figures
from hospitium_server.registry import Registry, RoundRecord, Version
from hospitium_server.secure_sum import RoundPlan, RoundTotals

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hospitium_common.metrics import EvaluationSums, EvaluationTotals, TailLayout, TrainingSums
    from hospitium_common.parameters import Layout
    from hospitium_common.secagg.policy import SecAggPolicy
    from hospitium_common.study import Study

log = logging.getLogger(__name__)


class Summing(Protocol):
    """Runs one round at the sites and returns its totals."""

    def __call__(self, plan: RoundPlan) -> RoundTotals:
        """Ask the sites, add up what they answer."""
        ...


class Watcher(Protocol):
    """Somebody who wants to see rounds as they finish."""

    def on_round(self, record: RoundRecord, received: Figures) -> None:
        """Called after each training round, with how the model did that the sites received."""
        ...


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """The end of a study: the last and the best version, and how the best one does."""

    last: Version
    best: Version
    validation: Figures
    test: Figures
    test_sums: EvaluationSums
    stopped_early: bool


class StudyRun:
    """A study that is run, or taken up again where it was interrupted."""

    def __init__(
        self,
        *,
        study: Study,
        layout: Layout,
        tail_layout: TailLayout,
        registry: Registry,
        summing: Summing,
        watcher: Watcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._study, self._layout, self._tail_layout = study, layout, tail_layout
        self._registry, self._summing, self._watcher = registry, summing, watcher
        self._clock = clock

    def run(self, first_parameters: NDArray[np.float32]) -> StudyResult:
        """Run every round that is not in the registry yet, then evaluate.

        Raises:
            HospitiumError: a round failed; what was finished is in the registry.
        """
        version = self._registry.latest()
        if version is None:
            version = self._prepare(first_parameters)
        stopped = self._has_stalled(version.number)
        while version.number < self._study.rounds and not stopped:
            version = self._train(version)
            stopped = self._has_stalled(version.number)
        return self._conclude(version, stopped)

    def _prepare(self, parameters: NDArray[np.float32]) -> Version:
        """Round 1: add up the statistics that every site's normalisation rests on."""
        totals = self._sum_figures(STATISTICS_STAGE, Purpose.STATISTICS, parameters[:0], b"")
        statistics = self._tail_layout.statistics(totals.tail)
        normalisation = Normalisation.from_totals(statistics.features, self._study)
        version = Version(
            number=0,
            parameters=parameters,
            optimizer=aggregation.start(self._study, self._layout.size),
            normalisation=normalisation.encode(),
            record=_record(totals, 0, 0.0),
        )
        self._registry.save(version)
        return version

    def _train(self, version: Version) -> Version:
        study, number = self._study, version.number + 1
        if self._registry.may_be_unmasked(protocol_round(training_stage(number))):
            return self._skip(version)
        begun = self._clock()
        quantiser = self._quantiser(version, number)
        totals = self._summing(
            RoundPlan(
                number=protocol_round(training_stage(number)),
                purpose=Purpose.TRAIN,
                parameters=version.parameters,
                public=version.normalisation,
                quantiser=quantiser,
            )
        )
        sums = self._tail_layout.training(totals.tail)
        share = study.cohort.weight_cap / self._plausible_weight(sums, len(totals.survivors))
        mean_update = totals.vector * share
        history = self._registry.history()
        policy = self._policy(number)
        sites = len(totals.survivors)
        allowed = (
            sites
            * share
            * math.sqrt(
                sum(n * b**2 for n, b in zip(quantiser.lengths, quantiser.bounds, strict=True))
            )
        )
        norms = [made.update_norm for made, _ in history if made.round > 0 and not made.lost]
        norm = aggregation.check_aggregate(mean_update, norms, allowed)
        optimizer, parameters = aggregation.apply(
            study, version.optimizer, version.parameters, mean_update
        )
        record = _record(
            totals, number, self._clock() - begun, update_norm=norm,
            quantisation_error=rounding_error(quantiser, policy, sites) * share / max(norm, 1e-30),
            clipped_fraction=sums.clipped / (sites * self._layout.size),
            dropped_contributions=sums.dropped,
            second_moments=self._second_moments(totals.vector, sums),
        )  # fmt: skip
        made = Version(
            number=number, parameters=parameters, optimizer=optimizer,
            normalisation=version.normalisation, record=record,
        )  # fmt: skip
        received = figures(sums.validation, study)
        self._registry.note(version.number, received)
        self._registry.save(made)
        self._watcher.on_round(record, received)
        return made

    def _second_moments(self, total: NDArray[np.float64], sums: TrainingSums) -> tuple[float, ...]:
        """Return the squares of the sites' updates per tensor, for the next round's quantiser.

        Where the noise is distributed no site tells its own; the sum's squares stand for them,
        which independent noise makes as large.
        """
        if not self._study.noise_is_distributed:
            return sums.second_moments
        pieces = np.split(total, np.cumsum(self._layout.lengths)[:-1])
        return tuple(float((piece**2).sum()) for piece in pieces)

    def _skip(self, version: Version) -> Version:
        """Go on with the same model after a round that was cut off while it was unmasked.

        The sites have spent that round and will not let its updates be summed again.
        """
        number = version.number + 1
        log.warning("training round %d was cut off while it was unmasked: it is lost", number)
        record = RoundRecord(
            round=number,
            survivors=version.record.survivors,
            second_moments=version.record.second_moments,
            result=version.record.result,
            lost=True,
        )
        made = replace(version, number=number, record=record)
        self._registry.save(made)
        return made

    def _plausible_weight(self, sums: TrainingSums, sites: int) -> int:
        """Return the total weight, if sites that keep to the study can have it.

        Raises:
            PeerProtocolError: a site must have lied about its weight.
        """
        largest = sites * self._study.cohort.weight_cap
        if not sites <= sums.weight <= largest:
            raise PeerProtocolError(
                f"expected a total weight from {sites} to {largest}, got {sums.weight}: a site "
                "does not keep to the study; the round is not used"
            )
        return sums.weight

    def _policy(self, number: int) -> SecAggPolicy:
        round_number = protocol_round(training_stage(number))
        return secagg_policy(self._study, self._tail_layout.length, round_number)

    def _quantiser(self, version: Version, number: int) -> Quantiser:
        """Bounds from the round before; the first training round has the study's bound."""
        study, lengths = self._study, self._layout.lengths
        fallback = study.cohort.update_bound
        bounds = (fallback,) * len(lengths)
        if version.record.second_moments:
            policy = self._policy(number)
            bounds = bounds_from_second_moments(
                version.record.second_moments, lengths, len(version.record.survivors), policy,
                fallback,
            )  # fmt: skip
        return Quantiser(lengths=lengths, bounds=bounds)

    def _has_stalled(self, number: int) -> bool:
        """Whether the federated validation metric has stood still for the study's patience."""
        rule = self._study.early_stopping
        if rule is None:
            return False
        scores = [
            seen.auroc if rule.metric == "auroc" else -seen.loss
            for _, seen in self._registry.history()[: number + 1]
            if seen is not None and not math.isnan(seen.auroc)
        ]
        if len(scores) <= rule.patience:
            return False
        return max(scores[-rule.patience :]) <= max(scores[: -rule.patience]) + rule.min_delta

    def _conclude(self, last: Version, stopped: bool) -> StudyResult:
        """Evaluate the last version, and the best one where that is another."""
        stage = training_stage(last.number) + 1
        totals = self._evaluate(stage, last)
        validation = figures(totals.validation, self._study)
        self._registry.note(last.number, validation)
        best = self._best(last)
        if best.number != last.number:
            totals = self._evaluate(stage + 1, best)
        return StudyResult(
            last=last,
            best=best,
            validation=figures(totals.validation, self._study),
            test=figures(totals.test, self._study),
            test_sums=totals.test,
            stopped_early=stopped,
        )

    def _best(self, last: Version) -> Version:
        """Return the version with the best validation metric; the later one where two agree."""
        rule = self._study.early_stopping
        metric = "auroc" if rule is None else rule.metric
        scored = [
            (seen.auroc if metric == "auroc" else -seen.loss, made.round)
            for made, seen in self._registry.history()
            if seen is not None and made.round > 0
        ]
        usable = [pair for pair in scored if not math.isnan(pair[0])]
        return self._registry.load(max(usable)[1]) if usable else last

    def _evaluate(self, stage: int, version: Version) -> EvaluationTotals:
        totals = self._sum_figures(
            stage, Purpose.EVALUATE, version.parameters, version.normalisation
        )
        return self._tail_layout.evaluation(totals.tail)

    def _sum_figures(
        self, stage: int, purpose: Purpose, parameters: NDArray[np.float32], public: bytes
    ) -> RoundTotals:
        """Sum counts without a vector, under the stage's first number that is not lost."""
        numbers = (protocol_round(stage, retry) for retry in range(NUMBERS_PER_STAGE))
        free = next((n for n in numbers if not self._registry.may_be_unmasked(n)), None)
        if free is None:
            raise HospitiumError(
                f"stage {stage}: expected a round that can still be run, all were cut off while "
                "they were unmasked; begin the study again in a new directory"
            )
        return self._summing(
            RoundPlan(
                number=free, purpose=purpose, parameters=parameters, public=public,
                quantiser=Quantiser(lengths=(), bounds=()),
            )
        )  # fmt: skip


def _record(
    totals: RoundTotals, number: int, seconds: float, *, update_norm: float = 0.0,
    quantisation_error: float = 0.0, clipped_fraction: float = 0.0,
    dropped_contributions: int = 0, second_moments: tuple[float, ...] = (),
) -> RoundRecord:  # fmt: skip
    return RoundRecord(
        round=number,
        survivors=totals.survivors,
        missing=dict(totals.missing),
        attempts=totals.attempts,
        seconds=seconds,
        bytes_sent=totals.bytes_sent,
        bytes_received=totals.bytes_received,
        update_norm=update_norm,
        quantisation_error=quantisation_error,
        clipped_fraction=clipped_fraction,
        dropped_contributions=dropped_contributions,
        second_moments=second_moments,
        result=totals.result.hex(),
    )
