"""Our own process's way into the SuperLink: nodes, runs and tasks, over the loopback listener.

Here the coordinator's service registers exactly the roster's node keys, starts a run for a study,
and claims that run's task as its executor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from hospitium_common.errors import HospitiumError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

    T = TypeVar("T")

APP_PROJECT = b"""\
[project]
name = "hospitium"
version = "0.1.0"
description = "The configuration of a Hospitium run; it carries no code"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "hospitium"
fab-include = ["/README.md"]

[tool.flwr.app.components]
serverapp = "hospitium_server.app:main"
clientapp = "hospitium_client.app:app"

[tool.flwr.app.config]
study = ""
"""
APP_README = b"Hospitium runs the package that a site installed itself, never code that was sent.\n"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A site's node as the SuperLink knows it; times are Unix seconds, 0 when it never came."""

    node_id: int
    public_key: bytes
    name: str
    online: bool
    online_until: float
    heartbeat_interval: float


@dataclass(frozen=True, kw_only=True)
class ClaimedTask:
    """The task of a run, and the token with which its process proves that it may run it."""

    run_id: int
    token: str


class SuperLinkUnavailable(HospitiumError):  # noqa: N818 - named after what happened
    """The SuperLink did not answer, or it answered that it cannot."""


class SuperLinkControl:
    """Control API and executor of one SuperLink, on this machine."""

    def __init__(self, address: str, control_token: str, executor_secret: bytes) -> None:
        self._address = address
        self._control = ControlHttpClient.from_server_address(
            address, insecure=True, root_certificates=None, interceptors=[_Bearer(control_token)]
        )
        self._runtime = RuntimeHttpClient.from_server_address(
            address,
            insecure=True,
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=executor_secret,
                    protected_methods=["/flwr.proto.Runtime/AcquireTask"],
                ),
            ],
        )

    def close(self) -> None:
        """Close the connections."""
        self._control.close()
        self._runtime.close()

    def is_up(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            return httpx.get(f"http://{self._address}/health", timeout=1).is_success
        except httpx.HTTPError:
            return False

    def nodes(self) -> tuple[Node, ...]:
        """Every node that is registered now."""
        response = _ask(lambda: self._control.ListNodes(ListNodesRequest()))
        return tuple(
            Node(
                node_id=info.node_id,
                public_key=info.public_key,
                name=info.name,
                online=info.status == "online",
                online_until=info.online_until,
                heartbeat_interval=info.heartbeat_interval,
            )
            for info in response.nodes_info
            if info.status != "unregistered"
        )

    def register(self, public_key: bytes, name: str) -> None:
        """Let a node in by its key (PEM)."""
        _ask(
            lambda: self._control.RegisterNode(
                RegisterNodeRequest(public_key=public_key, name=name)
            )
        )

    def unregister(self, node_id: int) -> None:
        """Let a node in no longer."""
        _ask(lambda: self._control.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def start_run(self, study: str) -> int:
        """Start a run for a study and return its number; the run carries configuration only."""
        content, _ = build_fab_from_files({"pyproject.toml": APP_PROJECT, "README.md": APP_README})
        request = StartRunRequest(
            fab=Fab(content=content), override_config=user_config_to_proto({"study": study})
        )
        run_id = int(_ask(lambda: self._control.StartRun(request)).run_id)
        if run_id == 0:
            raise SuperLinkUnavailable(f"study {study}: expected the SuperLink to start a run")
        return run_id

    def unfinished_runs(self) -> tuple[int, ...]:
        """Runs that an earlier life of this service left behind."""
        response = _ask(lambda: self._control.ListRuns(ListRunsRequest()))
        return tuple(
            int(run.run_id) for run in response.run_dict.values() if run.status.status != "finished"
        )

    def stop_run(self, run_id: int) -> None:
        """Stop a run; its messages and objects are deleted."""
        _ask(lambda: self._control.StopRun(StopRunRequest(run_id=run_id)))

    def claim_task(self) -> ClaimedTask | None:
        """Claim the oldest waiting task, if there is one."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        response = _ask(lambda: self._runtime.AcquireTask(request))
        if not response.token:
            return None
        return ClaimedTask(run_id=int(response.task.run_id), token=str(response.token))


class _Bearer:
    """Puts the control token into every request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


def _ask(call: Callable[[], T]) -> T:
    """Call the SuperLink.

    Raises:
        SuperLinkUnavailable: it is not there, or it refuses.
    """
    try:
        return call()
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        raise SuperLinkUnavailable(
            f"SuperLink: expected it to do as asked, got HTTP {code} for {error.request.url.path}"
        ) from error
    except httpx.HTTPError as error:
        raise SuperLinkUnavailable(
            f"SuperLink: expected an answer, got {type(error).__name__}"
        ) from error
