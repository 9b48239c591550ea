"""Which sites stand ready for a study: all that are connected are offered it, some asked again."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from hospitium_common.errors import HospitiumError, PeerProtocolError
from hospitium_common.messages import Standing, StudyOffer, StudyState, decode
from hospitium_server.bulletin import READY
from hospitium_server.secure_sum import Presence
from hospitium_server.studies import NOT_CONNECTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from hospitium_common.federation import FederationRoster
    from hospitium_common.study import Study
    from hospitium_server.bulletin import Bulletin
    from hospitium_server.grid_transport import Exchange, GridTransport
    from hospitium_server.studies import StudyFolder

log = logging.getLogger(__name__)

OFFER_S = 60.0
"""How long an offer is good for; a site that is busy answers when it can."""
FIRST_ASK_S, LAST_ASK_S, ASK_GROWTH = 0.5, 30.0, 1.3
"""Pauses between two offers to a site that does not stand ready: each so much longer."""
LOOK_S = 0.1
REPORT_S = 600.0
STATES = {
    StudyState.APPROVED: READY,
    StudyState.WAITING: "waiting for somebody there to approve the study",
    StudyState.REFUSED: "the study breaks its rules",
    StudyState.ROSTER_WAITING: "waiting for somebody there to accept the roster",
    StudyState.DATA_MISSING: "its data cannot be read",
}


class Attendance:
    """Asked by ``SecureSum`` before every round who stands ready.

    A site that stood ready is not asked again until something speaks against it (``doubt``): it
    was silent, it refused, or there is a newer roster. Offers to the others are under way all the
    time; they hold a round up only while there are too few.
    """

    def __init__(
        self,
        *,
        study: Study,
        folder: StudyFolder,
        roster: Callable[[], FederationRoster],
        patience_s: float,
        check: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._study, self._folder, self._roster = study, folder, roster
        self._patience_s, self._check, self._clock, self._sleep = patience_s, check, clock, sleep
        self._ready: dict[int, int] = {}
        """Site -> version of the roster under which it stood ready."""
        self._states: dict[int, StudyState] = {}
        self._offers: list[tuple[float, int, Exchange]] = []
        self._asked: dict[int, tuple[float, float]] = {}
        """Site -> when it was asked last, and the pause until it is asked again."""

    def doubt(self, site: int) -> None:
        """Ask this site again before it is invited again."""
        self._ready.pop(site, None)
        self._asked.pop(site, None)

    def present(self, transport: GridTransport, bulletin: Bulletin) -> Presence:
        """Return the newest roster and who stands ready under it; wait while there are too few.

        Raises:
            HospitiumError: there were too few for too long.
        """
        began, said = self._clock(), self._clock()
        version = 0
        while True:
            self._check()
            roster = self._roster()
            if roster.version != version:
                version = roster.version
                bulletin.name_sites(roster)
            online = transport.online()
            bulletin.place(bulletin.status.sites.keys() - online.keys(), NOT_CONNECTED)
            self._collect(bulletin, version)
            self._offer(transport, roster, online)
            ready = [site for site in online if self._ready.get(site) == version]
            if len(ready) >= self._study.cohort.minimum_sites:
                bulletin.place(ready, READY)
                return Presence(federation=roster, sites=tuple(sorted(ready)))
            reason = self._too_few(len(ready))
            bulletin.wait_for_sites(reason)
            now = self._clock()
            if now - began > self._patience_s:
                raise HospitiumError(
                    f"{reason}; waited {self._patience_s / 3600:.3g} hours. What was finished is "
                    "kept: `hospitium study resume` goes on when they are there"
                )
            if now - said > REPORT_S:
                log.info("still waiting: %s", reason)
                said = now
            bulletin.tick()
            self._sleep(LOOK_S)

    def _too_few(self, ready: int) -> str:
        least = self._study.cohort.minimum_sites
        return f"expected at least {least} sites to stand ready, got {ready}"

    def _collect(self, bulletin: Bulletin, version: int) -> None:
        """Take in what sites said to the offers that are out."""
        left = []
        for until, offered, offer in self._offers:
            for site, answer in offer.arrived():
                self._take(site, answer, offered, bulletin)
            if offer.sites and self._clock() < until and offered == version:
                left.append((until, offered, offer))
            elif offer.sites:
                offer.give_up("does not answer")
        self._offers = left

    def _take(self, site: int, answer: bytes, offered: int, bulletin: Bulletin) -> None:
        try:
            standing = decode(answer)
        except PeerProtocolError:
            bulletin.place([site], "its answer could not be read")
            return
        if not isinstance(standing, Standing):
            return  # a refusal; the bulletin has said why
        if standing.state is not self._states.get(site):
            log.info("site %d: %s", site, STATES[standing.state])
            self._states[site] = standing.state
        if standing.state is StudyState.APPROVED and standing.roster_version != offered:
            bulletin.place([site], f"goes by version {standing.roster_version} of the roster")
            return
        bulletin.place([site], STATES[standing.state])
        if standing.state is StudyState.APPROVED:
            self._ready[site] = offered
            self._asked.pop(site, None)

    def _offer(
        self, transport: GridTransport, roster: FederationRoster, online: dict[int, int]
    ) -> None:
        now = self._clock()
        busy = {site for _, _, offer in self._offers for site in offer.sites}
        wanted = []
        for site in online.keys() - busy:
            if self._ready.get(site) == roster.version:
                continue
            last, pause = self._asked.get(site, (-1e9, FIRST_ASK_S))
            if now - last >= pause:
                wanted.append(site)
                self._asked[site] = (now, min(ASK_GROWTH * pause, LAST_ASK_S))
        if wanted:
            document, signature = self._folder.offer()
            offer = StudyOffer(
                document=document, signature=signature, roster=roster.encode()
            ).encode()
            sent = transport.send(dict.fromkeys(wanted, offer), OFFER_S)
            self._offers.append((now + OFFER_S, roster.version, sent))
