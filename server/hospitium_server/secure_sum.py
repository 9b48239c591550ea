"""One round over the network: the four exchanges of HSA-1, attempts, and who was missing, why."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hospitium_common.errors import HospitiumError, PeerProtocolError
from hospitium_common.messages import (
    Ack,
    Masked,
    Message,
    Paired,
    PairOffer,
    PairOffers,
    PairRequest,
    Purpose,
    Ready,
    Reason,
    Refusal,
    Shares,
    decode,
)
from hospitium_common.schedule import secagg_policy
from hospitium_server.unmasking import RoundSum, Unmasking, signed_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from numpy.typing import NDArray

    from hospitium_common.federation import FederationRoster
    from hospitium_common.metrics import TailLayout
    from hospitium_common.roster import Roster
    from hospitium_common.secagg.fixed_point import Quantiser
    from hospitium_common.study import Study
    from hospitium_server.transport import Transport

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
REFUSALS = {
    Reason.PROTOCOL: "refused: the message broke the protocol",
    Reason.NOT_APPROVED: "refused: the site's policy does not allow it",
    Reason.BUDGET: "refused: the site's privacy budget does not cover it",
    Reason.DATA: "refused: the site's data did not pass its quality check",
    Reason.LOCAL_FAULT: "refused: a fault at the site, see its own log",
}
SILENT = "no answer before the deadline"

M = TypeVar("M", bound=Message)


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
class RoundTotals:
    """What a round revealed and who was there. ``missing`` maps a site to the reason."""

    vector: NDArray[np.float64]
    tail: NDArray[np.uint64]
    survivors: tuple[int, ...]
    result: bytes
    transcript: bytes = b""
    missing: Mapping[int, str] = field(default_factory=dict)
    attempts: int = 1
    bytes_sent: int = 0
    bytes_received: int = 0


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
    ``begin_unmasking`` writes down that a round's shares are about to be asked for.
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
        previous_result: bytes = bytes(64),
    ) -> None:
        self._study, self._key, self._present = study, key, present
        self._transport, self._tail_layout = transport, tail_layout
        self._next_epoch, self._next_attempt = next_epoch, next_attempt
        self._begin_unmasking = begin_unmasking
        self._previous_result = previous_result
        self._paired: tuple[bytes, Roster] | None = None
        self._missing: dict[int, str] = {}
        self._bytes = [0, 0]

    def __call__(self, plan: RoundPlan) -> RoundTotals:
        """Run one round, in at most three attempts, with whoever answers.

        Raises:
            HospitiumError: too few sites; nothing was revealed, and the round can be tried again.
        """
        missing: dict[int, str] = {}
        self._bytes = [0, 0]
        roster, invited = self._invite(missing)
        for count in range(1, MOST_ATTEMPTS + 1):
            self._missing = {}
            try:
                total = self._attempt(plan, roster, invited)
            except PeerProtocolError as error:
                missing |= self._missing
                self._paired = None
                log.warning("round %d: %s", plan.number, error)
                lost = set(self._missing) | ({error.blame} if error.blame else set())
                if error.blame:
                    missing.setdefault(error.blame, "left out: it broke the protocol")
                invited = [site for site in invited if site not in lost]
                if count == MOST_ATTEMPTS or len(invited) < self._study.cohort.minimum_sites:
                    raise HospitiumError(self._too_few(plan, invited, missing)) from error
                continue
            missing |= self._missing
            if REFUSALS[Reason.PROTOCOL] in missing.values():
                self._paired = None  # a site may have lost its roots: pair before the next round
            self._previous_result = total.transcript.result
            return RoundTotals(
                vector=total.vector,
                tail=total.tail,
                survivors=total.survivors,
                result=total.transcript.result,
                transcript=total.transcript.encode(),
                missing={s: r for s, r in missing.items() if s not in total.survivors},
                attempts=count,
                bytes_sent=self._bytes[0],
                bytes_received=self._bytes[1],
            )
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _invite(self, missing: dict[int, str]) -> tuple[Roster, list[int]]:
        """Return the key epoch's roster and who is invited; pair first if somebody is new.

        Raises:
            HospitiumError: too few sites stand ready, or too few can be paired.
        """
        present = self._present()
        federation = present.federation
        there = sorted(present.sites)[: self._study.cohort.maximum_sites]
        for _ in range(MOST_ATTEMPTS):
            if len(there) < self._study.cohort.minimum_sites:
                break
            if not self._are_paired(federation, there):
                self._missing = {}
                roster = self._pair(federation, there)
                self._paired = None if roster is None else (federation.digest, roster)
                missing |= self._missing
                there = [site for site in there if site not in self._missing]
            if self._paired is not None:
                return self._paired[1], there
        reasons = "; ".join(f"site {s}: {r}" for s, r in sorted(missing.items())) or "none missing"
        raise HospitiumError(
            f"expected at least {self._study.cohort.minimum_sites} sites to stand ready, got "
            f"{len(there)} ({reasons}). Nothing was sent; run the study again when more are there"
        )

    def _are_paired(self, federation: FederationRoster, sites: list[int]) -> bool:
        if self._paired is None:
            return False
        digest, roster = self._paired
        return digest == federation.digest and set(sites) <= set(roster.sites)

    def _pair(self, federation: FederationRoster, sites: list[int]) -> Roster | None:
        """Relay the pair offers of a key epoch; nothing if a site fails: who is in ``_missing``."""
        roster = federation.for_study(self._study.digest, self._next_epoch(), sites)
        request = PairRequest(
            version=federation.version, epoch=roster.epoch, sites=tuple(sites), roster=roster.digest
        ).encode()
        given: list[PairOffer] = []
        deadline = self._study.cohort.exchange_s
        for _, answer in self._exchange(dict.fromkeys(sites, request), PairOffers, deadline):
            given += answer.offers
        if self._missing:
            return None
        requests = {
            site: PairOffers(offers=tuple(o for o in given if o.receiver == site)).encode()
            for site in sites
        }
        for site, paired in self._exchange(requests, Paired, deadline):
            if paired.roster != roster.digest:
                self._missing[site] = "it paired under another roster"
        return None if self._missing else roster

    def _attempt(self, plan: RoundPlan, roster: Roster, invited: list[int]) -> RoundSum:
        policy = secagg_policy(self._study, self._tail_layout.length, plan.number)
        task = signed_task(
            self._key, roster, policy, purpose=plan.purpose, round_number=plan.number,
            attempt=self._next_attempt(plan.number), invited=invited,
            previous_result=self._previous_result, quantiser=plan.quantiser,
            model=plan.parameters.tobytes(), public=plan.public,
        )  # fmt: skip
        run = Unmasking(roster=roster, policy=policy, task=task)
        request = task.encode()
        cohort = self._study.cohort
        self._gather(dict.fromkeys(invited, request), Ready, run.on_ready, cohort.deadline_s)
        requests = {site: r.encode() for site, r in run.close_cohort().items()}
        self._missing |= run.excluded
        self._gather(requests, Masked, run.on_masked, cohort.exchange_s)
        confirmation = run.close_survivors()
        request = confirmation.encode()
        confirming = dict.fromkeys(confirmation.digests, request)
        self._gather(confirming, Ack, run.on_ack, cohort.exchange_s)
        unmasking = run.unmask_request()
        self._begin_unmasking(plan.number)
        request = unmasking.encode()
        asked = dict.fromkeys(unmasking.acks, request)
        self._gather(asked, Shares, run.on_shares, cohort.exchange_s)
        return run.finish()

    def _exchange(
        self, requests: Mapping[int, bytes], kind: type[M], deadline_s: float
    ) -> Iterator[tuple[int, M]]:
        """Send requests and yield answers of the right kind, one at a time; note who is missing."""
        answered = set()
        self._bytes[0] += sum(len(request) for request in requests.values())
        for site, data in self._transport.exchange(requests, deadline_s):
            self._bytes[1] += len(data)
            if site not in requests or site in answered:
                continue
            answered.add(site)
            try:
                message = decode(data)
            except PeerProtocolError:
                self._missing[site] = "its answer could not be read"
                continue
            if isinstance(message, Refusal):
                self._missing[site] = REFUSALS[message.reason]
            elif isinstance(message, kind):
                yield site, message
            else:
                self._missing[site] = f"expected {kind.__name__}, got {type(message).__name__}"
        for site in set(requests) - answered:
            self._missing[site] = SILENT

    def _gather(
        self,
        requests: Mapping[int, bytes],
        kind: type[M],
        take: Callable[[M], None],
        deadline_s: float,
    ) -> None:
        """Let answers in; one that breaks the protocol costs its site the round, no more."""
        for site, answer in self._exchange(requests, kind, deadline_s):
            try:
                take(answer)
            except PeerProtocolError as error:
                log.warning("site %d: %s", site, error)
                self._missing[site] = "left out: it broke the protocol"

    def _too_few(self, plan: RoundPlan, invited: list[int], missing: dict[int, str]) -> str:
        reasons = "; ".join(f"site {s}: {r}" for s, r in sorted(missing.items())) or "none missing"
        return (
            f"round {plan.number}: expected at least {self._study.cohort.minimum_sites} sites, "
            f"{len(invited)} answered ({reasons}). Nothing was revealed and what was finished is "
            "kept: run the study again when the sites are back"
        )
