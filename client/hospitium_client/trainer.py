"""The trainer: the site's process with the data and without a network. Bytes in, bytes out.

It believes nothing but signatures: requests are the pinned coordinator's, rosters the pinned
governance key's, studies signed and approved here. Whatever it refuses is in this site's own log,
with who and why; what leaves is one word.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hospitium_client.approvals import load_policy, standing
from hospitium_client.data.loading import load_records
from hospitium_client.data.mapping import load_mapping
from hospitium_client.enrolment import PinnedRosters, Verdict
from hospitium_client.joining import Site, open_site
from hospitium_client.protection.ledger import Ledger
from hospitium_client.session import Session
from hospitium_client.studies import StoredStudy, open_study, receive
from hospitium_client.training.device import device_named
from hospitium_client.work import SiteWork
from hospitium_common.entropy import system_entropy
from hospitium_common.envelope import Answer, Request, open_request, seal_answer
from hospitium_common.errors import (
    ConfigError,
    DataRejected,
    HospitiumError,
    NotApproved,
    PeerProtocolError,
)
from hospitium_common.federation import FederationRoster
from hospitium_common.messages import (
    Message,
    PairRequest,
    Reason,
    Refusal,
    Standing,
    StudyOffer,
    StudyState,
    decode,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hospitium_client.policy import SitePolicy
    from hospitium_client.settings import SiteHome
    from hospitium_common.entropy import Entropy

log = logging.getLogger(__name__)

NO_ANSWER = b""
"""For a request that the pinned coordinator did not sign: nothing, and nothing signed."""
MOST_OPEN = 3
"""Studies whose data stays in memory; the one that was silent longest goes first."""


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A study under way, and everything that it was opened with."""

    session: Session
    policy: SitePolicy
    roster: bytes
    data: Path
    work: list[SiteWork]


