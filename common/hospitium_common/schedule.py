"""Which round of the protocol does what, and with which ring: both sides follow from the study.

The protocol numbers its rounds upwards and never repeats one whose shares were released. A *stage*
of the study (statistics are stage 1, training round r is stage r + 1, evaluations follow) has 16
such numbers. If the coordinator dies while it unmasks, that number is lost: sums of counts are
asked for again under the next one, but a training round is never summed twice, because two sums
over different sites would tell what one of them sent.

Where a study has groups, every group runs a training round by itself, under the same number: a
site's group follows from its roster index alone, so that no coordinator can put it into two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Purpose
from hospitium_common.secagg.hashing import Label, tagged_hash
from hospitium_common.secagg.policy import SecAggPolicy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hospitium_common.messages import Task
    from hospitium_common.study import Study

NUMBERS_PER_STAGE = 16
STATISTICS_STAGE = 1
EVALUATION_STAGES = 2
"""Evaluations follow the last training round: of the last model, and of the released one."""
SMALLEST_MEDIAN = 3
"""Of fewer groups, a bad one decides: a round with groups needs as many that came to a sum."""


def training_stage(training_round: int) -> int:
    """Return the stage of training round 1, 2, …"""
    return training_round + STATISTICS_STAGE


def protocol_round(stage: int, retry: int = 0) -> int:
    """Return the protocol's number of a stage's first (0) or a later try."""
    return stage * NUMBERS_PER_STAGE + retry


def check_task(task: Task, site: int, study: Study) -> None:
    """Demand that a task's purpose belongs to its round, and updates to the site's own group.

    Statistics are stage 1, and evaluations come after the first training round: a coordinator
    cannot ask for figures whenever it likes.

    Raises:
        PeerProtocolError: the coordinator asks for something else.
    """
    stage = task.round // NUMBERS_PER_STAGE
    if task.purpose is Purpose.TRAIN:
        training_round(task.round, study)
        if {group_of(one, study) for one in task.invited} != {group_of(site, study)}:
            raise PeerProtocolError("expected updates of this site's own group, got others", 0)
        return
    first, last = STATISTICS_STAGE, STATISTICS_STAGE
    if task.purpose is Purpose.EVALUATE:
        first, last = training_stage(1) + 1, training_stage(study.rounds) + EVALUATION_STAGES
    if not first <= stage <= last:
        raise PeerProtocolError(
            f"expected {task.purpose.name} in stages {first} to {last}, got it in {stage}", blame=0
        )


def training_round(round_number: int, study: Study) -> int:
    """Return which training round a protocol round is.

    Raises:
        PeerProtocolError: it is none of this study's, or a training round asked for again.
    """
    stage, retry = divmod(round_number, NUMBERS_PER_STAGE)
    number = stage - STATISTICS_STAGE
    if not 1 <= number <= study.rounds or retry:
        raise PeerProtocolError(
            f"expected training round 1 to {study.rounds}, each once, got round {number}, try "
            f"{retry + 1}",
            blame=0,
        )
    return number


def group_of(site: int, study: Study) -> int:
    """Return the group, from 0, in which a site's updates are added up; it never changes."""
    return (site - 1) % study.robustness.groups


def fewest_groups(study: Study) -> int:
    """Return how many groups have to come to a sum for a training round to be used."""
    return 1 if study.robustness.groups == 1 else SMALLEST_MEDIAN


def groups(sites: Iterable[int], study: Study) -> tuple[tuple[int, ...], ...]:
    """Return the sites of every group that has any, each in order."""
    members: dict[int, list[int]] = {}
    for site in sorted(sites):
        members.setdefault(group_of(site, study), []).append(site)
    return tuple(tuple(members[group]) for group in sorted(members))


def secagg_policy(study: Study, tail_len: int, round_number: int) -> SecAggPolicy:
    """Return the policy of one round: the first training round knows no spread, so 24 bits."""
    bits = study.cohort.ring_bits
    if round_number == protocol_round(training_stage(1)) and bits == 16:
        bits = 24
    return SecAggPolicy(
        study=study.digest,
        ring_bits=bits,
        n_max=study.cohort.maximum_sites,
        m_min=study.cohort.minimum_sites,
        weight_cap=study.cohort.weight_cap,
        tail_len=tail_len,
    )


def rotation_seed(study: Study, round_number: int) -> bytes:
    """Return the public seed of a round's rotation; nothing where the study wants none.

    It belongs to the round, not to the attempt: a new attempt masks the same words.
    """
    wanted = study.cohort.rotation
    if not (study.cohort.ring_bits == 16 if wanted is None else wanted):
        return b""
    return tagged_hash(Label.ROTATION, study.digest, round_number)
