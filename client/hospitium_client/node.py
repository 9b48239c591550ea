"""The node: the site's process with the network. It sees sealed bytes, and no data.

It asks the coordinator for messages, gives each to the installed ClientApp, and sends the answer
back. It never fetches a FAB: no code that anybody sends is ever run here.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from hospitium_client.app import SOCKET_KEY, app
from hospitium_client.fleet import HEARTBEAT_S, Delivery, Fleet, NotEnrolled, RunOver, Unreachable
from hospitium_client.trainer_service import TrainerUnavailable
from hospitium_common.durable import write_durably
from hospitium_common.errors import HospitiumError
from hospitium_common.exclusive import exclusive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_AT_ONCE = 4
"""One exchange that trains, and room for study offers beside it."""
HELD_S = 0.5
"""A question that took longer was held by the coordinator until there is something to say."""
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 15.0
NODE_ID, UNDER_WAY, ONLINE = "node.id", "under-way", "online"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often to ask: quickly while a study runs, seldom when nothing happens.

    The pause grows with the silence, so that waiting costs at most ``share`` of the time that the
    site waited anyway.
    """

    busy_s: float = 0.1
    idle_s: float = 3.0
    share: float = 0.02

    def pause_s(self, silence_s: float) -> float:
        """Return how long to wait before the next question."""
        return min(max(silence_s * self.share, self.busy_s), self.idle_s)


def backoff_s(failures: int) -> float:
    """Return the pause after so many failures in a row: doubled each time, up to a limit."""
    return min(FIRST_RETRY_S * 2.0 ** min(failures - 1, 16), LAST_RETRY_S)


