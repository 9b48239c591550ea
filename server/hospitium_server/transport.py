"""How the coordinator reaches the sites: messages out, answers back as they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Transport(Protocol):
    """Carries sealed bytes between the coordinator and sites, by roster index."""

    def exchange(
        self, requests: Mapping[int, bytes], deadline_s: float
    ) -> Iterator[tuple[int, bytes]]:
        """Send every request and yield (site, answer) as answers arrive, until the deadline.

        A site that does not answer in time simply does not appear. Answers are handed over one
        at a time, so that whoever adds them up needs to hold only one.
        """
        ...
