"""Whether the models of a registry are those that the audited sums make.

`hospitium_common.auditing` checks that a round's sum is the sum of what was signed. Here the sum is
followed on: to the normalisation, to the next model, to the figures of an evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.auditing import COORDINATOR, Check, check
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Purpose
from hospitium_common.metrics import TailLayout
from hospitium_common.normalisation import Normalisation, ranges
from hospitium_common.schedule import NUMBERS_PER_STAGE, STATISTICS_STAGE
from hospitium_common.secagg.context import model_digest
from hospitium_common.secagg.fixed_point import sum_to_reals
from hospitium_common.transcript import announced
from hospitium_server.secure_sum import GroupSum, RoundTotals
from hospitium_server.steps import RoundInput, model_of, take_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hospitium_common.auditing import RoundAudit
    from hospitium_common.study import Study
    from hospitium_server.registry import Registry, Version

MADE = "What came of the sum is in the registry"


def check_models(audit: RoundAudit, registry: Registry, study: Study) -> tuple[Check, ...]:
    """Check the model that a round sent out and, where its sum was recomputed, what it led to."""
    if not audit.holds:
        return (Check(what=MADE, outcome="not checked", details=("the sum itself is broken",)),)
    if audit.purpose is Purpose.STATISTICS:
        return (_normalisation(audit, registry, study),)
    sent, check_of_sent = _sent(audit, registry)
    if sent is None:
        return (check_of_sent,)
    if not audit.sums:
        return check_of_sent, Check(what=MADE, outcome="not checked", details=("no sum to follow",))
    if audit.purpose is Purpose.EVALUATE:
        return check_of_sent, _figures(audit, registry)
    return check_of_sent, _model(audit, registry, study, sent)


def _sent(audit: RoundAudit, registry: Registry) -> tuple[Version | None, Check]:
    """Find the version that was sent, newest first; of copies of one model the first.

    An evaluation may be of the moving average that a version carries.
    """
    what = "The model that was sent is a version of the registry"
    named = {one.task.model_digest for one in audit.transcripts}
    numbers = [number for number, _, _ in registry.lineage()]
    if audit.purpose is Purpose.TRAIN:
        numbers = [number for number in numbers if number < _training_round(audit)]
    for number in reversed(numbers):
        version = registry.load(number)
        models = {f"version {model_of(version)}": version.parameters}
        if audit.purpose is Purpose.EVALUATE and len(version.optimizer.average):
            average = version.optimizer.average.astype(np.float32)
            models[f"the moving average up to version {number}"] = average
        for name, model in models.items():
            if {model_digest(audit.purpose, model.tobytes(), version.normalisation)} == named:
                first = registry.load(model_of(version))
                return first, check(what, [], name)
    fault = PeerProtocolError("no version of the registry was sent in this round", COORDINATOR)
    return None, check(what, [fault], "")


def _training_round(audit: RoundAudit) -> int:
    return audit.number // NUMBERS_PER_STAGE - STATISTICS_STAGE


def _totals(audit: RoundAudit) -> RoundTotals:
    groups = tuple(
        GroupSum(
            vector=sum_to_reals(one.words, one.transcript.task.quantiser, one.policy),
            tail=one.tail,
            survivors=tuple(sorted(one.transcript.digests)),
        )
        for one in audit.sums
    )
    return RoundTotals(
        groups=groups, result=announced([one.transcript.result for one in audit.sums])
    )


def _model(audit: RoundAudit, registry: Registry, study: Study, sent: Version) -> Check:
    number = _training_round(audit)
    if number not in {one for one, _, _ in registry.lineage()}:
        return Check(what=MADE, outcome="not checked", details=("its version is not there yet",))
    made = registry.load(number)
    if made.record.model_of is not None and made.record.rejected:
        expected, told = registry.load(made.record.model_of), "not used"
        details = f"version {number} keeps the model of version {expected.number}: " + told
        return _compare(made.parameters, expected.parameters, details)
    quantiser = audit.transcripts[0].task.quantiser
    history = [record for record, _ in registry.history() if record.round < number]
    # What the round knew: the version that it sent had not been judged yet.
    history = [
        replace(record, withdrawn="") if record.round == number - 1 else record
        for record in history
    ]
    layout = TailLayout(study=study, tensors=len(quantiser.lengths), features=len(ranges(study)))
    given = RoundInput(
        study=study, tail_layout=layout, number=number, base=sent, quantiser=quantiser,
        history=history,
    )  # fmt: skip
    step = take_step(given, _totals(audit))
    details = f"version {number} is version {sent.number} moved by this sum"
    return _compare(made.parameters, step.parameters, details)


def _normalisation(audit: RoundAudit, registry: Registry, study: Study) -> Check:
    lineage = registry.lineage()
    if not audit.sums or not lineage:
        return Check(what=MADE, outcome="not checked", details=("no sum to follow",))
    layout = TailLayout(study=study, tensors=0, features=len(ranges(study)))
    statistics = layout.statistics(_totals(audit).tail)
    computed = Normalisation.from_totals(statistics.features, study).encode()
    same = computed == registry.load(lineage[0][0]).normalisation
    faults = [] if same else [PeerProtocolError("the normalisation is another", COORDINATOR)]
    return check(MADE, faults, "the normalisation is computed from this sum")


def _figures(audit: RoundAudit, registry: Registry) -> Check:
    """Compare the totals of an evaluation with those that the report was made from."""
    totals = _totals(audit).tail
    same = any(np.array_equal(kept, totals) for kept in registry.evaluations())
    faults = [] if same else [PeerProtocolError("the figures kept are others", COORDINATOR)]
    return check(MADE, faults, "the figures that are reported are these totals")


def _compare(found: NDArray[np.float32], expected: NDArray[np.float32], details: str) -> Check:
    if np.array_equal(found, expected):
        return check(MADE, [], details)
    apart = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    fault = PeerProtocolError(f"expected that {details}; they differ by {apart:.3g}", COORDINATOR)
    return check(MADE, [fault], "")
