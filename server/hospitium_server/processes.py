"""The coordinator's child processes: started with secrets on standard input, ended without loss."""

from __future__ import annotations

import os
import secrets
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hospitium_common.durable import OWNER_ONLY
from hospitium_common.errors import ConfigError, HospitiumError
from hospitium_server.control import SuperLinkControl
from hospitium_server.superlink import SuperLinkOrder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

START_S = 60
STOP_S = 20
BACKLOG = 512


def flower_environment(home: Path) -> dict[str, str]:
    """Return an environment in which Flower calls nobody and installs nothing."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_INTERNAL_GRPC_CONTROL_API": "0",
        "FLWR_INTERNAL_GRPC_FLEET_API": "0",
    }


class Child:
    """A module run by this Python, which ends when its standard input does."""

    def __init__(
        self, arguments: Sequence[str], order: bytes, environment: dict[str, str],
        sockets: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and modules
            [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, env=environment,
            pass_fds=sockets, start_new_session=True,
        )  # fmt: skip
        if self._process.stdin is None:
            raise AssertionError("unreachable: a pipe was asked for")
        self._input = self._process.stdin
        self._input.write(order)
        self._input.flush()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Ask it to end at the next safe point."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self, patience_s: float = STOP_S) -> int:
        """End it: first ask, then, after some patience, kill."""
        self.ask_to_stop()
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._input.close()
        return code


@dataclass(frozen=True, kw_only=True)
class SuperLinkPlace:
    """Where a SuperLink keeps its files and listens; port 0 lets the system choose."""

    directory: Path
    host: str
    port: int
    local_port: int
    certificate: Path
    private_key: Path


def prepare_database(path: Path) -> None:
    """Make the SuperLink's database, or give the disk back what finished runs took in it.

    Objects are chunks of 5 MiB: with pages of 64 KiB instead of 4 they are written and read in a
    third of the time.

    Raises:
        HospitiumError: the disk is full, or the file is no database.
    """
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA page_size = 65536")
            database.execute("PRAGMA journal_mode = DELETE")
            database.execute("VACUUM")
            database.execute("PRAGMA journal_mode = WAL")
        path.chmod(OWNER_ONLY)
    except (OSError, sqlite3.Error) as error:
        raise HospitiumError(
            f"{path}: expected the SuperLink's database or room for one, got: {error}; it holds "
            "no model and no result: move it away to start with a new one"
        ) from error


class SuperLinkProcess:
    """A SuperLink that can be started again on the same sockets, with the same secrets."""

    def __init__(self, place: SuperLinkPlace) -> None:
        self._place = place
        database = place.directory / "superlink.sqlite"
        place.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._public = _listen(place.host, place.port)
        prepare_database(database)
        self._loopback = _listen("127.0.0.1", place.local_port)
        token, secret = secrets.token_urlsafe(32), secrets.token_bytes(32)
        self.control = SuperLinkControl(self.loopback_address, token, secret)
        self._order = SuperLinkOrder(
            database=str(database),
            certificate=str(place.certificate),
            private_key=str(place.private_key),
            public_socket=self._public.fileno(),
            loopback_socket=self._loopback.fileno(),
            control_token=token,
            executor_secret=secret.hex(),
        )
        self._child: Child | None = None

    @property
    def public_port(self) -> int:
        """The port that sites dial."""
        return int(self._public.getsockname()[1])

    @property
    def loopback_address(self) -> str:
        """Host and port of control and runtime."""
        return f"127.0.0.1:{self._loopback.getsockname()[1]}"

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start it; connections are accepted as soon as it is up."""
        self._child = Child(
            ["hospitium_server.superlink"], self._order.encode(),
            flower_environment(self._place.directory / "flower"),
            sockets=[self._public.fileno(), self._loopback.fileno()],
        )  # fmt: skip

    def wait_until_up(self, stop: threading.Event | None = None) -> None:
        """Wait until it answers, or until ``stop`` is set.

        Raises:
            HospitiumError: it ended, or it does not answer.
        """
        stop = threading.Event() if stop is None else stop
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.exit_code() is not None:
                raise HospitiumError(
                    f"SuperLink: expected it to start, it ended with code {self.exit_code()}; "
                    "what it wrote above says why"
                )
            if self.control.is_up() or stop.wait(0.1):
                return
        raise HospitiumError(f"SuperLink: expected an answer within {START_S} s, got none")

    def exit_code(self) -> int | None:
        """Return how it ended, or None while it runs."""
        return None if self._child is None else self._child.poll()

    def stop(self) -> None:
        """End it and give the ports back."""
        if self._child is not None:
            self._child.stop()
        self.control.close()
        self._public.close()
        self._loopback.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: expected to listen there, got: {error.strerror}; is another "
            "coordinator running?"
        ) from error
