"""The process of one study: what Flower calls a ServerApp, run by our own executor.

The coordinator's service starts it for a run that it claimed, and hands over the run's token on
standard input. Only installed code is run: the run's FAB carries configuration and is never
looked at. Every finished round is on disk (`registry.py`), so whatever ends this process, the next
one goes on from there.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hospitium_common.archive import RoundArchive
from hospitium_common.errors import ConfigError, HospitiumError, StudyHalted
from hospitium_common.first_model import load_first_model
from hospitium_common.metrics import TailLayout
from hospitium_common.study.signature import check_signature, sign_study
from hospitium_server.attendance import Attendance
from hospitium_server.bulletin import Bulletin
from hospitium_server.conclusion import conclude
from hospitium_server.enrolment import load_roster
from hospitium_server.grid_transport import GridTransport
from hospitium_server.keys import load_key
from hospitium_server.mailbox import Mailbox, RunEnded
from hospitium_server.registry import Registry
from hospitium_server.rounds import StudyRun
from hospitium_server.secure_sum import SecureSum
from hospitium_server.settings import CoordinatorHome
from hospitium_server.studies import State, StudyFolder
from hospitium_server.superlink import end_with_the_service

if TYPE_CHECKING:
    from types import FrameType

    from hospitium_common.federation import FederationRoster
    from hospitium_server.secure_sum import Presence, RoundPlan, RoundTotals

log = logging.getLogger(__name__)

ENDED_ITSELF = 3
"""Exit code: the study is over, or says why it cannot go on; starting it again changes nothing."""
MOST_FAILURES = 5
"""Rounds that may fail in a row before somebody has to look."""
PAUSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class StudyOrder:
    """What the service tells the process of a study."""

    home: str
    study: str
    address: str
    token: str
    patience_s: float

    def encode(self) -> bytes:
        """Return the order as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> StudyOrder:
        """Read what ``encode`` wrote."""
        return cls(**json.loads(line))


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Somebody asked this process to end, and it may now."""


class Interruption:
    """SIGTERM and SIGINT wait for a safe point: never between asking for shares and the sum.

    A round that is cut off there is lost, because the sites have spent it.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.is_safe = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def check(self) -> None:
        """End here, if somebody asked for it and this is a safe point.

        Raises:
            Interrupted: it ends.
        """
        if self._asked.is_set() and self.is_safe:
            raise Interrupted

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()


