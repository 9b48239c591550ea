"""One run's messages at the SuperLink: put in, looked for, taken out; with our own patience.

Flower's own Grid waits a second for every part of a message that is not there yet, and for up to
two hours for one whose sender dawdles; a round cannot. What is used of Flower: the Runtime API's
client, and how messages are cut into objects.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from hospitium_common.errors import HospitiumError, PeerProtocolError
from hospitium_common.flower_record import MESSAGE_TYPE, payload_of
from hospitium_server.paths import ARRIVALS, POSTED

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from typing import TypeVar

    from flwr.app import Error, RecordDict
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.inflatable.inflatable_object import InflatableObject
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor

    T = TypeVar("T")

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
OUTAGE_S = 180.0
"""For how long a SuperLink may be away before the study gives up; it goes on in a new run."""
HALF_S, STALL_S = 180.0, 20.0
"""For how long an answer may be announced and not there, and there but for a part."""
MANY_PARTS = 16
LONGEST_REASON = 80
WHOLE_S = 120.0
"""How long the parts of one message may take: other sites' answers wait meanwhile."""
MOST_PARTS = 1000
"""Of 5 MiB each: more than any update has, and not enough to fill a disk."""
PART_PAUSE_S = 0.05
RETRY_S = (0.1, 0.2, 0.5, 1.0)
OUTAGE_STATUS = (502, 503, 504)


class RunEnded(HospitiumError):  # noqa: N818 - named after what happened, as in the error tree
    """The SuperLink no longer takes this process for the run's: it was stopped, or is too late."""


@dataclass(frozen=True, kw_only=True)
class Letter:
    """What came back for a message: bytes, or the reason why there are none."""

    payload: bytes = b""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class _Half:
    """An answer whose parts may still be on their way."""

    tree: ObjectTree
    since: float


