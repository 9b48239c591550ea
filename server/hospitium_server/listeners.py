"""What each of the SuperLink's two listeners lets through, and a log line for what it does not.

Flower serves the Fleet, Control and Runtime APIs as one application. Sites get the Fleet API and
health, nothing else; control and runtime stay on the loopback interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool

from hospitium_server.fast_lane import FastLane
from hospitium_server.holding import Bell, HeldQuestions
from hospitium_server.paths import ARRIVALS, POSTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger(__name__)

PUSH_MESSAGES = "/v1/fleet/push-messages"
PULL_MESSAGES = "/v1/fleet/pull-messages"
PULL_OBJECT = "/v1/fleet/pull-object"
CONFIRM = "/v1/fleet/confirm-message-received"
LONGEST_WAIT_S = 2.0
LARGEST_BODY = 6 << 20
BODY_S = 60.0
"""Flower sends objects in chunks of 5 MiB, each in a request of its own."""
SMALL_BODY = 1 << 16
"""More than this is read from registered nodes only."""
LARGEST_LOG_RATE = 60
"""Refusals that are logged per minute; the rest are counted, so that nobody fills the disk."""


class Gate:
    """Lets one request at a time through to Flower's application, with its body read whole.

    SQLite has one writer, and every one of Flower's handlers writes: side by side they spend most
    of their time asleep, waiting for each other's lock. Reading from and writing to slow lines
    happens outside.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app, self._fast_lane = app, FastLane(app)
        self._lock = asyncio.Lock()
        self.questions = HeldQuestions()
        self.arrivals = Bell()

    def knows_sender(self, scope: Scope) -> bool:
        """Whether a registered node signed the headers of a request."""
        return self._fast_lane.knows_sender(scope)

    def end(self) -> None:
        """Hold nobody any longer."""
        self.questions.end()
        self.arrivals.ring()

    async def answer(self, scope: Scope, body: bytes, receive: Receive) -> list[Message]:
        """Return what the application sends for a request with this body."""
        sent: list[Message] = []

        async def collect(message: Message) -> None:
            sent.append(message)

        async with self._lock:
            if self._fast_lane.takes(scope):
                answer = await run_in_threadpool(self._fast_lane.answer, scope, body)
                if answer is not None:
                    return answer
            await self._app(scope, _replay(body, receive), collect)
        return sent

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and end the application."""
        await self._app(scope, receive, send)


class PublicListener:
    """The Fleet API and health for sites; 404 for everything else.

    **Guarantees:** the Control and Runtime APIs cannot be reached through it, whatever the
    credentials; a body over ``LARGEST_BODY``, and a stranger's over ``SMALL_BODY``, is refused
    before it is read; a node pushes replies only in its own name (Flower authenticates the node
    but does not compare).
    """

    def __init__(self, gate: Gate, clock: Callable[[], float] = time.monotonic) -> None:
        self._gate = gate
        self._refusals = _Refusals(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        path = str(scope["path"])
        status = _length_status(scope)
        if path != "/health" and not path.startswith("/v1/fleet/"):
            status = 404
        if status == 200 and _length(scope) > SMALL_BODY and not self._gate.knows_sender(scope):
            status = 401
        body = b""
        if status == 200:
            try:
                body = await _whole(receive)
            except TimeoutError:
                status = 408
        if status == 200 and path == PUSH_MESSAGES and not _pushes_in_own_name(body):
            status = 403
        sent = await self._answer(scope, body, receive) if status == 200 else _empty(status)
        if sent and sent[0].get("status", 200) >= 400:
            self._refusals.note(scope, sent[0]["status"])
        for message in sent:
            await send(message)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive) -> list[Message]:
        path, gate = str(scope["path"]), self._gate
        if path == PULL_MESSAGES:
            return await gate.questions.answer(
                body, receive, lambda: gate.answer(scope, body, receive)
            )
        sent = await gate.answer(scope, body, receive)
        status = sent[0].get("status") if sent else None
        if path == PULL_OBJECT and status in (200, 403):  # 403: its run is over
            gate.questions.on_fetch(body)
        elif path == CONFIRM and status == 200:  # the last thing that a node does with a message
            gate.arrivals.ring()
        return sent


class LoopbackListener:
    """Control, Runtime and health for this machine; no documentation pages, no model endpoints.

    Besides, our own two paths (`paths.py`), which tell nobody anything.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._gate.lifespan(scope, receive, send)
        elif scope["type"] == "http":
            path = str(scope["path"])
            if path == "/health" or path.startswith(("/v1/control/", "/v1/runtime/")):
                sent = await self._gate.answer(scope, await _whole(receive), receive)
            elif path == ARRIVALS:
                sent = _text(str(await self._arrivals(bytes(scope["query_string"]))))
            elif path == POSTED:
                self._gate.questions.bell.ring()
                sent = _text("")
            else:
                sent = _empty(404)
            for message in sent:
                await send(message)

    async def _arrivals(self, known: bytes) -> int:
        bell = self._gate.arrivals
        if known == str(bell.count).encode():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bell.next.wait(), LONGEST_WAIT_S)
        return bell.count


class _Refusals:
    """Log lines about refused requests, at a bounded rate."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._minute, self._count = -1, 0

    def note(self, scope: Scope, status: int) -> None:
        minute = int(self._clock() // 60)
        if minute != self._minute:
            if self._count > LARGEST_LOG_RATE:
                log.warning("refused %d more requests", self._count - LARGEST_LOG_RATE)
            self._minute, self._count = minute, 0
        self._count += 1
        if self._count > LARGEST_LOG_RATE:
            return
        client = scope.get("client")
        who = "unknown" if client is None else f"{client[0]}:{client[1]}"
        log.warning(
            "refused %s %.80r from %s: %d", scope["method"], str(scope["path"]), who, status
        )


def _length_status(scope: Scope) -> int:
    """413 for a body that is too long, 411 for one that does not say how long it is, else 200.

    The HTTP parser below us holds a client to the length that it announced. A GET has no body here:
    one in chunks could go on for ever.
    """
    length = _length(scope)
    if scope["method"] in ("GET", "HEAD"):
        lengths = (b"content-length", b"transfer-encoding")
        return 413 if length != 0 and any(name in lengths for name, _ in scope["headers"]) else 200
    if length < 0 or any(name == b"transfer-encoding" for name, _ in scope["headers"]):
        return 411
    return 413 if length > LARGEST_BODY else 200


def _length(scope: Scope) -> int:
    """How long a request says that its body is; -1 if it does not, or says it twice."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(lengths[0]) if len(lengths) == 1 and lengths[0].isdigit() else -1


async def _whole(receive: Receive) -> bytes:
    """Read a body, in bounded time.

    Raises:
        TimeoutError: it trickles.
    """
    parts: list[bytes] = []
    async with asyncio.timeout(BODY_S):
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(content: bytes, receive: Receive) -> Receive:
    """Return a receive that first hands over a body that was read already."""
    ready: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def replay() -> Message:
        return ready.pop() if ready else await receive()

    return replay


def _pushes_in_own_name(content: bytes) -> bool:
    """Whether every reply's source is the node whose identity Flower is about to check."""
    try:
        request = PushMessagesRequest.FromString(content)
    except DecodeError:
        return False
    sources = {message.metadata.src_node_id for message in request.messages_list}
    return sources == {request.node.node_id}


def _text(text: str) -> list[Message]:
    body = text.encode()
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"text/plain")]
    return [
        {"type": "http.response.start", "status": 200, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


def _empty(status: int) -> list[Message]:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": b""},
    ]