class Node:
    """One site's node. ``home`` keeps what a restart needs: its number, and what is under way.

    ``stop`` ends it soon after it is set.
    """

    def __init__(
        self,
        fleet: Fleet,
        socket: Path,
        home: Path,
        pace: Pace | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._fleet, self._home, self._pace = fleet, home, pace or Pace()
        self._config = {SOCKET_KEY: str(socket)}
        self._stop = stop or threading.Event()
        self._under_way: set[str] = set()
        self._last_message = self._last_heartbeat = float("-inf")

    def run(self) -> None:
        """Ask and answer until told to stop; nothing that a network does ends this.

        Raises:
            ConfigError: another node of this site is running.
            HospitiumError: the disk is full.
        """
        with exclusive(self._home / "node.lock", "node of this site"):
            failures: list[Exception] = []

            def ask() -> None:
                try:
                    self._ask()
                except Exception as error:
                    if not self._stop.is_set():  # else the line was closed under it
                        failures.append(error)
                        self._stop.set()

            # The coordinator may hold a question for seconds: stopping must not wait for that.
            threading.Thread(target=ask, name="questions", daemon=True).start()
            self._stop.wait()
            self._fleet.close()
            if failures:
                raise failures[0]

    def _ask(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                pause_s = self._step()
                failures = 0
            except (Unreachable, NotEnrolled) as error:
                failures += 1
                self._fleet.is_online = self._fleet.is_online and isinstance(error, Unreachable)
                pause_s = backoff_s(failures)
                log.log(
                    logging.WARNING if failures in (1, 5) else logging.DEBUG,
                    "%s; trying again (attempt %d)", error, failures + 1,
                )  # fmt: skip
            self._stop.wait(pause_s)

    def _step(self) -> float:
        """Ask once for a message; return how long to wait before the next question."""
        if not self._fleet.is_online:
            self._go_online()
        began = time.monotonic()
        if began - self._last_heartbeat > HEARTBEAT_S / 2:
            self._fleet.heartbeat()
            self._noted_online(began)
        if len(self._under_way) == MOST_AT_ONCE:
            return self._pace.idle_s
        delivery = self._fleet.receive(int(time.time() * 1000))
        now = time.monotonic()
        if delivery is None:
            was_held = now - began > HELD_S
            return self._pace.busy_s if was_held else self._pace.pause_s(now - self._last_message)
        self._last_message = now
        # The coordinator hands a message out again if it thinks that it was lost on the way.
        if delivery.id not in self._under_way:
            write_durably(self._kept(delivery), delivery.encode())
            if not self._stop.is_set():  # else the next start takes it up
                self._begin(delivery)
        return self._pace.busy_s

    def _go_online(self) -> None:
        self._fleet.go_online()
        write_durably(self._home / NODE_ID, str(self._fleet.node_id).encode())
        log.info("online at the coordinator as node %s", self._fleet.node_id)
        self._last_message = time.monotonic()
        self._noted_online(self._last_message)
        for file in sorted((self._home / UNDER_WAY).glob("*.delivery")):
            if file.stem not in self._under_way and len(self._under_way) < MOST_AT_ONCE:
                try:
                    delivery = Delivery.decode(file.read_bytes())
                except (HospitiumError, ValueError):
                    log.warning("%s: expected a message under way, got another; removed", file)
                    file.unlink()
                    continue
                log.info("message %.8s was under way when this node stopped", delivery.id)
                self._begin(delivery)

    def _noted_online(self, now: float) -> None:
        self._last_heartbeat = now
        (self._home / ONLINE).touch(mode=0o600)  # its time tells `hospitium site health`

    def _begin(self, delivery: Delivery) -> None:
        self._under_way.add(delivery.id)
        threading.Thread(
            target=self._answer, args=(delivery,), name=delivery.id, daemon=True
        ).start()

    def _answer(self, delivery: Delivery) -> None:
        try:
            message = self._patiently(delivery, lambda: self._fleet.fetch(delivery))
            began = time.monotonic()
            reply = self._reply(message)
            took_s = time.monotonic() - began
            _fix_time(reply, delivery)
            self._patiently(delivery, lambda: self._fleet.answer(delivery, reply, took_s))
            log.info("message %.8s answered after %.2f s", delivery.id, took_s)
        except RunOver as error:
            log.info("message %.8s needs no answer: %s", delivery.id, error)
        except _Stopped:
            return
        except Exception as error:
            if self._stop.is_set():  # the line was closed under it
                return
            log.error("message %.8s left alone: %s", delivery.id, type(error).__name__)
            log.debug("details", exc_info=True)
        finally:
            self._under_way.discard(delivery.id)
        self._kept(delivery).unlink(missing_ok=True)

    def _reply(self, message: Message) -> Message:
        context = Context(
            run_id=message.metadata.run_id,
            node_id=message.metadata.dst_node_id,
            node_config=dict(self._config),
            state=RecordDict(),
            run_config={},
        )
        try:
            return app(message, context)
        except Exception as error:
            log.error("no answer: %s", error if isinstance(error, HospitiumError) else type(error))
            word = "trainer unavailable" if isinstance(error, TrainerUnavailable) else "fault"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code=code, reason=word), reply_to=message)

    def _patiently(self, delivery: Delivery, call: Callable[[], T]) -> T:
        """Try until it works, the message is too old, or this node stops."""
        metadata, failures = delivery.message.metadata, 0
        while True:
            try:
                return call()
            except (Unreachable, NotEnrolled) as error:
                failures += 1
                log.info("message %.8s: %s", delivery.id, error)
                if time.time() > metadata.created_at + metadata.ttl:
                    raise RunOver("its time is over") from error
            if self._stop.wait(backoff_s(failures)):
                raise _Stopped

    def _kept(self, delivery: Delivery) -> Path:
        folder = self._home / UNDER_WAY
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder / f"{delivery.id}.delivery"


class _Stopped(Exception):  # noqa: N818 - it is no error
    """The node stops; what is under way is taken up by its next start."""


def known_node_id(home: Path) -> int | None:
    """Return the number that the coordinator gave this node at its last start."""
    try:
        return int((home / NODE_ID).read_text())
    except (OSError, ValueError):
        return None


def _fix_time(reply: Message, delivery: Delivery) -> None:
    """Make a reply that is sent twice, the second time after a restart, the same reply."""
    asked = delivery.message.metadata
    made_at = max(delivery.received_at_ms / 1000, asked.created_at)
    reply.metadata.created_at = made_at
    reply.metadata.ttl = asked.created_at + asked.ttl - made_at