class Mailbox:
    """The messages of one run; used by the one process that holds the run's token."""

    def __init__(self, address: str, token: str) -> None:
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
            RuntimeTokenHttpInterceptor(token=token),
        ]
        self._client, self._pulse = (
            RuntimeHttpClient.from_server_address(
                address, insecure=True, root_certificates=None, interceptors=interceptors
            )
            for _ in range(2)
        )
        self._address, self._plain = address, httpx.Client(timeout=30)
        self._arrivals = 0
        self._node = NodeProto(node_id=SUPERLINK_NODE_ID)
        self._halves: dict[str, Letter | _Half] = {}
        self._closed = threading.Event()
        self.run_id = 0

    def open(self) -> str:
        """Take the run over, and keep it alive from now on; return its study.

        Raises:
            RunEnded: the run is not waiting for anybody.
            HospitiumError: the SuperLink does not answer.
        """
        response = _patiently(lambda: self._client.PullTaskInput(PullTaskInputRequest()))
        self.run_id = int(response.run.run_id)
        # Flower's messages take their sender from here.
        TaskIdentity.task_id, TaskIdentity.run_id = response.task_id, self.run_id
        TaskIdentity.node_id = response.context.node_id
        threading.Thread(target=self._keep_alive, daemon=True, name="heartbeat").start()
        return str(response.run.override_config["study"].string)

    def close(self, outcome: str, details: str) -> None:
        """Say how the run ended (``completed``, ``failed`` or ``stopped``) and leave."""
        self._closed.set()
        try:
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=details))
        except httpx.HTTPError as error:
            log.info("left without saying how it ended: %s", type(error).__name__)
        for client in (self._client, self._pulse, self._plain):
            client.close()

    def online(self) -> dict[bytes, int]:
        """Return the nodes that are online: public key (PEM) -> node id."""
        response = _patiently(lambda: self._client.GetNodes(GetNodesRequest()))
        return {node.public_key: node.node_id for node in response.nodes}

    def post(self, content: RecordDict, nodes: Sequence[int], ttl_s: float) -> list[str | None]:
        """Send one record to several nodes; return each message's id, None where it was refused.

        Parts that are the same for several nodes are sent, and kept, once.
        """
        messages = [Message(content, node, MESSAGE_TYPE, ttl=ttl_s) for node in nodes]
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
                message_object_trees=[get_object_tree(message) for message in messages],
            )
            parts: dict[str, InflatableObject] = {}
            for message in messages:
                parts |= get_all_nested_objects(message)
            response = _patiently(lambda: self._client.PushMessages(request))
            push = make_push_object_fn_protobuf(
                lambda part: _patiently(lambda: self._client.PushObject(part)),
                self._node, self.run_id, response.session_id,
            )  # fmt: skip
            if len(parts) > MANY_PARTS:
                self._ring()  # sites fetch the first parts while the last ones are on their way
            try:
                push_objects(parts, push, object_ids_to_push=set(response.objects_to_push))
            except ObjectPushError as error:
                raise HospitiumError("SuperLink: expected to take a whole message") from error
        self._ring()
        return [name or None for name in response.message_ids]

    def arrived(self, message_ids: Collection[str]) -> Iterator[tuple[str, Letter]]:
        """Yield (message id, what came back) of those messages whose answers are there.

        Answers are fetched one by one: only one is held at a time, the one that was yielded last.
        """
        self._look(set(message_ids) - self._halves.keys())
        for message_id in [name for name in self._halves if name in message_ids]:
            half = self._halves[message_id]
            if isinstance(half, Letter):
                del self._halves[message_id]
                yield message_id, half
                continue
            # A message's root is sent last: with it, all the rest is there or about to be.
            root, is_known = self._part(half.tree.object_id)
            if root is None and is_known and time.monotonic() - half.since < HALF_S:
                continue
            del self._halves[message_id]
            yield message_id, self._collect(half.tree, root)

    def wait(self) -> None:
        """Wait until another answer arrived, or a moment."""
        url = f"http://{self._address}{ARRIVALS}?{self._arrivals}"
        with suppress(httpx.HTTPError, ValueError):
            self._arrivals = int(self._plain.get(url).raise_for_status().text)
            return
        time.sleep(RETRY_S[1])  # the SuperLink is away

    def _look(self, message_ids: Collection[str]) -> None:
        """Ask which answers there are, without their content."""
        if not message_ids:
            return
        request = PullAppMessagesRequest(message_ids=sorted(message_ids))
        response = _patiently(lambda: self._client.PullMessages(request))
        for proto, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            reply = message_from_proto(proto)
            name = reply.metadata.reply_to_message_id
            if reply.has_error():
                self._halves[name] = Letter(error=_reason(reply.error))
            else:
                self._halves[name] = _Half(tree=tree, since=time.monotonic())

    def _ring(self) -> None:
        """Wake up nodes that wait for a message; those that it misses ask by themselves."""
        with suppress(httpx.HTTPError):
            self._plain.get(f"http://{self._address}{POSTED}")

    def forget(self, message_ids: Collection[str]) -> None:
        """Stop waiting for answers to these messages."""
        for message_id in message_ids:
            self._halves.pop(message_id, None)

    def _collect(self, tree: ObjectTree, root: bytes | None) -> Letter:
        """Fetch every part of a message, confirm it, and take the bytes out."""
        contents: dict[str, bytes] = {}
        if root is None:
            return Letter(error="its answer was never sent whole")
        contents[tree.object_id] = root
        begun = progress = time.monotonic()
        for count, node in enumerate(iterate_object_tree(tree)):
            if count >= MOST_PARTS:
                return Letter(error="its answer has more parts than any could")
            while node.object_id not in contents:
                part, known = self._part(node.object_id)
                if part is not None:
                    contents[node.object_id], progress = part, time.monotonic()
                elif (
                    not known
                    or time.monotonic() - progress > STALL_S
                    or time.monotonic() - begun > WHOLE_S
                ):
                    return Letter(error="its answer was never sent whole")
                else:
                    time.sleep(PART_PAUSE_S)
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self.run_id, message_object_id=tree.object_id
        )
        _patiently(lambda: self._client.ConfirmMessageReceived(request))
        try:
            message = inflate_object_from_contents(tree.object_id, contents)
            if not isinstance(message, Message):
                raise TypeError("another object")
            return Letter(payload=payload_of(message.content))
        except (ValueError, TypeError, KeyError, PeerProtocolError):
            return Letter(error="its answer is no message of ours")

    def _part(self, object_id: str) -> tuple[bytes | None, bool]:
        """Return a part, if it is there, and whether it is expected at all."""
        request = PullObjectRequest(node=self._node, run_id=self.run_id, object_id=object_id)
        response = _patiently(lambda: self._client.PullObject(request))
        return (response.object_content if response.object_available else None), (
            response.object_found
        )

    def _keep_alive(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self._pulse.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except httpx.HTTPError as error:
                log.info("no heartbeat: %s", type(error).__name__)


def _reason(error: Error) -> str:
    """Say why there is no answer, in our words where Flower has it from its own books."""
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return "its node's heartbeat stopped"
    if error.code in (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE):
        return "no answer before the deadline"
    return f"its node reports: {(error.reason or '')[:LONGEST_REASON]!r}"


def _patiently(call: Callable[[], T]) -> T:
    """Call the SuperLink, and wait for it when it is away.

    Raises:
        RunEnded: it says that this run is over, or stayed away.
        HospitiumError: it refuses.
    """
    until, tries = time.monotonic() + OUTAGE_S, 0
    while True:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            if code in (401, 403):
                raise RunEnded("expected the run to go on, the SuperLink ended it") from error
            if code not in OUTAGE_STATUS:
                raise HospitiumError(
                    f"SuperLink: expected it to do as asked, got HTTP {code} for "
                    f"{error.request.url.path}"
                ) from error
        except httpx.TransportError as error:
            if tries == 0:
                log.info("the SuperLink is away: %s; trying again", type(error).__name__)
        if time.monotonic() > until:
            raise RunEnded(f"SuperLink: expected it back within {OUTAGE_S:.0f} s, it is not")
        time.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
        tries += 1
