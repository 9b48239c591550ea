"""The requests that every exchange consists of, without Flower's layers around them.

A round is some two hundred requests, and each passes a dozen layers of middleware, routing and
thread changes that take longer than the work. Here Flower's own checks and handlers are called
directly; whatever is not a plain success goes the long way, which then says what is wrong.
"""

from __future__ import annotations

import logging
from base64 import b64decode
from typing import TYPE_CHECKING, Any

from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PushAppMessagesRequest,
)
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    TASK_TOKEN_HEADER,
)
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from starlette.requests import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from starlette.types import Message, Scope

log = logging.getLogger(__name__)

FLEET: dict[str, tuple[type[Any], Callable[[Any, Any], Any]]] = {
    "/v1/fleet/pull-messages": (
        PullMessagesRequest,
        lambda request, state: fleet_handlers.pull_messages(request, state, state.object_store),
    ),
    "/v1/fleet/push-messages": (PushMessagesRequest, fleet_handlers.push_messages),
    "/v1/fleet/push-object": (PushObjectRequest, fleet_handlers.push_object),
    "/v1/fleet/pull-object": (PullObjectRequest, fleet_handlers.pull_object),
    "/v1/fleet/confirm-message-received": (
        ConfirmMessageReceivedRequest,
        lambda request, state: fleet_handlers.confirm_message_received(
            request, state, state.object_store
        ),
    ),
}
RUNTIME: dict[str, tuple[type[Any], Callable[[Any, Any, Any], Any]]] = {
    "/v1/runtime/get-nodes": (GetNodesRequest, runtime_handlers.get_nodes),
    "/v1/runtime/pull-messages": (PullAppMessagesRequest, runtime_handlers.pull_messages),
    "/v1/runtime/push-messages": (PushAppMessagesRequest, runtime_handlers.push_messages),
    "/v1/runtime/push-object": (PushObjectRequest, runtime_handlers.push_object),
    "/v1/runtime/pull-object": (PullObjectRequest, runtime_handlers.pull_object),
    "/v1/runtime/confirm-message-received": (
        ConfirmMessageReceivedRequest,
        runtime_handlers.confirm_message_received,
    ),
}


class FastLane:
    """Answers the frequent requests of a SuperLink application.

    **Guarantees:** nothing is handled whose sender Flower's ``authenticate_node`` or
    ``authenticate_task`` does not accept.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def takes(self, scope: Scope) -> bool:
        """Whether a request is one of the frequent ones."""
        return scope["method"] == "POST" and (scope["path"] in FLEET or scope["path"] in RUNTIME)

    def knows_sender(self, scope: Scope) -> bool:
        """Whether a registered node signed the time in the headers; asked before a long body.

        Flower checks it again, with the clock and the node's number, once the body is there.
        """
        request = Request({**scope, "app": self._app, "state": {}})
        try:
            key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            signature = b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
            signed = request.headers[TIMESTAMP_HEADER].encode("ascii")
            is_registered = get_linkstate(request).get_node_id_by_public_key(key) is not None
            return is_registered and verify_signature(bytes_to_public_key(key), signed, signature)
        except (KeyError, ValueError, TypeError):
            return False

    def answer(self, scope: Scope, body: bytes) -> list[Message] | None:
        """Return the response, or None if the request has to go the long way."""
        try:
            request = Request({**scope, "app": self._app, "state": {}})
            if request.headers.get("content-type") != PROTOBUF_MEDIA_TYPE:
                return None
            result = self._handle(request, str(scope["path"]), body)
        except Exception as error:  # the long way tells the client, and logs it
            log.debug("%s goes the long way: %s", scope["path"], type(error).__name__)
            return None
        content = result.SerializeToString()
        headers = [
            (b"content-length", str(len(content)).encode()),
            (b"content-type", PROTOBUF_MEDIA_TYPE.encode()),
        ]
        return [
            {"type": "http.response.start", "status": 200, "headers": headers},
            {"type": "http.response.body", "body": content},
        ]

    def _handle(self, request: Request, path: str, body: bytes) -> Any:
        state = get_linkstate(request)
        if path in FLEET:
            kind, handle_fleet = FLEET[path]
            request.state.protobuf_request = kind.FromString(body)
            authenticate_node(request)
            return handle_fleet(request.state.protobuf_request, state)
        kind, handle_runtime = RUNTIME[path]
        task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)
        return handle_runtime(kind.FromString(body), state, task)
