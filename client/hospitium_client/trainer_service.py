"""The wire between node and trainer: gRPC on a Unix socket, bytes in frames, and nothing else.

One method, ``/hospitium.Trainer/Exchange``: a stream of frames in, a stream of frames out, each
frame raw bytes. Beside it stands gRPC's standard health service.

**Guarantees:** whoever may not open the socket file cannot speak to the trainer. The file's mode
(0600, or 0660 for one group) and its directory's are the guard: gRPC shows no peer credentials.
"""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hospitium_common.errors import ConfigError, HospitiumError
from hospitium_common.exclusive import exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

SERVICE = "hospitium.Trainer"
FRAME_BYTES = 1 << 20
LARGEST_BYTES = 1 << 31
"""No message is larger; a model of 500 million float32 parameters just fits."""
LONGEST_PATH = 107
"""The kernel's limit for the name of a Unix socket (``sun_path``)."""
THREADS = 8
READY_S = 60.0
ATTEMPTS = 3
_OPTIONS = [
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_send_message_length", FRAME_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class TrainerUnavailable(HospitiumError):  # noqa: N818 - named after what happened, as in the error tree
    """The trainer does not answer: it is not running, it died, or it takes too long."""


class TrainerServer:
    """Answers every exchange with ``answer(request)``, several at a time.

    ``group`` lets a node of another user in: the socket then belongs to that group, mode 0660.
    """

    def __init__(
        self,
        socket: Path,
        answer: Callable[[bytes], bytes],
        *,
        group: str | None = None,
        largest_bytes: int = LARGEST_BYTES,
    ) -> None:
        self._socket, self._answer = socket, answer
        self._group, self._largest = group, largest_bytes
        self._health = health.HealthServicer()
        self._held = ExitStack()
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Take the socket and answer from now on.

        Raises:
            ConfigError: another trainer holds this socket, or it cannot be made.
        """
        self._held.enter_context(
            exclusive(self._socket.with_suffix(".lock"), "trainer of this site")
        )
        server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="exchange"),
            options=_OPTIONS,
            maximum_concurrent_rpcs=THREADS,
        )
        method = grpc.stream_stream_rpc_method_handler(self._exchange)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"Exchange": method}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._bind(server)
        server.start()
        self._server = server
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float) -> bool:
        """Refuse new exchanges, give running ones ``grace_s``; return whether all finished."""
        if self._server is None:
            return True
        self._health.enter_graceful_shutdown()
        finished: bool = self._server.stop(grace_s).wait(grace_s + 1.0)
        self._socket.unlink(missing_ok=True)
        self._held.close()
        return finished

    def _bind(self, server: grpc.Server) -> None:
        before = os.umask(0o177)
        try:
            server.add_insecure_port(address_of(self._socket))
            if self._group is not None:
                shutil.chown(self._socket, group=self._group)
                self._socket.chmod(0o660)
        except (RuntimeError, OSError, LookupError) as error:
            raise ConfigError(
                f"{self._socket}: expected to make the trainer's socket there"
                + (f" for group {self._group}" if self._group else "")
                + ", it failed; check the directory's owner and mode"
            ) from error
        finally:
            os.umask(before)

    def _exchange(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        request = bytearray()
        for frame in frames:
            request += frame
            if len(request) > self._largest:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large")
        whole = bytes(request)
        del request
        try:
            reply = self._answer(whole)
        except Exception as error:
            # Its text may hold data: the kind of error goes to the log, one word to the node.
            log.error("%s while answering an exchange", type(error).__name__)
            context.abort(grpc.StatusCode.INTERNAL, "fault")
        del whole
        yield from in_frames(reply)


class TrainerClient:
    """The node's end of the socket; safe to use from several threads."""

    def __init__(self, socket: Path, *, ready_s: float = READY_S) -> None:
        self._socket, self._ready_s = socket, ready_s
        self._channel = grpc.insecure_channel(address_of(socket), options=_OPTIONS)
        self._call = self._channel.stream_stream(f"/{SERVICE}/Exchange")
        self._check = health_pb2_grpc.HealthStub(self._channel).Check

    def exchange(self, request: bytes, *, deadline_s: float) -> bytes:
        """Send a request, wait for its answer.

        The trainer answers the same request with the same bytes, so one that died with the
        trainer is sent again, ``ATTEMPTS`` times at most: a request that kills every trainer must
        not go on for ever.

        Raises:
            TrainerUnavailable: not running, died each time, refused, or too slow.
        """
        for attempt in range(1, ATTEMPTS + 1):
            if not self.is_serving(self._ready_s):
                raise TrainerUnavailable(
                    f"{self._socket}: expected a trainer within {self._ready_s:g} s, found none; "
                    "is `hospitium site trainer` running?"
                )
            try:
                return b"".join(self._call(in_frames(request), timeout=deadline_s))
            except grpc.RpcError as error:
                code = error.code()
                log.warning("attempt %d: the trainer's socket says %s", attempt, code.name)
                if code is not grpc.StatusCode.UNAVAILABLE:
                    raise TrainerUnavailable(
                        f"{self._socket}: expected an answer of the trainer, got {code.name}; "
                        "the trainer's log says why"
                    ) from error
        raise TrainerUnavailable(
            f"{self._socket}: the trainer died {ATTEMPTS} times over the same request; the "
            "system's log says whether it ran out of memory"
        )

    def is_serving(self, timeout_s: float = 2.0) -> bool:
        """Whether a trainer answers on the socket within this time."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            status = self._check(request, timeout=timeout_s, wait_for_ready=True).status
        except grpc.RpcError:
            return False
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def in_frames(data: bytes) -> Iterator[bytes]:
    """Cut bytes into frames; the last may be shorter, and no bytes are one empty frame."""
    if len(data) <= FRAME_BYTES:
        yield data
        return
    view = memoryview(data)
    for start in range(0, len(data), FRAME_BYTES):
        yield bytes(view[start : start + FRAME_BYTES])


def address_of(socket: Path) -> str:
    """Return what gRPC calls a socket; one with a path too long for the kernel goes by its folder.

    The folder is then held open for as long as this process runs.

    Raises:
        ConfigError: the path is too long, and its folder cannot be opened.
    """
    if len(os.fsencode(socket)) <= LONGEST_PATH:
        return f"unix:{socket}"
    try:
        folder = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"{socket}: expected the folder of the trainer's socket, got: {error.strerror}; make "
            f"it, or choose a path of at most {LONGEST_PATH} bytes with --socket"
        ) from error
    return f"unix:/proc/self/fd/{folder}/{socket.name}"
