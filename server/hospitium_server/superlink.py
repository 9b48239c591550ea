"""Flower's SuperLink in a process of its own, with two listeners instead of its one.

Started by the coordinator's service, which holds both listening sockets for as long as it runs:
while a SuperLink is restarted, connections wait instead of being refused, and no other process
of this machine can take the port over. What it needs, secrets included, comes as one line of JSON
on standard input; when that input ends, the service is gone and so is this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import uvicorn
from flwr.common.constant import (
    ACCESS_TOKEN_KEY,
    ISOLATION_MODE_PROCESS,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TRANSPORT_TYPE_GRPC_RERE,
)
from flwr.supercore.auth.typing import (
    AccountAuthCredentials,
    AccountAuthLoginDetails,
    AccountInfo,
)
from flwr.supercore.logger import update_console_handler
from flwr.supercore.routers.runtime.tracing import RuntimeTracingMiddleware
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.control.middlewares import (
    ControlEventLogMiddleware,
    ControlLicenseMiddleware,
    ControlSensitiveResponseMiddleware,
)
from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware

from hospitium_server.listeners import Gate, LoopbackListener, PublicListener

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastapi import FastAPI

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than an idle site's pause between two polls: it need not greet the server every time."""
MOST_CONNECTIONS = 1024
IDLE_LAYERS: tuple[object, ...] = (
    ControlSensitiveResponseMiddleware,
    ControlLicenseMiddleware,
    RuntimeTracingMiddleware,
    ControlEventLogMiddleware,
    FleetEventLogMiddleware,
)
"""For logins in a browser, licences, tracing and event logs: none of them is switched on here."""
GRACE_S = 3


@dataclass(frozen=True, kw_only=True)
class SuperLinkOrder:
    """What the service tells the SuperLink's process; ``executor_secret`` is hexadecimal."""

    database: str
    certificate: str
    private_key: str
    public_socket: int
    loopback_socket: int
    control_token: str
    executor_secret: str

    def encode(self) -> bytes:
        """Return the order as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> SuperLinkOrder:
        """Read what ``encode`` wrote."""
        return cls(**json.loads(line))


class TokenAuthentication(ControlAuthnPlugin):
    """Lets nobody use the Control API but who holds the token of this start."""

    def __init__(self, token: str = "") -> None:
        self._token = token.encode()

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Compare the bearer token, in constant time."""
        given = dict(metadata).get(ACCESS_TOKEN_KEY, b"")
        offered = given.encode() if isinstance(given, str) else given
        if not self._token or not hmac.compare_digest(offered, self._token):
            log.warning("refused a control request: expected the token of this start")
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """Nobody logs in."""
        return None

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """Nobody is given a token."""
        return None

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """No token is renewed."""
        return None, None


def application(order: SuperLinkOrder) -> FastAPI:
    """Flower's SuperLink: node authentication on, no executor of its own, no dependency install."""
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="",
        port=0,
        insecure=True,
        certificates=None,
        superexec_auth_secret=bytes.fromhex(order.executor_secret),
        authn_plugin=TokenAuthentication(order.control_token),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=order.database,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    # What does nothing in this set-up costs a third of every request; unknown layers stay.
    app.user_middleware = [m for m in app.user_middleware if m.cls not in IDLE_LAYERS]
    return app


class _Server(uvicorn.Server):
    """A server that leaves signals to the process, because there are two of them in it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(order: SuperLinkOrder) -> None:
    """Answer on both sockets until SIGTERM or SIGINT."""
    gate = Gate(application(order))
    public = uvicorn.Config(
        PublicListener(gate), lifespan="off", log_config=None, access_log=False, ws="none",
        ssl_certfile=order.certificate, ssl_keyfile=order.private_key, server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=MOST_CONNECTIONS,
    )  # fmt: skip
    public.load()
    if public.ssl is None:
        raise AssertionError("unreachable: the certificate was given")
    public.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    loopback = uvicorn.Config(
        LoopbackListener(gate), lifespan="on", log_config=None, access_log=False, ws="none",
        server_header=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S,
    )  # fmt: skip
    servers = [_Server(loopback), _Server(public)]

    def stop() -> None:
        for server in servers:
            server.should_exit = True
        gate.end()

    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    sockets = [order.loopback_socket, order.public_socket]
    async with asyncio.TaskGroup() as group:
        for server, number in zip(servers, sockets, strict=True):
            group.create_task(server.serve(sockets=[socket.socket(fileno=number)]))


def end_with_the_service() -> None:
    """End this process when its standard input ends, which is when the service does."""
    # Not through sys.stdin: its lock would be held by this thread when the interpreter ends.
    number = sys.stdin.fileno()

    def wait() -> None:
        while os.read(number, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Run a SuperLink as the order on standard input says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("httpx", "alembic", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("flwr").propagate = False
    update_console_handler(level=logging.WARNING, timestamps=True, colored=False)
    for handler in logging.getLogger("flwr").handlers:
        handler.addFilter(lambda record: "][ApiError:" not in record.getMessage())  # see listeners
    order = SuperLinkOrder.decode(sys.stdin.buffer.readline())
    end_with_the_service()
    with asyncio.Runner(
        loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()
    ) as runner:
        runner.run(serve(order))


if __name__ == "__main__":
    main()
