"""Questions that wait for their answer: nobody has to ask ten times a second.

A node's question for messages is held until there is one. What was handed out and never fetched,
because the line broke on the way, is handed out again: Flower itself delivers a message once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message, Receive

HOLD_S = 5.0
"""Far below the half minute after which clients and proxies lose patience; a node that is stopped
waits for it."""
UNFETCHED_S = 3.0
"""A node fetches what it was handed within milliseconds."""
MOST_DELIVERIES = 16


class Bell:
    """Wakes up whoever waits for something to change; ``count`` says how often it rang."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    @property
    def next(self) -> asyncio.Event:
        """What is set at the next ring."""
        return self._event

    def ring(self) -> None:
        """Wake up everybody who waits."""
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()


@dataclass(frozen=True, kw_only=True)
class _Delivery:
    """A response that handed a message out, until one of its parts is fetched."""

    response: list[Message]
    parts: frozenset[str]
    handed_out: float
    expires: float


class HeldQuestions:
    """Nodes that wait for a message."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self.bell = Bell()
        self._clock, self._wall = clock, wall
        self._deliveries: dict[int, list[_Delivery]] = {}
        self._is_over = False

    def end(self) -> None:
        """Hold nobody any longer."""
        self._is_over = True
        self.bell.ring()

    async def answer(
        self, body: bytes, receive: Receive, ask: Callable[[], Awaitable[list[Message]]]
    ) -> list[Message]:
        """Ask for a node's messages until there is one, it leaves, or it waited long enough.

        ``ask`` includes Flower's check that the node is who it says; only its answer opens what
        waits here for that node.
        """
        until = self._clock() + HOLD_S
        while True:
            event = self.bell.next
            sent = await ask()
            if not _is_empty_success(sent):
                self._note(_node_of(body), sent)
                return sent
            again = self._unfetched(_node_of(body))
            if again is not None:
                return again
            left = until - self._clock()
            if left <= 0 or self._is_over or not await _wait(event, receive, left):
                return sent

    def on_fetch(self, body: bytes) -> None:
        """Note that a node fetches a part: the message that it belongs to has arrived."""
        with contextlib.suppress(DecodeError):
            request = PullObjectRequest.FromString(body)
            node = request.node.node_id
            left = [d for d in self._deliveries.get(node, []) if request.object_id not in d.parts]
            if left:
                self._deliveries[node] = left
            else:
                self._deliveries.pop(node, None)

    def _note(self, node: int, sent: list[Message]) -> None:
        if sent[0].get("status") != 200:
            return
        response = PullMessagesResponse.FromString(_body_of(sent))
        if not response.messages_list:
            return
        metadata = response.messages_list[0].metadata
        tree = response.message_object_trees[0]
        delivery = _Delivery(
            response=sent,
            parts=frozenset(part.object_id for part in iterate_object_tree(tree)),
            handed_out=self._clock(),
            expires=metadata.created_at + metadata.ttl,
        )
        kept = self._deliveries.get(node, [])
        self._deliveries[node] = [*kept, delivery][-MOST_DELIVERIES:]

    def _unfetched(self, node: int) -> list[Message] | None:
        """Return a response that a node never got, as if it were new."""
        now = self._clock()
        kept = [d for d in self._deliveries.get(node, []) if d.expires > self._wall()]
        lost = next((d for d in kept if now - d.handed_out >= UNFETCHED_S), None)
        self._deliveries[node] = [d for d in kept if d is not lost]
        if lost is None:
            return None
        self._note(node, lost.response)
        return lost.response


def _is_empty_success(sent: list[Message]) -> bool:
    return bool(sent) and sent[0].get("status") == 200 and not _body_of(sent)


def _body_of(sent: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent[1:])


def _node_of(body: bytes) -> int:
    return int(PullMessagesRequest.FromString(body).node.node_id)


async def _wait(event: asyncio.Event, receive: Receive, seconds: float) -> bool:
    """Wait for an event; False if the client left first."""
    rings, leaves = asyncio.ensure_future(event.wait()), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({rings, leaves}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return not leaves.done()
    finally:
        rings.cancel()
        leaves.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
