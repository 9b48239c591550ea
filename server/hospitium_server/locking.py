"""Only one server per coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hospitium_common.exclusive import exclusive, is_held

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from hospitium_server.settings import CoordinatorHome


def only_server(home: CoordinatorHome) -> AbstractContextManager[None]:
    """Hold the coordinator's lock for as long as the block runs.

    Raises:
        ConfigError: another server holds it.
    """
    return exclusive(_lock(home), "server of this coordinator")


def is_served(home: CoordinatorHome) -> bool:
    """Whether a server runs for this coordinator."""
    return is_held(_lock(home))


def _lock(home: CoordinatorHome) -> Path:
    return home.path / ".serve.lock"
