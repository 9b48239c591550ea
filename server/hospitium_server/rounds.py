"""One study, round by round: statistics, training, evaluation, and a checkpoint after each."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hospitium_common.errors import HospitiumError, StudyHalted
from hospitium_common.messages import Purpose
from hospitium_common.metrics import EvaluationSums
from hospitium_common.normalisation import Normalisation
from hospitium_common.schedule import (
    NUMBERS_PER_STAGE,
    STATISTICS_STAGE,
    protocol_round,
    rotation_seed,
    secagg_policy,
    training_stage,
)
from hospitium_common.secagg.quantiser import Quantiser, quantiser_for
from hospitium_server import aggregation, guard, selection
from hospitium_server.evaluation import Figures, figures
from hospitium_server.registry import Registry, RoundRecord, Version
from hospitium_server.secure_sum import RoundPlan, RoundTotals
from hospitium_server.steps import RoundInput, Step, model_of, round_record, score, take_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hospitium_common.metrics import EvaluationTotals, TailLayout
    from hospitium_common.parameters import Layout
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
    """The end of a study: the last and the best version, and how the best one does.

    ``averaged`` says that ``best`` is the moving average of the versions up to its number.
    """

    last: Version
    best: Version
    averaged: bool
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
            StudyHalted: round after round was rejected; a person has to look into it first.
            HospitiumError: a round failed; what was finished is in the registry.
        """
        version = self._registry.latest()
        if version is None:
            version = self._prepare(first_parameters)
        stopped = selection.has_stalled(self._study, self._registry.history())
        while version.number < self._study.rounds and not stopped:
            version = self._train(version)
            stopped = selection.has_stalled(self._study, self._registry.history())
        return self._conclude(version, stopped)

    def _prepare(self, parameters: NDArray[np.float32]) -> Version:
        """Round 1: add up the statistics that every site's normalisation rests on."""
        totals = self._sum_figures(STATISTICS_STAGE, Purpose.STATISTICS, parameters[:0], b"")
        statistics = guard.plausible_statistics(
            self._tail_layout.statistics(totals.tail), self._study, len(totals.survivors)
        )
        normalisation = Normalisation.from_totals(statistics.features, self._study)
        version = Version(
            number=0,
            parameters=parameters,
            optimizer=aggregation.start(self._study, self._layout.size),
            normalisation=normalisation.encode(),
            record=round_record(totals, 0, records=statistics.records),
        )
        self._registry.save(version)
        return version

    def _train(self, version: Version) -> Version:
        """Run the round after ``version``, from the newest model that counts."""
        number, base = version.number + 1, self._judged(version.number)
        if self._registry.may_be_unmasked(protocol_round(training_stage(number))):
            return self._skip(number, base)
        begun = self._clock()
        quantiser = self._quantiser(base, number)
        totals = self._summing(
            RoundPlan(
                number=protocol_round(training_stage(number)),
                purpose=Purpose.TRAIN,
                parameters=base.parameters,
                public=base.normalisation,
                quantiser=quantiser,
            )
        )
        given = RoundInput(
            study=self._study, tail_layout=self._tail_layout, number=number, base=base,
            quantiser=quantiser, history=[made for made, _ in self._registry.history()],
        )  # fmt: skip
        return self._accept(given, take_step(given, totals), begun)

    def _accept(self, given: RoundInput, step: Step, begun: float) -> Version:
        """Note how the base did, let the gate decide, and write the next version down."""
        base, record = given.base, step.record
        received = figures(self._nothing if step.received is None else step.received, self._study)
        if step.received is not None:
            self._registry.note(base.number, received)
            self._registry.note_score(base.number, step.score)
        made = Version(
            number=given.number, parameters=step.parameters, optimizer=step.optimizer,
            normalisation=base.normalisation, record=record,
        )  # fmt: skip
        good = self._judged(base.number)
        if good.number != base.number:
            reason = f"it was trained from version {base.number}, which was withdrawn"
            made = self._unmoved(good, replace(record, rejected=reason))
        made = replace(made, record=replace(made.record, seconds=self._clock() - begun))
        self._registry.save(made)
        self._watcher.on_round(made.record, received)
        self._count_rejections(made.record)
        return made

    @property
    def _nothing(self) -> EvaluationSums:
        return EvaluationSums.nothing(self._study)

    def _judged(self, number: int) -> Version:
        """Let the gate judge a version by what is in the registry; return the one that counts."""
        withdrawn = [made.round for made, _ in self._registry.history() if made.withdrawn]
        taken, reason = selection.withdrawal(
            self._study, number, self._registry.scores(), withdrawn
        )
        if taken:
            log.warning("version %d is withdrawn: %s", number, reason)
            self._registry.withdraw(taken, reason)
        return self._registry.standing(number)

    def _count_rejections(self, record: RoundRecord) -> None:
        """Stop when too many rounds led nowhere: somebody has to find out why.

        A round that the gate takes back counts like one that is rejected at once.

        Raises:
            StudyHalted: too many since the model moved last.
        """
        if not record.rejected:
            return
        log.warning("training round %d is rejected: %s", record.round, record.rejected)
        nowhere = record.round - (record.model_of or 0)
        if nowhere >= self._study.robustness.most_rejected:
            raise StudyHalted(
                f"training round {record.round}: rejected ({record.rejected}). The last {nowhere} "
                f"rounds led nowhere, the model is that of version {record.model_of}. Find out "
                "which site does harm and leave it out; run the study again to go on"
            )

    def _skip(self, number: int, base: Version) -> Version:
        """Go on with the same model after a round that was cut off while it was unmasked.

        The sites have spent that round and will not let its updates be summed again.
        """
        log.warning("training round %d was cut off while it was unmasked: it is lost", number)
        record = RoundRecord(
            round=number, second_moments=base.record.second_moments, result=base.record.result,
            lost=True,
        )  # fmt: skip
        made = self._unmoved(base, record)
        self._registry.save(made)
        return made

    def _unmoved(self, base: Version, record: RoundRecord) -> Version:
        """Return a version with the model of ``base``."""
        return replace(
            base,
            number=record.round,
            record=replace(
                record, second_moments=base.record.second_moments, model_of=model_of(base)
            ),
        )

    def _quantiser(self, version: Version, number: int) -> Quantiser:
        """Bounds from the round before; the first training round has the study's bound."""
        study, lengths, record = self._study, self._layout.lengths, version.record
        fallback = study.cohort.update_bound
        if not record.second_moments:
            return Quantiser(lengths=lengths, bounds=(fallback,) * len(lengths))
        round_number = protocol_round(training_stage(number))
        return quantiser_for(
            record.second_moments, lengths, fallback,
            policy=secagg_policy(study, self._tail_layout.length, round_number),
            rotation=rotation_seed(study, round_number),
            sites=len(record.survivors) or study.cohort.maximum_sites,
        )  # fmt: skip

    def _conclude(self, last: Version, stopped: bool) -> StudyResult:
        """Evaluate the last version, and the best one where that is another."""
        stage = training_stage(last.number) + 1
        last = self._judged(last.number)
        totals = self._evaluate(stage, last)
        self._registry.note(last.number, figures(totals.validation, self._study))
        self._registry.note_score(last.number, score(totals.validation, self._study))
        last = self._judged(last.number)
        number = selection.best_version(self._study, self._registry.history())
        best = last if number is None else self._registry.load(number)
        averaged = len(last.optimizer.average) > 0
        if averaged:  # nothing is chosen by noisy validation figures
            best = replace(last, parameters=last.optimizer.average.astype(np.float32))
        # Totals are kept by version; those of the average under a number that no version has.
        kept_as = self._study.rounds + 1 if averaged else best.number
        totals = self._evaluate(stage + 1, best, number=kept_as)
        return StudyResult(
            last=last,
            best=best,
            averaged=averaged,
            validation=figures(totals.validation, self._study),
            test=figures(totals.test, self._study),
            test_sums=totals.test,
            stopped_early=stopped,
        )

    def _evaluate(
        self, stage: int, version: Version, number: int | None = None
    ) -> EvaluationTotals:
        """Return how a version does on held-out patients; the sites are asked once for each.

        ``number`` is what its totals are kept under, if not the version's own.
        """
        number = version.number if number is None else number
        kept = self._registry.evaluation(number)
        if kept is None:
            kept = self._sum_figures(
                stage, Purpose.EVALUATE, version.parameters, version.normalisation
            ).tail
            self._registry.keep_evaluation(number, kept)
        return self._tail_layout.evaluation(kept)

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
