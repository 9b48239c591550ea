"""One round over the network: the four exchanges of HSA-1, attempts, and who was missing, why.

Where a study has groups, a training round is as many secure sums side by side: the exchanges of all
groups go out together, and a group that breaks down does not stop the others.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.errors import HospitiumError, PeerProtocolError
from hospitium_common.messages import (
    Ack,
    Masked,
    Paired,
    PairOffer,
    PairOffers,
    PairRequest,
    Purpose,
    Ready,
    Reason,
    Shares,
)
from hospitium_common.schedule import fewest_groups, groups, secagg_policy
from hospitium_common.secagg.masks import usable_threads
from hospitium_common.transcript import announced
from hospitium_server.attempt import Attempt
from hospitium_server.exchanges import BROKE_THE_PROTOCOL, REFUSALS, Exchanges
from hospitium_server.unmasking import Unmasking, signed_task

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from numpy.typing import NDArray

    from hospitium_common.archive import RoundArchive
    from hospitium_common.federation import FederationRoster
    from hospitium_common.metrics import TailLayout
    from hospitium_common.roster import Roster
    from hospitium_common.secagg.quantiser import Quantiser
    from hospitium_common.study import Study
    from hospitium_server.transport import Transport
    from hospitium_server.unmasking import RoundSum

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What the sites are asked to do in one round, and what they are given for it.

    ``parameters`` is float32 ``[size]``, empty for statistics; ``public`` are figures that
    everyone may know.
    """

    number: int
    purpose: Purpose
    parameters: NDArray[np.float32]
    public: bytes
    quantiser: Quantiser


@dataclass(frozen=True, kw_only=True)
class GroupSum:
    """What one secure sum revealed: a vector ``[size]``, words ``[tail_len]``, over whom."""

    vector: NDArray[np.float64]
    tail: NDArray[np.uint64]
    survivors: tuple[int, ...]


