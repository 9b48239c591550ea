"""Sessions in this very process, reached through bytes as on a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hospitium_client.session import Session


class InMemoryTransport:
    """A transport whose sites answer one after another; only one answer exists at a time."""

    def __init__(self, sessions: Mapping[int, Session]) -> None:
        self._sessions = sessions

    def exchange(
        self, requests: Mapping[int, bytes], deadline_s: float
    ) -> Iterator[tuple[int, bytes]]:
        """Let every site answer; nobody is late in one process, whatever the deadline."""
        for site, request in requests.items():
            yield site, self._sessions[site].handle(request)
