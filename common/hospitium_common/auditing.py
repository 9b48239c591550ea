"""Checking a finished round from its archive: who signed what, and whether the sum is the sum.

Whoever has the archive can do this without asking anybody: a site, a data protection officer, the
coordinator itself. A finished round in which something does not fit is the coordinator's doing
(an honest one never announces it) unless the evidence names a site.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Purpose
from hospitium_common.schedule import group_of
from hospitium_common.transcript import (
    Transcript,
    announced,
    audit,
    signature_faults,
    unmasking_keys,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hospitium_common.archive import RoundArchive
    from hospitium_common.roster import Roster
    from hospitium_common.secagg.policy import SecAggPolicy
    from hospitium_common.study import Study

COORDINATOR = 0
Outcome = Literal["holds", "broken", "not checked"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. ``blamed`` holds roster indices, 0 for the coordinator."""

    what: str
    outcome: Outcome
    details: tuple[str, ...] = ()
    blamed: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RecomputedSum:
    """A sum that an auditor computed anew: ring elements ``[size]`` and tail words."""

    transcript: Transcript
    policy: SecAggPolicy
    words: NDArray[Any]
    tail: NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class RoundAudit:
    """What came out of checking one round; ``sums`` holds one for each group, where recomputed."""

    number: int
    purpose: Purpose
    transcripts: tuple[Transcript, ...]
    checks: tuple[Check, ...]
    sums: tuple[RecomputedSum, ...] = field(default=())

    def with_checks(self, more: tuple[Check, ...]) -> RoundAudit:
        """Return the same audit with more that was looked at."""
        return replace(self, checks=self.checks + more)

    @property
    def holds(self) -> bool:
        """Whether nothing that was looked at is broken."""
        return all(check.outcome != "broken" for check in self.checks)

    @property
    def blamed(self) -> tuple[int, ...]:
        """Everybody whom the evidence names, the coordinator (0) first."""
        return tuple(sorted({who for check in self.checks for who in check.blamed}))


def audit_round(archive: RoundArchive, number: int) -> RoundAudit:
    """Check one round: signatures, confirmations, seeds, the sum, and the chain of results.

    Raises:
        ConfigError: the archive does not hold this round.
        PeerProtocolError: a file of it is something else.
    """
    archived = archive.study()
    transcripts = archive.transcripts(number)
    policy = archived.policy(number)
    rosters = [archive.roster(one.roster_digest) for one in transcripts]
    sums, sum_check = _sums(archive, transcripts, rosters, policy)
    return RoundAudit(
        number=number,
        purpose=transcripts[0].task.purpose,
        transcripts=transcripts,
        checks=(
            _signatures(transcripts, rosters, policy),
            _seeds(transcripts, rosters, policy),
            sum_check,
            _once(transcripts, archived.study),
            _chain(archive, number, transcripts),
        ),
        sums=sums,
    )


def check(what: str, faults: Sequence[PeerProtocolError], good: str) -> Check:
    """Return a check that holds if there are no faults, and otherwise lists them."""
    if not faults:
        return Check(what=what, outcome="holds", details=(good,))
    return Check(
        what=what,
        outcome="broken",
        details=tuple(str(fault) for fault in faults),
        blamed=tuple(sorted({COORDINATOR if f.blame is None else f.blame for f in faults})),
    )


def _signatures(
    transcripts: Sequence[Transcript], rosters: Sequence[Roster], policy: SecAggPolicy
) -> Check:
    faults = [
        fault
        for transcript, roster in zip(transcripts, rosters, strict=True)
        for fault in signature_faults(transcript, roster, policy)
    ]
    told = "; ".join(
        f"{len(one.task.invited)} invited, {len(one.digests)} in the sum, {len(one.acks)} "
        f"confirmed (needed: {policy.threshold(len(one.task.invited))})"
        for one in transcripts
    )
    return check("Everything is signed by whom it names", faults, told)