def total_words(tails: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Add up the words of several groups."""
    words: NDArray[np.uint64] = np.sum(list(tails), axis=0, dtype=np.uint64)
    return words


@dataclass(frozen=True, kw_only=True)
class RoundTotals:
    """What a round revealed, group by group, and who was there.

    ``missing`` maps a site to the reason; ``result`` is what the next task names as the previous
    result.
    """

    groups: tuple[GroupSum, ...]
    result: bytes
    missing: Mapping[int, str] = field(default_factory=dict)
    attempts: int = 1
    bytes_sent: int = 0
    bytes_received: int = 0

    @property
    def tail(self) -> NDArray[np.uint64]:
        """Totals over all groups."""
        return total_words(group.tail for group in self.groups)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Everybody who is in a sum."""
        return tuple(sorted(site for group in self.groups for site in group.survivors))


@dataclass(frozen=True, kw_only=True)
class Presence:
    """The newest roster, and the sites that stand ready under it."""

    federation: FederationRoster
    sites: tuple[int, ...]


class SecureSum:
    """Runs rounds over a transport; the only thing it ever sees of a site's figures is a sum.

    ``present`` is asked before every round who stands ready: a site that comes late, or back, is
    paired with the others first, under the next key epoch.
    ``next_attempt`` hands out attempt numbers that are on disk before they are used;
    ``begin_unmasking`` writes down that a round's shares are about to be asked for. ``archive``
    keeps every round's transcript before its sum is handed out.
    """

    def __init__(
        self,
        *,
        study: Study,
        key: Ed25519PrivateKey,
        present: Callable[[], Presence],
        transport: Transport,
        tail_layout: TailLayout,
        next_epoch: Callable[[], int],
        next_attempt: Callable[[int], int],
        begin_unmasking: Callable[[int], None],
        archive: RoundArchive,
    ) -> None:
        self._study, self._key, self._present = study, key, present
        self._transport, self._tail_layout = transport, tail_layout
        self._next_epoch, self._next_attempt = next_epoch, next_attempt
        self._begin_unmasking, self._archive = begin_unmasking, archive
        self._paired: tuple[bytes, Roster] | None = None
        self._exchanges = Exchanges(transport)

    def __call__(self, plan: RoundPlan) -> RoundTotals:
        """Run one round, in at most three attempts, with whoever answers.

        Raises:
            HospitiumError: too few sites; nothing more is revealed. The round can be tried again,
                unless some groups were summed already.
        """
        missing: dict[int, str] = {}
        self._exchanges = Exchanges(self._transport)
        roster, there = self._invite(missing)
        previous = self._archive.last_result()
        invited = self._groups(plan, there)
        wanted = fewest_groups(self._study) if plan.purpose is Purpose.TRAIN else 1
        done: list[RoundSum] = []
        count = 0
        while invited and len(done) + len(invited) >= wanted and count < MOST_ATTEMPTS:
            count += 1
            self._exchanges.missing = {}
            attempt = self._attempt(plan, roster, previous, invited, wanted - len(done))
            missing |= self._exchanges.missing
            done += attempt.sums
            invited = [self._who_is_left(error, sites, missing) for sites, error in attempt.failed]
            invited = [sites for sites in invited if self._are_enough(sites)]
            if attempt.failed or REFUSALS[Reason.PROTOCOL] in missing.values():
                self._paired = None  # a site may have lost its roots: pair before the next round
        if len(done) < wanted:
            raise HospitiumError(self._too_few(plan, there, missing, done))
        return self._totals(there, done, missing, count)

    def _groups(self, plan: RoundPlan, sites: Sequence[int]) -> list[list[int]]:
        """Return who is summed with whom: only updates are summed in groups.

        Raises:
            HospitiumError: a group has too few sites for a secure sum.
        """
        if plan.purpose is not Purpose.TRAIN:
            return [list(sites)]
        made = [list(group) for group in groups(sites, self._study)]
        whole = [group for group in made if self._are_enough(group)]
        fewest = fewest_groups(self._study)
        if len(whole) < fewest and fewest > 1:
            raise HospitiumError(
                f"round {plan.number}: expected at least {fewest} groups of "
                f"{self._study.cohort.minimum_sites} sites that stand ready, got groups of "
                f"{', '.join(str(len(group)) for group in made)}. Nothing was sent"
            )
        return whole

    def _are_enough(self, sites: Collection[int]) -> bool:
        return len(sites) >= self._study.cohort.minimum_sites

    def _who_is_left(
        self, error: PeerProtocolError, sites: list[int], missing: dict[int, str]
    ) -> list[int]:
        lost = set(self._exchanges.missing)
        if error.blame:
            missing.setdefault(error.blame, BROKE_THE_PROTOCOL)
            lost.add(error.blame)
        return [site for site in sites if site not in lost]

    def _totals(
        self,
        there: Sequence[int],
        done: Sequence[RoundSum],
        missing: Mapping[int, str],
        attempts: int,
    ) -> RoundTotals:
        finished = sorted(done, key=lambda one: one.transcript.task.invited)
        survivors = {site for one in finished for site in one.survivors}
        alone = {site: "its group had too few sites" for site in there if site not in survivors}
        return RoundTotals(
            groups=tuple(
                GroupSum(vector=one.vector, tail=one.tail, survivors=one.survivors)
                for one in finished
            ),
            result=announced([one.transcript.result for one in finished]),
            missing={
                site: why
                for site, why in sorted((alone | dict(missing)).items())
                if site not in survivors
            },
            attempts=attempts,
            bytes_sent=self._exchanges.bytes_sent,
            bytes_received=self._exchanges.bytes_received,
        )

    def _invite(self, missing: dict[int, str]) -> tuple[Roster, list[int]]:
        """Return the key epoch's roster and who is invited; pair first if somebody is new.

        Raises:
            HospitiumError: too few sites stand ready, or too few can be paired.
        """
        present = self._present()
        federation = present.federation
        there = sorted(present.sites)[: self._study.cohort.maximum_sites]
        for _ in range(MOST_ATTEMPTS):
            if not self._are_enough(there):
                break
            if not self._are_paired(federation, there):
                self._exchanges.missing = {}
                roster = self._pair(federation, there)
                self._paired = None if roster is None else (federation.digest, roster)
                missing |= self._exchanges.missing
                there = [site for site in there if site not in self._exchanges.missing]
            if self._paired is not None:
                return self._paired[1], there
        raise HospitiumError(
            f"expected at least {self._study.cohort.minimum_sites} sites to stand ready, got "
            f"{len(there)} ({_reasons(missing)}). Nothing was sent; run the study again when more "
            "are there"
        )

    def _are_paired(self, federation: FederationRoster, sites: list[int]) -> bool:
        if self._paired is None:
            return False
        digest, roster = self._paired
        return digest == federation.digest and set(sites) <= set(roster.sites)

    def _pair(self, federation: FederationRoster, sites: list[int]) -> Roster | None:
        """Relay the pair offers of a key epoch; nothing if a site fails: who is in ``missing``."""
        roster = federation.for_study(self._study.digest, self._next_epoch(), sites)
        request = PairRequest(
            version=federation.version, epoch=roster.epoch, sites=tuple(sites), roster=roster.digest
        ).encode()
        given: list[PairOffer] = []
        deadline = self._study.cohort.exchange_s
        for _, answer in self._exchanges.ask(dict.fromkeys(sites, request), PairOffers, deadline):
            given += answer.offers
        if self._exchanges.missing:
            return None
        requests = {
            site: PairOffers(offers=tuple(o for o in given if o.receiver == site)).encode()
            for site in sites
        }
        for site, paired in self._exchanges.ask(requests, Paired, deadline):
            if paired.roster != roster.digest:
                self._exchanges.missing[site] = "it paired under another roster"
        if self._exchanges.missing:
            return None
        self._archive.begin(self._study, roster, self._tail_layout.length)
        return roster

    def _attempt(
        self, plan: RoundPlan, roster: Roster, previous: bytes, invited: Iterable[list[int]],
        least: int,
    ) -> Attempt:  # fmt: skip
        """Run the four exchanges; unmask only if at least that many groups can be."""
        policy = secagg_policy(self._study, self._tail_layout.length, plan.number)
        runs = []
        for sites in invited:
            task = signed_task(
                self._key, roster, policy, purpose=plan.purpose, round_number=plan.number,
                attempt=self._next_attempt(plan.number), invited=sites,
                previous_result=previous, quantiser=plan.quantiser,
                model=plan.parameters.data.cast("B"), public=plan.public,
            )  # fmt: skip
            run = Unmasking(roster=roster, policy=policy, task=task, threads=usable_threads())
            runs.append(run)
        attempt = Attempt(runs, self._archive)
        ask, cohort = self._exchanges.gather, self._study.cohort
        ask(attempt.task_requests(), Ready, attempt.on_ready, cohort.deadline_s)
        ask(attempt.cohort_requests(), Masked, attempt.on_masked, cohort.exchange_s)
        self._exchanges.missing |= attempt.excluded
        ask(attempt.confirmation_requests(), Ack, attempt.on_ack, cohort.exchange_s)
        asked = attempt.unmasking_requests(least)
        if asked:
            self._begin_unmasking(plan.number)
        ask(asked, Shares, attempt.on_shares, cohort.exchange_s)
        attempt.finish()
        return attempt

    def _too_few(
        self, plan: RoundPlan, there: Sequence[int], missing: Mapping[int, str],
        done: Sequence[RoundSum],
    ) -> str:  # fmt: skip
        least, lost = self._study.cohort.minimum_sites, set(missing) & set(there)
        fewest = fewest_groups(self._study)
        wanted, got = f"{least} sites", f"{len(there) - len(lost)} answered"
        if plan.purpose is Purpose.TRAIN and fewest > 1:
            wanted, got = f"{fewest} groups of {least} sites", f"{len(done)} came to a sum"
        then = (
            "The round is lost: run the study again, it goes on with the next"
            if done
            else "Nothing was revealed and what was finished is kept: run the study again when "
            "the sites are back"
        )
        return (
            f"round {plan.number}: expected at least {wanted}, {got} ({_reasons(missing)}). {then}"
        )


def _reasons(missing: Mapping[int, str]) -> str:
    return "; ".join(f"site {s}: {r}" for s, r in sorted(missing.items())) or "none missing"
