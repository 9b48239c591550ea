"""The transport over Flower: seals requests, knows which node is whose, checks who answered."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hospitium_common.envelope import NONCE_BYTES, Request, open_answer, seal_request
from hospitium_common.errors import PeerProtocolError
from hospitium_common.flower_record import as_record
from hospitium_server.studies import NOT_CONNECTED

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.federation import FederationRoster
    from hospitium_server.mailbox import Letter, Mailbox

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Somebody who wants to know where every site is."""

    def on_sent(self, sites: Collection[int], request: bytes) -> None:
        """A request is on its way to these sites."""

    def on_answer(self, site: int, answer: bytes) -> None:
        """A site answered, and its signature is right."""

    def on_silence(self, site: int, reason: str) -> None:
        """Nothing is expected from this site any more."""


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A message under way to one site."""

    site: int
    digest: bytes


class Exchange:
    """Requests under way, and their answers as they come; nothing here waits."""

    def __init__(self, transport: GridTransport, waiting: dict[str, _Waiting]) -> None:
        self._transport, self._waiting = transport, waiting

    @property
    def sites(self) -> frozenset[int]:
        """Who has not answered yet."""
        return frozenset(one.site for one in self._waiting.values())

    def arrived(self) -> Iterator[tuple[int, bytes]]:
        """Look once for every answer that is still out; yield (site, answer) of those there."""
        for message_id, letter in self._transport.mailbox.arrived(list(self._waiting)):
            waiting = self._waiting.pop(message_id)
            answer = self._transport.opened(waiting.site, waiting.digest, letter)
            del letter
            if answer is not None:
                yield waiting.site, answer

    def give_up(self, reason: str) -> None:
        """Expect no more answers; late ones are never looked at."""
        self._transport.mailbox.forget(list(self._waiting))
        for one in self._waiting.values():
            self._transport.listener.on_silence(one.site, reason)
        self._waiting.clear()


class GridTransport:
    """Carries bytes between the coordinator and sites, for one study.

    Which node is a site's is what the roster says: a node logs in with the key that stands there.
    Who answered is what the signature on the answer says. ``check`` is called between two looks
    and may raise to stop waiting.

    **Guarantees:** an answer is handed over as site i's only if site i's key in the roster signed
    it, for this very request; whatever else came under its name is dropped and logged.
    """

    def __init__(
        self,
        *,
        mailbox: Mailbox,
        study: bytes,
        key: Ed25519PrivateKey,
        roster: Callable[[], FederationRoster],
        listener: Listener,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.mailbox, self.listener = mailbox, listener
        self._study, self._key, self._roster, self._check = study, key, roster, check

    def online(self) -> dict[int, int]:
        """Return the sites whose nodes are connected: roster index -> node id."""
        nodes, now = self.mailbox.online(), time.time()
        return {
            member.index: nodes[member.node_key]
            for member in self._roster().members
            if member.node_key in nodes and member.is_active(now)
        }

    def send(self, requests: Mapping[int, bytes], deadline_s: float) -> Exchange:
        """Seal requests and send them; sites whose nodes are not connected get none."""
        nodes = self.online()
        for site in requests.keys() - nodes.keys():
            self.listener.on_silence(site, NOT_CONNECTED)
        groups: dict[int, list[int]] = {}
        for site, payload in requests.items():
            if site in nodes:
                groups.setdefault(id(payload), []).append(site)
        waiting: dict[str, _Waiting] = {}
        for sites in groups.values():
            payload = requests[sites[0]]
            self.listener.on_sent(sites, payload)
            request = Request(study=self._study, nonce=os.urandom(NONCE_BYTES), payload=payload)
            sealed = seal_request(request, self._key)
            names = self.mailbox.post(
                as_record(sealed), [nodes[site] for site in sites], deadline_s
            )
            for site, name in zip(sites, names, strict=True):
                if name is None:
                    self.listener.on_silence(site, NOT_CONNECTED)
                else:
                    waiting[name] = _Waiting(site=site, digest=request.digest)
        return Exchange(self, waiting)

    def exchange(
        self, requests: Mapping[int, bytes], deadline_s: float
    ) -> Iterator[tuple[int, bytes]]:
        """Send every request and yield (site, answer) as answers arrive, until the deadline."""
        until = time.monotonic() + deadline_s
        out = self.send(requests, deadline_s)
        try:
            while out.sites:
                self._check()
                for site, answer in out.arrived():
                    yield site, answer
                    del answer
                if time.monotonic() > until:
                    break
                if out.sites:
                    self.mailbox.wait()
        finally:
            out.give_up("no answer before the deadline")

    def opened(self, site: int, digest: bytes, letter: Letter) -> bytes | None:
        """Return a site's answer, if it is its own; otherwise say what is wrong with it."""
        reason = letter.error
        if not reason and not letter.payload:
            reason = "it does not take this coordinator's requests, see its own log"
        if not reason:
            try:
                answer = open_answer(letter.payload, self._roster(), digest)
                if answer.site == site:
                    payload = bytes(answer.payload)
                    self.listener.on_answer(site, payload)
                    return payload
                reason = f"its answer is signed by site {answer.site}"
            except PeerProtocolError as error:
                reason = f"its answer is refused: {error}"
        log.warning("site %d: %s", site, reason)
        self.listener.on_silence(site, reason)
        return None
