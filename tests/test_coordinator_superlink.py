"""The SuperLink's two listeners: who reaches what, and who is refused."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from hospitium_client.fleet import NotEnrolled
from hospitium_common.enrolment.public_keys import node_public_pem
from hospitium_server.control import SuperLinkControl, SuperLinkUnavailable
from hospitium_server.listeners import LARGEST_BODY, SMALL_BODY
from tests.coordinator_kit import RealSuperLink

PROTOBUF = {"content-type": "application/x-protobuf"}
SIGNED = ("flwr-public-key", "flwr-timestamp", "flwr-signature")


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    made = RealSuperLink(tmp_path_factory.mktemp("superlink"))
    yield made
    made.process.stop()


@pytest.fixture
def public(superlink):
    """A client that trusts the CA, as any hospital's would."""
    context = ssl.create_default_context(cadata=superlink.authority.decode())
    with httpx.Client(base_url=f"https://{superlink.address}", verify=context) as client:
        yield client


def test_the_public_listener_is_healthy(public):
    assert public.get("/health").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs", "/v1/control/register-node", "/v1/control/start-run",
        "/v1/runtime/acquire-task", "/v1/runtime/push-messages", "/v1/runtime/pull-object",
        "/v1/responses", "/docs", "/openapi.json", "/", "//v1/control/list-runs",
        "/v1/fleet/../control/list-runs", "/V1/CONTROL/list-runs", "/hospitium/arrivals",
        "/v1%2Fcontrol/list-runs", "/health/../v1/control/list-runs",
    ],
)  # fmt: skip
def test_the_public_listener_knows_nothing_but_fleet_and_health(superlink, public, path):
    token = superlink.process._order.control_token
    headers = {**PROTOBUF, "authorization": f"Bearer {token}"}
    body = ListRunsRequest().SerializeToString()
    assert public.post(path, content=body, headers=headers).status_code == 404
    assert public.get(path, headers=headers).status_code == 404


def test_the_public_listener_speaks_tls_1_3_only(superlink):
    context = ssl.create_default_context(cadata=superlink.authority.decode())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"https://{superlink.address}/health", verify=context)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{superlink.address}/health")


def test_a_body_that_is_too_long_or_does_not_say_how_long_it_is_is_refused(public):
    path = "/v1/fleet/push-object"
    assert public.post(path, headers=PROTOBUF, content=bytes(LARGEST_BODY + 1)).status_code == 413
    assert public.post(path, headers=PROTOBUF, content=iter([b"x"])).status_code == 411


def test_a_stranger_cannot_make_the_server_read_much(public):
    path, body = "/v1/fleet/push-object", bytes(SMALL_BODY + 1)
    assert public.post(path, headers=PROTOBUF, content=body).status_code == 401
    key = ec.generate_private_key(ec.SECP384R1())
    request = httpx.Request("POST", f"https://any{path}", headers=PROTOBUF)
    context = ProtobufRequestContext(rpc_method="", message=ListRunsRequest(), request=request)
    sign = NodeAuthHttpInterceptor(key, key.public_key()).intercept
    sign(context, lambda context: httpx.Response(200))
    signed = {name: request.headers[name] for name in (*PROTOBUF, *SIGNED)}
    assert public.post(path, headers=signed, content=body).status_code == 401


def test_control_needs_the_token_of_this_start(superlink):
    address = superlink.process.loopback_address
    for token in ("", "guess", superlink.process._order.control_token[:-1]):
        stranger = SuperLinkControl(address, token or "none", b"x" * 32)
        with pytest.raises(SuperLinkUnavailable, match="HTTP 401"):
            stranger.nodes()
        with pytest.raises(SuperLinkUnavailable, match="HTTP 401"):
            stranger.start_run("mine")
        stranger.close()
    assert superlink.control.nodes() == ()


def test_a_task_needs_the_executors_secret_and_a_run_its_token(superlink):
    run = superlink.control.start_run("a-study")
    client = RuntimeHttpClient.from_server_address(
        superlink.process.loopback_address, insecure=True, root_certificates=None, interceptors=[]
    )
    with pytest.raises(httpx.HTTPStatusError):
        client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
    with pytest.raises(httpx.HTTPStatusError):
        client.GetNodes(GetNodesRequest())
    task = superlink.control.claim_task()
    assert task is not None
    assert task.run_id == run
    assert superlink.control.claim_task() is None
    superlink.control.stop_run(run)
    assert superlink.control.unfinished_runs() == ()


def test_only_a_registered_node_gets_in_and_a_revoked_one_gets_out(superlink):
    key = ec.generate_private_key(ec.SECP384R1())
    fleet = superlink.fleet(key)
    with pytest.raises(NotEnrolled):
        fleet.go_online()
    superlink.control.register(node_public_pem(key.public_key()), "st-anna")
    fleet.go_online()
    (node,) = superlink.control.nodes()
    assert (node.name, node.online) == ("st-anna", True)
    superlink.control.unregister(node.node_id)
    with pytest.raises(NotEnrolled):
        fleet.heartbeat()
    assert superlink.control.nodes() == ()


def test_a_node_cannot_push_a_reply_in_anothers_name(superlink, public):
    request = PushMessagesRequest(
        node=Node(node_id=11), messages_list=[MessageProto(metadata=Metadata(src_node_id=12))]
    )
    refused = public.post(
        "/v1/fleet/push-messages", content=request.SerializeToString(), headers=PROTOBUF
    )
    assert refused.status_code == 403
    garbage = public.post("/v1/fleet/push-messages", content=b"\xff\xff", headers=PROTOBUF)
    assert garbage.status_code == 403


def test_the_loopback_listener_has_no_pages_for_people(superlink):
    for path in ("/docs", "/openapi.json", "/v1/responses"):
        url = f"http://{superlink.process.loopback_address}{path}"
        assert httpx.get(url).status_code == 404


def test_no_secret_is_on_the_command_line_or_on_disk(superlink):
    order = superlink.process._order
    secrets = (order.control_token.encode(), order.executor_secret.encode())
    words = Path(f"/proc/{superlink.process.pid}/cmdline").read_bytes()
    files = [path for path in superlink.place.directory.rglob("*") if path.is_file()]
    for secret in secrets:
        assert secret not in words
        assert not any(secret in path.read_bytes() for path in files)
