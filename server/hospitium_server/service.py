"""`hospitium coordinator serve`: the SuperLink, one process per study, and nothing lost.

The service holds the listening sockets and the secrets, and starts again what ends by itself. It
acts on what is on disk: the roster, and what people ordered for each study.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hospitium_common.errors import HospitiumError
from hospitium_server.founding import certificate_warnings
from hospitium_server.jobs import Jobs
from hospitium_server.nodes import NodeKeeper
from hospitium_server.processes import SuperLinkPlace, SuperLinkProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from hospitium_server.settings import CoordinatorHome

log = logging.getLogger(__name__)

STEP_S = 0.25
NODES_EVERY_S = 2.0
DAY_S = 24 * 3600.0
COMPLAIN_EVERY_S = 60.0
LOW_DISK_BYTES = 2 << 30
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0


class Service:
    """Everything that `hospitium coordinator serve` looks after."""

    def __init__(
        self, home: CoordinatorHome, patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._home, self._clock = home, clock
        settings = home.settings()
        place = SuperLinkPlace(
            directory=home.resolve(settings.storage.superlink),
            host=settings.network.listen,
            port=settings.network.port,
            local_port=settings.network.local_port,
            certificate=home.resolve(settings.tls.certificate),
            private_key=home.resolve(settings.tls.key),
        )
        self._superlink = SuperLinkProcess(place)
        self._nodes = NodeKeeper(home, place.directory)
        self._jobs = Jobs(home, self._superlink, patience_s)
        self._stop = threading.Event()
        self._looked_at_nodes = self._warned = float("-inf")
        self._crashes, self._start_again_at = 0, 0.0
        self._trouble, self._complained = "", float("-inf")

    def run(self, on_ready: Callable[[int], None]) -> None:
        """Serve until SIGTERM or SIGINT; ``on_ready`` gets the public port.

        Raises:
            HospitiumError: the SuperLink does not start.
        """
        with _signals_set(self._stop):
            try:
                self._superlink.start()
                self._superlink.wait_until_up(self._stop)
                if not self._stop.is_set():
                    self._jobs.begin()
                    self._step()
                    on_ready(self._superlink.public_port)
                while not self._stop.wait(STEP_S):
                    self._step()
            finally:
                log.info("stopping; studies end at their next safe point")
                self._jobs.end()
                self._superlink.stop()
                log.info("stopped; studies that were running go on at the next start")

    def _step(self) -> None:
        now = self._clock()
        if now - self._warned > DAY_S:
            self._warned = now
            self._warn()
        if self._superlink.exit_code() is not None:
            self._start_again(now)
            return
        try:
            if now - self._looked_at_nodes > NODES_EVERY_S:
                self._looked_at_nodes = now
                self._nodes.look(self._superlink.control)
                self._crashes = 0
            self._jobs.look()
        except (HospitiumError, OSError) as error:
            # A full disk or one process that does not start is no reason to end all the others.
            self._complain(str(error), now)

    def _complain(self, trouble: str, now: float) -> None:
        """Log what is wrong; the same trouble once a minute."""
        if trouble != self._trouble or now - self._complained > COMPLAIN_EVERY_S:
            self._trouble, self._complained = trouble, now
            log.warning("%s", trouble)

    def _start_again(self, now: float) -> None:
        """Start a SuperLink that ended, after a pause that grows; connections wait meanwhile."""
        if self._start_again_at == 0.0:
            pause = min(FIRST_PAUSE_S * 2.0**self._crashes, LAST_PAUSE_S)
            self._start_again_at = now + pause
            self._crashes += 1
            log.error(
                "the SuperLink ended with code %s; it is started again in %.1f s",
                self._superlink.exit_code(), pause,
            )  # fmt: skip
        elif now >= self._start_again_at:
            self._start_again_at = 0.0
            self._superlink.start()

    def _warn(self) -> None:
        for warning in certificate_warnings(self._home, datetime.now(UTC)):
            log.warning("%s", warning)
        free = shutil.disk_usage(self._home.path).free
        if free < LOW_DISK_BYTES:
            log.warning(
                "%s: %d MB are left on this disk; every round keeps a version of the model",
                self._home.path, free >> 20,
            )  # fmt: skip


@contextmanager
def _signals_set(event: threading.Event) -> Iterator[None]:
    """Let SIGTERM and SIGINT set an event while the block runs."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        event.set()

    before = {name: signal.signal(name, on_signal) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
