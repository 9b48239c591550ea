"""Only one server per coordinator: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hospitium_common.durable import OWNER_ONLY
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hospitium_server.settings import CoordinatorHome


@contextmanager
def only_server(home: CoordinatorHome) -> Iterator[None]:
    """Hold the coordinator's lock for as long as the block runs.

    Raises:
        ConfigError: another server holds it.
    """
    descriptor = _open(home)
    try:
        if not _take(descriptor):
            raise ConfigError(
                f"{home.path}: expected no server to run for this coordinator, one does; stop that "
                "one first"
            )
        yield
    finally:
        os.close(descriptor)


def is_served(home: CoordinatorHome) -> bool:
    """Whether a server runs for this coordinator."""
    descriptor = _open(home)
    try:
        return not _take(descriptor)
    finally:
        os.close(descriptor)


def _open(home: CoordinatorHome) -> int:
    return os.open(home.path / ".serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
