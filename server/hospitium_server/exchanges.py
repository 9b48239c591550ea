"""One request to each of several sites, and their answers as they arrive; who is missing, why."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Message, Reason, Refusal, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hospitium_server.transport import Transport

log = logging.getLogger(__name__)

REFUSALS = {
    Reason.PROTOCOL: "refused: the message broke the protocol",
    Reason.NOT_APPROVED: "refused: the site's policy does not allow it",
    Reason.BUDGET: "refused: the site's privacy budget does not cover it",
    Reason.DATA: "refused: the site's data did not pass its quality check",
    Reason.LOCAL_FAULT: "refused: a fault at the site, see its own log",
}
SILENT = "no answer before the deadline"
BROKE_THE_PROTOCOL = "left out: it broke the protocol"

M = TypeVar("M", bound=Message)


class Exchanges:
    """Talks to the sites. ``missing`` maps a site to the reason why it did not answer as asked."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.missing: dict[int, str] = {}
        self.bytes_sent = self.bytes_received = 0

    def ask(
        self, requests: Mapping[int, bytes], kind: type[M], deadline_s: float
    ) -> Iterator[tuple[int, M]]:
        """Send requests and yield answers of the right kind, one at a time; note who is missing."""
        answered = set()
        self.bytes_sent += sum(len(request) for request in requests.values())
        for site, data in self._transport.exchange(requests, deadline_s):
            self.bytes_received += len(data)
            if site not in requests or site in answered:
                continue
            answered.add(site)
            try:
                message = decode(data)
            except PeerProtocolError:
                self.missing[site] = "its answer could not be read"
                continue
            if isinstance(message, Refusal):
                self.missing[site] = REFUSALS[message.reason]
            elif isinstance(message, kind):
                yield site, message
            else:
                self.missing[site] = f"expected {kind.__name__}, got {type(message).__name__}"
        for site in set(requests) - answered:
            self.missing[site] = SILENT

    def gather(
        self,
        requests: Mapping[int, bytes],
        kind: type[M],
        take: Callable[[int, M], None],
        deadline_s: float,
    ) -> None:
        """Let answers in; one that breaks the protocol costs its site the round, no more."""
        for site, answer in self.ask(requests, kind, deadline_s):
            try:
                take(site, answer)
            except PeerProtocolError as error:
                log.warning("site %d: %s", site, error)
                self.missing[site] = BROKE_THE_PROTOCOL
