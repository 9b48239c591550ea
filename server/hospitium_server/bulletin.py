"""Where every site is, for people to watch: kept in a study's status file."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from hospitium_common.codec import Reader
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import (
    ConfirmRequest,
    MaskRequest,
    PairOffers,
    PairRequest,
    Purpose,
    Refusal,
    StudyOffer,
    Task,
    UnmaskRequest,
    decode,
)
from hospitium_common.messages.wire import VERSION
from hospitium_server.exchanges import REFUSALS
from hospitium_server.studies import NOT_CONNECTED, RoundStatus, SiteStatus, State

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from hospitium_common.federation import FederationRoster
    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord
    from hospitium_server.studies import Status, StudyFolder

MOST_ROUNDS = 200
WRITE_EVERY_S = 0.5
"""Where sites are changes a dozen times in a quick round; the file need not follow each change."""
READY = "ready"
WORK = {
    Purpose.STATISTICS: "counting",
    Purpose.TRAIN: "training",
    Purpose.EVALUATE: "evaluating",
}
WHAT = {
    PairRequest.KIND: "pairing",
    PairOffers.KIND: "pairing",
    MaskRequest.KIND: "masking",
    ConfirmRequest.KIND: "confirming the round",
    UnmaskRequest.KIND: "releasing shares",
}


class Bulletin:
    """Keeps a study's status file; a Watcher of rounds and a Listener of the transport.

    ``doubt`` is called with a site that has to be asked again whether it takes part.
    """

    def __init__(
        self,
        folder: StudyFolder,
        roster: FederationRoster,
        doubt: Callable[[int], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._doubt, self._clock = folder, doubt, clock
        before = folder.status()
        self._status = replace(
            before, state=State.WAITING, order=folder.order().number, reason="", what="",
            since=clock(), sites={},
        )  # fmt: skip
        self._written_at, self._is_behind = 0.0, False
        self._last = {
            site: one.last_round for site, one in before.sites.items() if one.last_round is not None
        }
        self.name_sites(roster)

    @property
    def status(self) -> Status:
        """How the study stands."""
        return self._status

    def tick(self) -> None:
        """Bring the file up to date, if it was left behind for a moment."""
        if self._is_behind and self._clock() - self._written_at >= WRITE_EVERY_S:
            self._write(self._status)

    def name_sites(self, roster: FederationRoster) -> None:
        """Show everybody who is enrolled now."""
        now, known = self._clock(), self._status.sites
        sites = {
            member.index: known.get(
                member.index,
                SiteStatus(
                    name=member.name, what=NOT_CONNECTED, since=now,
                    last_round=self._last.get(member.index),
                ),
            )
            for member in roster.members
            if member.is_active(now)
        }  # fmt: skip
        self._write(replace(self._status, sites=sites))

    def wait_for_sites(self, reason: str) -> None:
        """Say that the study waits, and for what."""
        if (self._status.state, self._status.reason) != (State.WAITING, reason):
            self._write(
                replace(
                    self._status, state=State.WAITING, reason=reason, what="waiting for sites",
                    since=self._clock(),
                )
            )  # fmt: skip

    def place(self, sites: Collection[int], what: str) -> None:
        """Say where sites are; the time counts from when that began."""
        now, known = self._clock(), self._status.sites
        changed = {
            site: replace(known[site], what=what, since=now)
            for site in sites
            if site in known and known[site].what != what
        }
        if changed:
            self._status, self._is_behind = replace(self._status, sites=known | changed), True
            self.tick()

    def on_sent(self, sites: Collection[int], request: bytes) -> None:
        """A request is on its way: these sites are busy with it."""
        kind, what = request[1], WHAT.get(request[1])
        if kind == StudyOffer.KIND:
            return
        if kind == Task.KIND:
            purpose = _purpose_of(request)
            what = WORK[purpose]
            if self._status.state is not State.RUNNING or self._status.what != what:
                self._status = replace(
                    self._status, state=State.RUNNING, reason="", what=what, since=self._clock(),
                    round=self._next_round(purpose),
                )  # fmt: skip
        self.place(sites, what or READY)

    def on_answer(self, site: int, answer: bytes) -> None:
        """A site answered."""
        if answer[:2] == bytes((VERSION, Refusal.KIND)):
            try:
                refusal = decode(answer)
            except PeerProtocolError:
                return
            if isinstance(refusal, Refusal):
                self._doubt(site)
                self.place([site], REFUSALS[refusal.reason])
            return
        what = self._status.sites[site].what if site in self._status.sites else READY
        if what in WORK.values() or what in WHAT.values():
            self.place([site], READY)

    def on_silence(self, site: int, reason: str) -> None:
        """A site did not answer, and why."""
        self._doubt(site)
        self.place([site], reason)

    def on_round(self, record: RoundRecord, received: Figures) -> None:
        """A training round is finished."""
        made = RoundStatus(
            round=record.round, sites=record.survivors, missing=record.missing,
            auroc=_number(received.auroc), loss=_number(received.loss), seconds=record.seconds,
            rejected=record.rejected,
        )  # fmt: skip
        sites = {
            site: replace(one, last_round=record.round) if site in record.survivors else one
            for site, one in self._status.sites.items()
        }
        rounds = (*self._kept(record.round), made)[-MOST_ROUNDS:]
        # An empty ``what`` lets the next task count as another round.
        self._write(replace(self._status, round=record.round, rounds=rounds, sites=sites, what=""))

    def end(self, state: State, reason: str = "") -> None:
        """Say how the study ended."""
        status = replace(self._status, state=state, reason=reason, what="", since=self._clock())
        self._write(status)

    def _next_round(self, purpose: Purpose) -> int:
        return self._status.round + 1 if purpose is Purpose.TRAIN else self._status.round

    def _kept(self, number: int) -> Iterable[RoundStatus]:
        return (one for one in self._status.rounds if one.round < number)

    def _write(self, status: Status) -> None:
        self._status, self._is_behind = status, False
        self._written_at = self._clock()
        self._folder.write_status(status)


def _purpose_of(request: bytes) -> Purpose:
    """Return a task's purpose without copying the model that comes with it."""
    reader = Reader(memoryview(request)[2:])
    reader.part(32)
    return Purpose(reader.integer())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