class Trainer:
    """One hospital's trainer; ``answer`` may be called from several threads.

    Study offers are answered at once. Exchanges wait for each other, because there is one memory
    and one processor to train with.

    **Guarantees:** no request but the pinned coordinator's is answered; no data is read for a
    study that is not approved; an approval that was taken back counts from the next request on.
    """

    def __init__(
        self,
        home: SiteHome,
        passphrase: Callable[[], bytes],
        *,
        entropy: Entropy = system_entropy,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._passphrase = home, passphrase
        self._entropy, self._clock = entropy, clock
        self._rosters = PinnedRosters(home)
        self._site = open_site(home, passphrase)
        self._ledger = Ledger(home.ledger)
        self._open: OrderedDict[bytes, _Open] = OrderedDict()
        self._told: dict[str, StudyState] = {}
        self._exchanges, self._pins = threading.Lock(), threading.Lock()

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def answer(self, data: bytes) -> bytes:
        """Answer one request; never raises."""
        try:
            site = self._current_site()
            request = open_request(data, site.roster.coordinator)
        except PeerProtocolError as error:
            log.warning("a request that the pinned coordinator did not sign is not answered: %s",
                        error)  # fmt: skip
            return NO_ANSWER
        except HospitiumError as error:
            log.error("no request can be answered: %s", error)
            return NO_ANSWER
        reply = self._reply(site, request)
        return seal_answer(
            Answer(site=site.member.index, payload=reply), request.digest, site.keys.sign
        )

    def _reply(self, site: Site, request: Request) -> bytes:
        try:
            self._demand_enrolment(site)
            kind = bytes(request.payload[1:2])
            if kind == bytes((StudyOffer.KIND,)):
                return self._consider(request, decode(request.payload)).encode()
            if kind == bytes((PairRequest.KIND,)):
                self._demand_valid_sites(site.roster, decode(request.payload))
            with self._exchanges:
                return self._exchange(site, request)
        except NotApproved as error:
            log.warning("refused: %s", error)
            return Refusal(reason=Reason.NOT_APPROVED, blame=None).encode()
        except PeerProtocolError as error:
            log.warning("refused: %s", error)
            return Refusal(reason=Reason.PROTOCOL, blame=error.blame).encode()
        except HospitiumError as error:
            log.error("could not answer: %s", error)
        except Exception as error:  # its text may hold data
            log.error("could not answer: %s in this site's own code", type(error).__name__)
            log.debug("details for this site's administrator", exc_info=True)
        return Refusal(reason=Reason.LOCAL_FAULT, blame=None).encode()

    def _exchange(self, site: Site, request: Request) -> bytes:
        stored = open_study(self._home.studies, request.study)
        policy = load_policy(self._home.policy)
        policy.check(stored.study)
        session = self._session(site, stored, policy)
        reply = session.handle(bytes(request.payload))
        if reply == Refusal(reason=Reason.LOCAL_FAULT, blame=None).encode():
            # Perhaps memory ran out: what was loaded goes; what counts is on disk.
            del session, self._open[request.study]
            gc.collect()
        return reply

    def _session(self, site: Site, stored: StoredStudy, policy: SitePolicy) -> Session:
        """Return the study's session: the open one, unless something it was opened with changed."""
        digest, data = stored.study.digest, self._home.data_of(stored.study.study.id)
        found = self._open.get(digest)
        opened_with = (policy, site.roster.digest, data)
        if found is None or (found.policy, found.roster, found.data) != opened_with:
            reads_the_same = found is not None and (
                (found.data, found.policy.smallest_count) == (data, policy.smallest_count)
            )
            work = found.work if found is not None and reads_the_same else []
            found = _Open(
                session=self._new_session(site, stored, policy, data, work),
                policy=policy, roster=site.roster.digest, data=data, work=work,
            )  # fmt: skip
            self._open[digest] = found
        self._open.move_to_end(digest)
        while len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
        return found.session

    def _new_session(
        self,
        site: Site,
        stored: StoredStudy,
        policy: SitePolicy,
        data: Path,
        work: list[SiteWork],
    ) -> Session:
        def open_work() -> SiteWork:
            if not work:
                try:
                    records = load_records(data, stored.study)
                except ConfigError as error:
                    raise DataRejected(str(error)) from error
                log.info("study %s: read the data in %s", stored.study.study.id, data)
                work.append(
                    SiteWork(
                        stored.study, records, stored.folder,
                        smallest_count=policy.smallest_count,
                        device=device_named(self._home.settings().compute.device),
                    )
                )  # fmt: skip
            return work[0]

        return Session(
            index=site.member.index, keys=site.keys, federation=site.roster, study=stored.study,
            policy=policy, home=stored.folder / "session", ledger=self._ledger,
            open_work=open_work, entropy=self._entropy,
        )  # fmt: skip

    def _consider(self, request: Request, offer: Message) -> Standing:
        """Keep an offered study, go over to a newer roster, and say where the study stands."""
        if not isinstance(offer, StudyOffer):
            raise PeerProtocolError("expected a study offer, got something else", blame=0)
        with self._pins:
            decision = self._rosters.offer(FederationRoster.decode(offer.roster))
        if decision.verdict is Verdict.REFUSED:
            raise PeerProtocolError(decision.reason, blame=0)
        site = self._current_site()
        self._demand_enrolment(site)
        stored = receive(
            self._home.studies, offer.document, offer.signature, site.roster.coordinator
        )
        if stored.study.digest != request.study:
            raise PeerProtocolError(
                "expected the study that the request is about, got another one", blame=0
            )
        state = StudyState.ROSTER_WAITING
        if decision.verdict is Verdict.ACCEPTED:
            state = self._state_of(stored)
        if self._told.get(stored.digest) is not state:
            self._told[stored.digest] = state
            log.info(
                "study %s was offered and is %s; `hospitium site review %s` explains it",
                stored.study.study.id, state.name, stored.digest[:16],
            )  # fmt: skip
        return Standing(state=state, roster_version=site.roster.version)

    def _state_of(self, stored: StoredStudy) -> StudyState:
        study = stored.study
        state = standing(load_policy(self._home.policy), study)
        if state is StudyState.APPROVED:
            try:
                load_mapping(self._home.data_of(study.study.id))
            except ConfigError as error:
                log.error("study %s is approved, but: %s", study.study.id, error)
                return StudyState.DATA_MISSING
        return state

    def _current_site(self) -> Site:
        """Return keys, entry and roster; opened again when another roster was pinned."""
        with self._pins:
            roster = self._rosters.pinned()
            if roster.digest != self._site.roster.digest:
                log.info("goes by roster version %d now", roster.version)
                self._site = open_site(self._home, self._passphrase)
            return self._site

    def _demand_enrolment(self, site: Site) -> None:
        if not site.member.is_active(self._clock()):
            state = "was revoked" if site.member.revoked else "has expired"
            raise NotApproved(
                f"expected this hospital to be enrolled, its enrolment {state}; ask the coordinator"
            )

    def _demand_valid_sites(self, roster: FederationRoster, message: Message) -> None:
        """Refuse to pair with a hospital whose enrolment is over."""
        if isinstance(message, PairRequest) and message.version == roster.version:
            now = self._clock()
            gone = [m.name for m in map(roster.member, message.sites) if not m.is_active(now)]
            if gone:
                raise PeerProtocolError(f"pairing: expected enrolled sites, got {gone}", blame=0)
