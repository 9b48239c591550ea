"""One process per study that is ordered to run: started, started again, stopped at a safe point."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hospitium_common.errors import ConfigError
from hospitium_server.app import ENDED_ITSELF, StudyOrder
from hospitium_server.control import SuperLinkUnavailable
from hospitium_server.processes import Child, flower_environment
from hospitium_server.studies import State, every

if TYPE_CHECKING:
    from collections.abc import Callable

    from hospitium_server.processes import SuperLinkProcess
    from hospitium_server.settings import CoordinatorHome
    from hospitium_server.studies import StudyFolder

log = logging.getLogger(__name__)

STOP_S = 120.0
"""For how long a study may go on to its next safe point when the service ends."""
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)
MOST_RESTARTS = 8
SETTLED_S = 300.0
"""A process that ran this long is taken to have started well."""


@dataclass(kw_only=True)
class Job:
    """A study and its process, while the service cares for it."""

    folder: StudyFolder
    child: Child | None = None
    run_id: int = 0
    order: int = 0
    started: float = 0.0
    next_start: float = 0.0
    restarts: int = 0
    stopping: bool = False


class Jobs:
    """The processes of all studies of a coordinator. ``patience_s`` bounds waiting for sites."""

    def __init__(
        self, home: CoordinatorHome, superlink: SuperLinkProcess, patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        storage = home.settings().storage
        self._home, self._superlink, self._patience_s = home, superlink, patience_s
        self._studies = home.resolve(storage.studies)
        self._flower_home = home.resolve(storage.superlink) / "flower"
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._complaints: set[str] = set()

    def begin(self) -> None:
        """End runs that an earlier life of the service left; their studies get new ones.

        Raises:
            SuperLinkUnavailable: it does not answer.
        """
        for run_id in self._superlink.control.unfinished_runs():
            self._superlink.control.stop_run(run_id)

    def look(self) -> None:
        """Do what people ordered since the last look, and start again what ended by itself.

        Raises:
            SuperLinkUnavailable: it does not answer.
        """
        for folder in every(self._studies):
            job = self._jobs.setdefault(folder.id, Job(folder=folder))
            try:
                self._look_at(job)
            except ConfigError as error:
                if str(error) not in self._complaints:
                    self._complaints.add(str(error))
                    log.error("%s", error)

    def end(self) -> None:
        """End every process at its next safe point; the studies go on at the next start."""
        children = [job.child for job in self._jobs.values() if job.child is not None]
        for child in children:
            child.ask_to_stop()
        for child in children:
            child.stop(STOP_S)

    def _look_at(self, job: Job) -> None:
        folder, order = job.folder, job.folder.order()
        if job.child is not None:
            code = job.child.poll()
            if code is not None:
                self._ended(job, job.child, code)
            elif not order.run and not job.stopping:
                log.info("study %s: asked to stop", folder.id)
                job.stopping = True
                job.child.ask_to_stop()
            return
        if order.number != job.order:
            job.order, job.restarts, job.next_start = order.number, 0, 0.0
        if folder.is_wanted and self._clock() >= job.next_start:
            self._start(job)
        elif not order.run and folder.status().order < order.number:
            folder.end(State.STOPPED, "")

    def _start(self, job: Job) -> None:
        control = self._superlink.control
        job.run_id = control.start_run(job.folder.id)
        while (task := control.claim_task()) is not None and task.run_id != job.run_id:
            control.stop_run(task.run_id)
        if task is None:
            raise SuperLinkUnavailable(f"study {job.folder.id}: expected its run to be claimable")
        order = StudyOrder(
            home=str(self._home.path.absolute()), study=job.folder.id,
            address=self._superlink.loopback_address, token=task.token,
            patience_s=self._patience_s,
        )  # fmt: skip
        environment = flower_environment(self._flower_home)
        job.child = Child(["hospitium_server.app"], order.encode(), environment)
        job.started, job.stopping = self._clock(), False
        log.info("study %s: started as process %d", job.folder.id, job.child.pid)

    def _ended(self, job: Job, child: Child, code: int) -> None:
        """Note how a study's process ended, and start it again if it did not mean to."""
        child.stop()
        job.child, folder = None, job.folder
        self._forget_run(job.run_id)
        if not folder.order().run:
            folder.end(State.STOPPED, "")
            log.info("study %s: stopped", folder.id)
            return
        if code == ENDED_ITSELF:
            status = folder.status()
            log.info("study %s: %s. %s", folder.id, status.state, status.reason)
            return
        now = self._clock()
        job.restarts = 1 if now - job.started > SETTLED_S else job.restarts + 1
        if job.restarts > MOST_RESTARTS:
            reason = f"its process ended {job.restarts} times, the last time with code {code}"
            folder.end(State.FAILED, f"{reason}; the coordinator's log says why")
            log.error("study %s: failed: %s", folder.id, reason)
            return
        job.next_start = now + BACKOFF_S[min(job.restarts - 1, len(BACKOFF_S) - 1)]
        log.warning(
            "study %s: its process ended with code %d; it goes on from its last round in %.0f s",
            folder.id, code, job.next_start - now,
        )  # fmt: skip

    def _forget_run(self, run_id: int) -> None:
        """Have the SuperLink forget a run's messages."""
        try:
            if run_id in self._superlink.control.unfinished_runs():
                self._superlink.control.stop_run(run_id)
        except SuperLinkUnavailable as error:
            log.info("%s", error)