class StudyProcess:
    """One study, from its last checkpoint to its end."""

    def __init__(
        self, home: CoordinatorHome, folder: StudyFolder, mailbox: Mailbox,
        interruption: Interruption, patience_s: float,
    ) -> None:  # fmt: skip
        self._home, self._folder, self._interruption = home, folder, interruption
        self._study = folder.study()
        self._layout, self._first = load_first_model(folder.first_model, self._study)
        self._registry = Registry(folder.path, self._study.digest, self._layout.digest)
        self._rosters = _Rosters(home)
        self._attendance = Attendance(
            study=self._study, folder=folder, roster=self._rosters, patience_s=patience_s,
            check=interruption.check,
        )  # fmt: skip
        self.bulletin = Bulletin(folder, self._rosters(), self._attendance.doubt)
        key = load_key(home.coordinator_key)
        self._public = key.public_key().public_bytes_raw()
        if check_signature(self._study, folder.file) != self._public:
            sign_study(self._study, folder.file, key)  # the coordinator's key was rotated
        self._transport = GridTransport(
            mailbox=mailbox, study=self._study.digest, key=key, roster=self._rosters,
            listener=self.bulletin, check=self._check,
        )  # fmt: skip
        tail_layout = TailLayout.of(self._study, self._layout)
        self._secure_sum = SecureSum(
            study=self._study, key=key, present=self._present, transport=self._transport,
            tail_layout=tail_layout, next_epoch=self._registry.next_epoch,
            next_attempt=self._registry.next_attempt, begin_unmasking=self._begin_unmasking,
            archive=RoundArchive(
                folder.path / "rounds", keep_masked=home.settings().storage.masked_vectors
            ),
        )  # fmt: skip
        self._run = StudyRun(
            study=self._study, layout=self._layout, tail_layout=tail_layout,
            registry=self._registry, summing=self._sum, watcher=self.bulletin,
        )  # fmt: skip

    def run(self) -> None:
        """Run every round that is not finished, then write model and report.

        Raises:
            Interrupted: somebody asked to stop; all finished rounds are kept.
            HospitiumError: it cannot go on; all finished rounds are kept.
        """
        failures, finished = 0, self._finished()
        while True:
            try:
                result = self._run.run(self._first)
                break
            except (ConfigError, RunEnded, StudyHalted):
                raise
            except HospitiumError as error:
                failures = failures + 1 if self._finished() == finished else 1
                finished = self._finished()
                if failures == MOST_FAILURES:
                    raise
                log.warning("study %s: %s; trying again", self._folder.id, error)
                self.bulletin.wait_for_sites(str(error))
                self._pause()
        names = {member.index: member.title for member in self._rosters().members}
        conclude(self._folder, self._study, self._layout, self._registry, result, names)

    def close(self) -> None:
        """Close the registry."""
        self._registry.close()

    def _finished(self) -> int:
        latest = self._registry.latest()
        return -1 if latest is None else latest.number

    def _pause(self) -> None:
        until = time.monotonic() + PAUSE_S
        while time.monotonic() < until:
            self._interruption.check()
            time.sleep(0.1)

    def _present(self) -> Presence:
        there = self._attendance.present(self._transport, self.bulletin)
        if there.federation.coordinator != self._public:
            raise RunEnded("the coordinator's key was rotated: it goes on under the new one")
        return there

    def _sum(self, plan: RoundPlan) -> RoundTotals:
        self._interruption.check()
        try:
            return self._secure_sum(plan)
        finally:
            self._interruption.is_safe = True

    def _begin_unmasking(self, number: int) -> None:
        self._interruption.check()
        self._interruption.is_safe = False
        self._registry.begin_unmasking(number)

    def _check(self) -> None:
        self._interruption.check()
        self.bulletin.tick()


class _Rosters:
    """The newest roster, read again when its file changes."""

    def __init__(self, home: CoordinatorHome) -> None:
        self._home = home
        self._seen: tuple[int, int] = (0, 0)
        self._roster = load_roster(home)

    def __call__(self) -> FederationRoster:
        found = self._home.roster.stat()
        seen = (found.st_mtime_ns, found.st_ino)
        if seen != self._seen:
            self._roster, self._seen = load_roster(self._home), seen
        return self._roster


def main() -> None:
    """Run the study that the order on standard input names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    order = StudyOrder.decode(sys.stdin.buffer.readline())
    interruption = Interruption()
    end_with_the_service()
    home = CoordinatorHome(Path(order.home))
    folder = StudyFolder(home.resolve(home.settings().storage.studies) / order.study)
    mailbox = Mailbox(order.address, order.token)
    sys.exit(_run(order, home, folder, mailbox, interruption))


def _run(
    order: StudyOrder, home: CoordinatorHome, folder: StudyFolder, mailbox: Mailbox,
    interruption: Interruption,
) -> int:  # fmt: skip
    outcome, code = "failed", ENDED_ITSELF
    try:
        if mailbox.open() != order.study:
            raise HospitiumError("expected the run of this study, got another one's")
        process = StudyProcess(home, folder, mailbox, interruption, order.patience_s)
        log.info("study %s: begins or goes on", folder.id)
        try:
            process.run()
        finally:
            process.close()
        process.bulletin.end(State.FINISHED)
        log.info("study %s: finished; report: %s", folder.id, folder.report)
        outcome = "completed"
    except Interrupted:
        log.info("study %s: interrupted; finished rounds are kept", folder.id)
        outcome, code = "stopped", 0
    except RunEnded as error:
        log.warning("study %s: %s", folder.id, error)
        code = 1  # the service starts another run
    except HospitiumError as error:
        log.error("study %s: stopped: %s", folder.id, error)
        folder.end(State.FAILED, str(error))
    mailbox.close(outcome, "")
    return code


if __name__ == "__main__":
    main()
