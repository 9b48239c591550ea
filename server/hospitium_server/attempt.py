"""One attempt of a round: its groups side by side, each with its own secure sum."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hospitium_common.errors import PeerProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from hospitium_common.archive import RoundArchive
    from hospitium_common.messages import Ack, Masked, Message, Ready, Shares
    from hospitium_server.unmasking import RoundSum, Unmasking

log = logging.getLogger(__name__)


class Attempt:
    """The runs of one attempt. A group that fails is set aside, the others go on.

    ``sums`` are the groups that came to a sum; ``failed`` holds the invited sites of the others,
    and why.
    """

    def __init__(self, runs: Iterable[Unmasking], archive: RoundArchive) -> None:
        self._runs, self._archive = list(runs), archive
        self._run_of = {site: run for run in self._runs for site in run.task.invited}
        self.sums: list[RoundSum] = []
        self.failed: list[tuple[list[int], PeerProtocolError]] = []

    @property
    def excluded(self) -> dict[int, str]:
        """Whom the cohorts were closed without, and why."""
        return {site: why for run in self._runs for site, why in run.excluded.items()}

    def task_requests(self) -> dict[int, bytes]:
        """Return exchange A's request to every site."""
        return self._each(lambda run: _to_all(run.task.invited, run.task))

    def on_ready(self, site: int, answer: Ready) -> None:
        """Take the commitments of a site."""
        self._run_of[site].on_ready(answer)

    def cohort_requests(self) -> dict[int, bytes]:
        """Close the cohorts and return exchange B's request to every site."""
        return self._each(lambda run: {s: r.encode() for s, r in run.close_cohort().items()})

    def on_masked(self, site: int, answer: Masked) -> None:
        """Add a masked vector, and keep it if vectors are kept."""
        run = self._run_of[site]
        run.on_masked(answer)
        self._archive.keep_vector(run.task.round, run.task.attempt, answer)

    def confirmation_requests(self) -> dict[int, bytes]:
        """Close the survivors and return exchange C's request to every site."""

        def request(run: Unmasking) -> dict[int, bytes]:
            confirmation = run.close_survivors()
            return _to_all(confirmation.digests, confirmation)

        return self._each(request)

    def on_ack(self, site: int, answer: Ack) -> None:
        """Take the confirmation of a site."""
        self._run_of[site].on_ack(answer)

    def unmasking_requests(self, least: int) -> dict[int, bytes]:
        """Return exchange D's request to every site; none if fewer groups than ``least`` are left.

        Then nothing is revealed, and all of them can be tried again.
        """

        def request(run: Unmasking) -> dict[int, bytes]:
            confirmed = run.unmask_request()
            return _to_all(confirmed.acks, confirmed)

        requests = self._each(request)
        if len(self._runs) >= least:
            return requests
        for run in list(self._runs):
            self._set_aside(run, PeerProtocolError("too few other groups were confirmed"))
        return {}

    def on_shares(self, site: int, answer: Shares) -> None:
        """Take the shares of a site."""
        self._run_of[site].on_shares(answer)

    def finish(self) -> None:
        """Unmask every group that came so far; its transcript is kept first."""
        for run in list(self._runs):
            try:
                total = run.finish()
            except PeerProtocolError as error:
                self._set_aside(run, error)
            else:
                self._archive.keep(total.transcript)
                self.sums.append(total)

    def _each(self, request: Callable[[Unmasking], Mapping[int, bytes]]) -> dict[int, bytes]:
        requests: dict[int, bytes] = {}
        for run in list(self._runs):
            try:
                requests |= request(run)
            except PeerProtocolError as error:
                self._set_aside(run, error)
        return requests

    def _set_aside(self, run: Unmasking, error: PeerProtocolError) -> None:
        log.warning("round %d: %s", run.task.round, error)
        self._archive.drop_vectors(run.task.round, run.task.attempt)
        self._runs = [one for one in self._runs if one is not run]
        self.failed.append((list(run.task.invited), error))


def _to_all(sites: Iterable[int], message: Message) -> dict[int, bytes]:
    return dict.fromkeys(sites, message.encode())
