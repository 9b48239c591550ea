"""The node's line to the coordinator: Flower's Fleet API over TLS, with our own patience.

Flower's own loop (`http_request_response`) ends the process when activation fails, swallows what
goes wrong inside, and stops its heartbeat for good at the first refusal; a hospital's node has to
come back from all three. What is used of Flower: the client class, node authentication, and how
messages are cut into objects.
"""

from __future__ import annotations

import logging
import re
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import HospitiumError, PeerProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

log = logging.getLogger(__name__)

HEARTBEAT_S = 20.0
OBJECT_ID = re.compile(r"[0-9a-f]{64}")
"""The coordinator takes a node for gone after two of these without a word."""
OBJECT_BACKOFF_S = 0.1


class Unreachable(HospitiumError):  # noqa: N818 - named after what happened, as in the error tree
    """The coordinator did not answer, or not usefully; worth trying again."""


class NotEnrolled(HospitiumError):  # noqa: N818 - named after what happened, as in the error tree
    """The coordinator does not accept this node's key (now)."""


class RunOver(HospitiumError):  # noqa: N818 - named after what happened, as in the error tree
    """The run that a message belongs to has ended; nobody waits for the answer."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A message that was handed to this node, before its content is fetched.

    The coordinator hands a message out once. Its content can be fetched until the node confirms,
    which it does only after the answer is there; so a node that keeps the ``Delivery`` can start
    over after a crash.
    """

    message: Message
    tree: ObjectTree
    received_at_ms: int

    @property
    def id(self) -> str:
        """The message's id, a SHA-256 in hexadecimal."""
        return str(self.tree.object_id)

    def encode(self) -> bytes:
        """Return the delivery as bytes: names and times, no content."""
        proto = message_to_proto(self.message).SerializeToString()
        return encode_parts(self.received_at_ms, proto, self.tree.SerializeToString())

    @classmethod
    def decode(cls, data: bytes) -> Delivery:
        """Read what ``encode`` wrote."""
        reader = Reader(data)
        received_at_ms, message, tree = reader.integer(), reader.bytes(), reader.bytes()
        reader.finish()
        try:
            return cls(
                message=message_from_proto(MessageProto.FromString(message)),
                tree=ObjectTree.FromString(tree),
                received_at_ms=received_at_ms,
            )
        except DecodeError as error:
            raise PeerProtocolError("expected a message under way, got something else") from error


class Fleet:
    """One site's line to one coordinator; safe to use from several threads.

    ``node_id`` is the number that the coordinator gave this node at an earlier start. With it a
    node that was killed is back at once; without it the coordinator refuses it (HTTP 412) until
    the old heartbeat has run out.
    """

    def __init__(
        self, address: str, authority: bytes, key: EllipticCurvePrivateKey, node_id: int | None
    ) -> None:
        self.node_id, self.is_online = node_id, False
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            address, False, authority,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )  # fmt: skip

    def go_online(self) -> None:
        """Log in, and set ``node_id``.

        Raises:
            NotEnrolled: the coordinator does not know the key, or it takes this node for online.
            Unreachable: no useful answer.
        """
        if self.node_id is not None:
            try:
                self.heartbeat()
                return
            except NotEnrolled:
                self.node_id = None
        with _translated():
            response = self._client.ActivateNode(
                ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_S)
            )
        self.node_id, self.is_online = response.node_id, True

    def heartbeat(self) -> None:
        """Say that this node is there."""
        with _translated():
            response = self._client.SendNodeHeartbeat(
                SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
            )
        self.is_online = bool(response.success)
        if not response.success:
            raise NotEnrolled("the coordinator no longer knows this node")

    def receive(self, now_ms: int) -> Delivery | None:
        """Ask for the next message; ``now_ms`` are milliseconds since 1970."""
        with _translated():
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        tree = next(iter(response.message_object_trees), ObjectTree())
        # It becomes a file's name here, and a server is not to choose where that file lies.
        if not OBJECT_ID.fullmatch(tree.object_id):
            raise Unreachable("the coordinator: expected a message with its parts, got another")
        with _translated():
            message = message_from_proto(response.messages_list[0])
        return Delivery(message=message, tree=tree, received_at_ms=now_ms)

    def fetch(self, delivery: Delivery) -> Message:
        """Fetch a message's content.

        Raises:
            RunOver: it is no longer there.
        """
        pull = make_pull_object_fn_protobuf(
            self._client.PullObject, self._node, delivery.message.metadata.run_id
        )
        wanted = [tree.object_id for tree in iterate_object_tree(delivery.tree)]
        with _translated():
            contents = pull_objects(wanted, pull, initial_backoff=OBJECT_BACKOFF_S)
        message = inflate_object_from_contents(delivery.id, contents)
        if not isinstance(message, Message):
            raise PeerProtocolError("expected a message of the coordinator, got something else", 0)
        message.metadata.__dict__["_message_id"] = delivery.id  # as Flower's own node sets it
        return message

    def answer(self, delivery: Delivery, reply: Message, runtime_s: float) -> None:
        """Send a reply, then let the coordinator forget the message's content.

        The same reply may be sent again: the coordinator asks for the parts that it lacks.
        """
        run_id = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with _translated(), no_object_id_recompute():
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[runtime_s],
                )
            )
            push = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, run_id, response.session_id
            )
            wanted = set(response.objects_to_push)
            push_objects(get_all_nested_objects(reply), push, object_ids_to_push=wanted)
            make_confirm_message_received_fn_protobuf(
                self._client.ConfirmMessageReceived, self._node, run_id
            )(delivery.id)

    def close(self) -> None:
        """Say goodbye, so that the coordinator need not wait for a heartbeat."""
        if self.node_id is not None and self.is_online:
            try:
                with _translated():
                    self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))
            except HospitiumError as error:
                log.info("left without saying goodbye: %s", error)
        self.is_online = False
        self._client.close()

    @property
    def _node(self) -> NodeProto:
        if self.node_id is None:
            raise NotEnrolled("expected to be logged in at the coordinator, this node is not")
        return NodeProto(node_id=self.node_id)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what httpx and Flower raise into the three things that a node can do something about."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _refusal(error.response.status_code) from error
    except httpx.TransportError as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(_cause(error), ssl.SSLCertVerificationError):
            reason += " (its certificate is not one of the pinned CA, or not for this address)"
        raise Unreachable(f"expected the coordinator to answer, got {reason}") from error
    except ObjectPullError as error:
        raise RunOver("the message is no longer at the coordinator") from error
    except (ObjectPushError, ValueError) as error:
        raise Unreachable(f"expected a transfer to complete, got {type(error).__name__}") from error


def _refusal(status: int) -> HospitiumError:
    if status == httpx.codes.UNAUTHORIZED:
        return NotEnrolled(
            "the coordinator does not accept this node's key: this site was revoked, or not yet "
            "enrolled there, or one of the two clocks is wrong: this one may be 5 s ahead or "
            "5 min behind, not more"
        )
    if status == httpx.codes.PRECONDITION_FAILED:
        return NotEnrolled(
            "the coordinator takes this node for online already (it was killed a moment ago, or "
            "runs twice), or does not know it"
        )
    if status == httpx.codes.FORBIDDEN:
        return RunOver("the run of this message has ended")
    return Unreachable(f"expected the coordinator to answer, got HTTP {status}")


def _cause(error: BaseException) -> BaseException | None:
    """Return the first error of the chain."""
    found: BaseException | None = error
    while found is not None and (found.__cause__ or found.__context__) is not None:
        found = found.__cause__ or found.__context__
    return found
