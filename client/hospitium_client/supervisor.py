"""One command for a hospital: trainer and node as two processes, started again when they die."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

SUPERVISED = "HOSPITIUM_SUPERVISED"
"""Set for children: their standard input ends when the supervisor does, and so do they."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 60.0
HEALTHY_S = 60.0
"""Who ran for this long did not die of what it died of before."""
GRACE_S = 15.0
LOOK_S = 0.1


@dataclass(kw_only=True)
class Part:
    """One process that has to run; ``arguments`` are what `hospitium` is called with."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    started_at: float = field(default=float("-inf"))
    next_start: float = field(default=float("-inf"))

    def start(self, now: float) -> None:
        """Start the process."""
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
            [sys.executable, "-m", "hospitium_common", *self.arguments],
            stdin=subprocess.PIPE, env={**self.environment, SUPERVISED: "1"},
        )  # fmt: skip
        self.started_at = now
        log.info("%s started (process %d)", self.name, self.process.pid)

    def look(self, now: float) -> None:
        """Start the process if it does not run and has waited long enough."""
        if self.process is None:
            if now >= self.next_start:
                self.start(now)
            return
        code = self.process.poll()
        if code is None:
            return
        self._forget()
        self.deaths = 1 if now - self.started_at > HEALTHY_S else self.deaths + 1
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self.deaths - 1, 16), LAST_PAUSE_S)
        self.next_start = now + pause_s
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        log.error("%s %s; it is started again in %.1f s", self.name, how, pause_s)

    def ask_to_stop(self) -> None:
        """Ask the process to end."""
        if self.process is not None:
            self.process.terminate()

    def stop(self, grace_s: float) -> None:
        """Wait for the process to end, and end it if it does not."""
        if self.process is None:
            return
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %g s and is killed", self.name, grace_s)
            self.process.kill()
            self.process.wait()
        self._forget()

    def _forget(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None


def supervise(
    parts: Sequence[Part],
    stop: threading.Event,
    *,
    grace_s: float = GRACE_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Keep every part running until ``stop``; then end them all."""
    try:
        while not stop.is_set():
            for part in parts:
                part.look(clock())
            stop.wait(LOOK_S)
    finally:
        for part in parts:
            part.ask_to_stop()
        for part in parts:
            part.stop(grace_s)


def end_with_the_supervisor(stop: Callable[[], None]) -> None:
    """Call ``stop`` when the supervisor that started this process is gone, however it went."""
    if os.environ.get(SUPERVISED) != "1":
        return
    # Not through sys.stdin: its lock would be held by this thread when the interpreter ends.
    number = sys.stdin.fileno()

    def wait() -> None:
        while os.read(number, 1):
            pass
        stop()

    threading.Thread(target=wait, name="supervisor", daemon=True).start()