def _seeds(
    transcripts: Sequence[Transcript], rosters: Sequence[Roster], policy: SecAggPolicy
) -> Check:
    faults, dropped = [], 0
    for transcript, roster in zip(transcripts, rosters, strict=True):
        dropped += len(set(transcript.ready) - set(transcript.digests))
        try:
            unmasking_keys(transcript, roster, policy)
        except PeerProtocolError as error:
            text = f"{error}; a result must not be announced then"
            faults.append(PeerProtocolError(text, COORDINATOR))
    survived = sum(len(one.digests) for one in transcripts)
    good = f"seeds of {survived} survivors and {dropped} dropped sites"
    return check("Released seeds are those that the sites committed to", faults, good)


def _sums(
    archive: RoundArchive, transcripts: Sequence[Transcript], rosters: Sequence[Roster],
    policy: SecAggPolicy,
) -> tuple[tuple[RecomputedSum, ...], Check]:  # fmt: skip
    what = "The announced result is the sum of the signed vectors"
    sums, faults, kept = [], [], 0
    for transcript, roster in zip(transcripts, rosters, strict=True):
        task = transcript.task
        if next(archive.vectors(task.round, task.attempt), None) is None:
            continue
        kept += 1
        try:
            vectors = archive.vectors(task.round, task.attempt)
            words, tail = audit(transcript, roster, policy, vectors)
        except PeerProtocolError as error:
            faults.append(error)
        else:
            sums.append(RecomputedSum(transcript=transcript, policy=policy, words=words, tail=tail))
    if not kept:
        details = ("the masked vectors were not kept; the coordinator's settings decide that",)
        return (), Check(what=what, outcome="not checked", details=details)
    if kept < len(transcripts):
        faults.append(PeerProtocolError("vectors of some groups are missing", COORDINATOR))
    size, tail_words = transcripts[0].task.quantiser.size, policy.tail_len
    good = f"recomputed: {size} ring elements and {tail_words} totals agree"
    return tuple(sums), check(what, faults, good)


def _once(transcripts: Sequence[Transcript], study: Study) -> Check:
    """No site is in two sums of one round, and no group holds a site of another."""
    faults: list[PeerProtocolError] = []
    confirmed: dict[int, bool] = {}
    for transcript in transcripts:
        for site in sorted(transcript.digests):
            here = site in transcript.acks
            if site in confirmed:
                both = here and confirmed[site]
                text = f"site {site} is in two sums of this round" + " and confirmed both" * both
                faults.append(PeerProtocolError(text, site if both else COORDINATOR))
            confirmed[site] = confirmed.get(site, False) or here
        if transcript.task.purpose is Purpose.TRAIN:
            members = {group_of(site, study) for site in transcript.task.invited}
            if len(members) != 1:
                text = "sites of several groups were summed together"
                faults.append(PeerProtocolError(text, COORDINATOR))
    names = ", ".join(str(site) for site in sorted(confirmed))
    return check("Every site is in one sum only", faults, f"sites {names}")


def _chain(archive: RoundArchive, number: int, transcripts: Sequence[Transcript]) -> Check:
    """The round names the result before it, and the round after it names this one's."""
    numbers = archive.rounds()
    at = numbers.index(number)
    before = bytes(64)
    if at:
        before = announced([one.result for one in archive.transcripts(numbers[at - 1])])
    faults = [
        PeerProtocolError(
            f"attempt {one.task.attempt} names another previous result than round "
            f"{numbers[at - 1] if at else 'none'} announced", COORDINATOR,
        )
        for one in transcripts
        if one.task.previous_result != before
    ]  # fmt: skip
    result = announced([one.result for one in transcripts])
    told = "the first round" if not at else f"follows round {numbers[at - 1]}"
    if at + 1 == len(numbers):
        told += "; no later round names it yet"
    else:
        after = numbers[at + 1]
        told += f", and round {after} names its result"
        for one in archive.transcripts(after):
            if one.task.previous_result != result:
                text = f"round {after} names another result than this round announced"
                faults.append(PeerProtocolError(text, COORDINATOR))
    return check("Results form one chain", faults, told)
