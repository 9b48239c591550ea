"""A stranger with the CA certificate, and an enrolled hospital that lies, against a coordinator.

Everything runs as installed: `hospitium coordinator serve`, three honest hospitals with
`hospitium site run`. Only the fourth hospital is not what it should be.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata as MetadataProto
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from safetensors.numpy import load_file

from hospitium_client.fleet import Fleet, NotEnrolled
from hospitium_client.settings import SiteHome
from hospitium_common.codec import Reader
from hospitium_common.envelope import Answer, Request, open_request, seal_answer
from hospitium_common.messages import Masked, MaskRequest, Message, Purpose, Task, decode
from hospitium_common.schedule import NUMBERS_PER_STAGE, STATISTICS_STAGE
from hospitium_common.secagg.hashing import Label, payload_digest, sign
from hospitium_server.settings import CoordinatorHome
from hospitium_server.studies import ENDED, State, Status, StudyFolder
from hospitium_server.superlink import SuperLinkOrder, application
from hospitium_simulations.local_federation import LocalFederation
from tests.deployment_kit import log_of, wait_until
from tests.harm_kit import child_of, found, private_keys, private_study, what_patients_have
from tests.rogue_kit import RogueHospital

TITLES = ("St. Anna", "Mercy", "Lakeside", "Rogue Clinic")
HONEST, ROGUE = ("st-anna", "mercy", "lakeside"), "rogue-clinic"
ORDER = SuperLinkOrder(
    database=":memory:", certificate="", private_key="", public_socket=0, loopback_socket=0,
    control_token="",  executor_secret="00" * 32,
)  # fmt: skip


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    with found(tmp_path_factory.mktemp("attacked") / "federation", TITLES) as made:
        made.serve()
        yield made


def public(federation: LocalFederation) -> str:
    return f"https://127.0.0.1:{CoordinatorHome(federation.home).settings().network.port}"


def local(federation: LocalFederation) -> str:
    return f"http://127.0.0.1:{CoordinatorHome(federation.home).settings().network.local_port}"


def trusting(federation: LocalFederation) -> ssl.SSLContext:
    """What a stranger has: the CA certificate, which is no secret."""
    return ssl.create_default_context(cafile=SiteHome(home_of(federation)).ca)


def home_of(federation: LocalFederation, name: str = ROGUE) -> Path:
    return federation.hospitals[name].home


@pytest.fixture(scope="module")
def paths() -> list[str]:
    """Every path of this version of Flower's server."""
    return sorted(application(ORDER).openapi()["paths"])


# The log names at most sixty refusals a minute, so whatever is looked up there comes first.


def test_who_was_refused_and_why_is_in_the_log(federation: LocalFederation) -> None:
    with httpx.Client(verify=trusting(federation), timeout=60) as stranger:
        assert stranger.post(f"{public(federation)}/v1/control/start-run").status_code == 404
    refused = r"refused POST '/v1/control/start-run' from 127\.0\.0\.1:\d+: 404"
    assert re.search(refused, log_of(federation, "coordinator"))


# --- an enrolled hospital that is a rogue --------------------------------------------------------


def line_to(federation: LocalFederation, key: ec.EllipticCurvePrivateKey) -> Fleet:
    home = SiteHome(home_of(federation))
    return Fleet(home.settings().coordinator.address, home.ca.read_bytes(), key, None)


def test_an_enrolled_hospital_can_neither_control_nor_register_nor_start_a_run(
    federation: LocalFederation,
) -> None:
    with RogueHospital(home_of(federation), lambda request, answer: answer) as rogue:
        wait_until(lambda: rogue.fleet.is_online, "the rogue's node online")
        client = rogue.fleet._client  # its own key signs every call
        url = public(federation)
        fab, _ = build_fab_from_files({
            "pyproject.toml": b'[project]\nname = "theirs"\nversion = "1.0.0"\n'
            b'[tool.flwr.app]\npublisher = "rogue"\n[tool.flwr.app.components]\n'
            b'serverapp = "theirs:app"\nclientapp = "theirs:app"\n',
            "theirs.py": b"raise SystemExit('their code ran')\n",
        })  # fmt: skip
        start = StartRunRequest(fab=Fab(content=fab)).SerializeToString()
        _, stranger = generate_key_pairs()
        register = RegisterNodeRequest(public_key=public_key_to_bytes(stranger))
        headers = {"content-type": "application/protobuf"}
        with httpx.Client(verify=trusting(federation), headers=headers, timeout=60) as plain:
            for body, path in (
                (start, "/v1/control/start-run"),
                (register.SerializeToString(), "/v1/control/register-node"),
                (b"", "/v1/runtime/acquire-task"),
            ):
                assert plain.post(url + path, content=body).status_code == 404
                assert plain.post(local(federation) + path, content=body).status_code in (401, 403)
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public_key_to_bytes(stranger)))
        assert 400 <= refused.value.response.status_code < 500
        with pytest.raises(NotEnrolled):
            line_to(federation, ec.generate_private_key(ec.SECP384R1())).go_online()
    log = log_of(federation, "coordinator")
    assert "their code ran" not in log
    assert "refused POST '/v1/fleet/register-node' from 127.0.0.1" in log


def test_an_answer_in_another_hospitals_name_is_not_taken(federation: LocalFederation) -> None:
    federation.open("mercy")
    number = home_of(federation, "mercy") / "run" / "node.id"
    wait_until(number.exists, "mercy's node online")
    other = int(number.read_text())
    with RogueHospital(home_of(federation), lambda request, answer: answer) as rogue:
        wait_until(lambda: rogue.fleet.is_online, "the rogue's node online")
        assert rogue.fleet.node_id != other
        for sender, claimed in ((rogue.fleet.node_id, other), (other, other)):
            said = MetadataProto(run_id=1, src_node_id=claimed, dst_node_id=1, message_id="0" * 64)
            request = PushMessagesRequest(
                node=Node(node_id=sender), messages_list=[MessageProto(metadata=said)]
            )
            with pytest.raises(httpx.HTTPStatusError) as refused:
                rogue.fleet._client.PushMessages(request)
            assert refused.value.response.status_code in (401, 403)
    assert "refused POST '/v1/fleet/push-messages' from 127.0.0.1" in log_of(
        federation, "coordinator"
    )


# --- a stranger ----------------------------------------------------------------------------------


def test_a_stranger_finds_the_fleet_api_and_nothing_else(
    federation: LocalFederation, paths: list[str]
) -> None:
    with httpx.Client(
        base_url=public(federation), verify=trusting(federation), timeout=60
    ) as stranger:
        assert stranger.get("/health").status_code == 200
        hidden = [path for path in paths if not path.startswith(("/v1/fleet/", "/health"))]
        assert len(hidden) > 50
        for path in [*hidden, "/docs", "/openapi.json", "/", "/v1/fleet/../control/start-run",
                     "//v1/control/start-run", "/v1/fleet/%2e%2e/control/start-run"]:  # fmt: skip
            assert stranger.post(path).status_code in (404, 405), path


def test_a_stranger_without_an_enrolled_key_gets_nothing_from_the_fleet_api(
    federation: LocalFederation, paths: list[str]
) -> None:
    fleet = [path for path in paths if path.startswith("/v1/fleet/")]
    assert len(fleet) > 8
    headers = {"content-type": "application/protobuf"}
    with httpx.Client(
        base_url=public(federation), verify=trusting(federation), timeout=60
    ) as stranger:
        for path in fleet:
            assert 400 <= stranger.post(path, headers=headers).status_code < 500, path
    own = line_to(federation, ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(NotEnrolled):
        own.go_online()


def test_the_control_listener_wants_its_token_even_on_the_coordinators_machine(
    federation: LocalFederation, paths: list[str]
) -> None:
    headers = {"content-type": "application/protobuf", "authorization": "Bearer guessed"}
    with httpx.Client(base_url=local(federation), timeout=60) as insider:
        for path in paths:
            if path != "/health":
                answer = insider.post(path, headers=headers)
                # Asked for a token, it says nothing at all.
                nothing = answer.status_code == 200 and answer.content == b""
                is_login = path in ("/v1/control/get-auth-tokens", "/v1/control/get-login-details")
                assert 400 <= answer.status_code < 500 or (is_login and nothing), path
    with socket.socket() as elsewhere:
        elsewhere.settimeout(5)
        port = int(local(federation).rpartition(":")[2])
        # Not reachable by any other address of this machine, such as another in 127.0.0.0/8.
        assert elsewhere.connect_ex(("127.0.0.2", port)) != 0


def test_an_endless_body_does_not_fill_the_memory(federation: LocalFederation) -> None:
    assert federation.coordinator_process is not None
    pid = child_of(federation.coordinator_process.pid, "hospitium_server.superlink")
    server = psutil.Process(pid)
    before = server.memory_info().rss
    host, port = public(federation).removeprefix("https://").split(":")
    piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    for path in ("GET /health", "GET /v1/fleet/pull-messages", "POST /v1/fleet/pull-messages"):
        raw = socket.create_connection((host, int(port)), timeout=60)
        with trusting(federation).wrap_socket(raw, server_hostname=host) as stranger:
            head = f"{path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            stranger.sendall(head.encode())
            with contextlib.suppress(OSError):  # it may hang up on us
                for _ in range(100):
                    stranger.sendall(piece)
        assert server.memory_info().rss - before < 50 << 20, path


def test_old_tls_and_plain_http_are_refused(federation: LocalFederation) -> None:
    context = trusting(federation)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{public(federation)}/health", verify=context)
    with pytest.raises(httpx.TransportError):
        httpx.get(public(federation).replace("https", "http") + "/health")


# --- an enrolled hospital that lies in a study ---------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lie:
    """In answer to the first request of this kind in a round, ``change`` is sent instead."""

    asked: type[Message]
    change: Callable[[bytes, Request, bytes], bytes]
    reason: str
    """What the coordinator's log has to say about site 4."""


def as_answer(site: int, payload: bytes, request: Request, rogue: RogueHospital) -> bytes:
    return seal_answer(Answer(site=site, payload=payload), request.digest, rogue.keys.sign)


def resigned(answer: Masked, body: bytes, rogue: RogueHospital) -> bytes:
    """A masked vector that the rogue replaced and signed: its own, as far as anybody can tell."""
    digest = payload_digest(Label.PAYLOAD, body, bytes(answer.tail))
    signed = (answer.context, answer.cohort, answer.site, digest)
    signature = sign(rogue.keys.sign, Label.MASKED, *signed)
    return replace(answer, body=body, digest=digest, signature=signature).encode()


def nan(length: int) -> bytes:
    return np.full(length // 4 + 1, np.nan, np.float32).tobytes()[:length]


class Liar:
    """Tells one lie a round, and the truth otherwise."""

    def __init__(self) -> None:
        self.rogue: RogueHospital | None = None
        self.round, self.told = 0, dict[str, int]()
        self._last = b""
        self.lies = {
            "garbage": Lie(
                asked=Task, change=lambda *_: b"garbage", reason="its answer is refused: expected",
            ),
            "sealed garbage": Lie(
                asked=MaskRequest,
                change=lambda _, asked, __: as_answer(4, b"garbage", asked, self.rogue),
                reason="",
            ),
            "wrong length": Lie(
                asked=MaskRequest, change=self._wrong_length,
                reason="ring elements in 116 bytes, got 114",
            ),
            "old answer": Lie(
                asked=Task, change=lambda _, __, before: before,
                reason="expected an answer that site 4 signed for this request",
            ),
            "another name": Lie(
                asked=Task,
                change=lambda answer, asked, _: as_answer(
                    1, bytes(open_payload(answer)), asked, self.rogue
                ),
                reason="expected an answer that site 1 signed for this request",
            ),
            "NaN": Lie(asked=MaskRequest, change=self._nan, reason=""),
        }  # fmt: skip

    def _wrong_length(self, answer: bytes, asked: Request, _: bytes) -> bytes:
        masked = decode(open_payload(answer))
        short = resigned(masked, bytes(masked.body)[:-2], self.rogue)
        return as_answer(4, short, asked, self.rogue)

    def _nan(self, answer: bytes, asked: Request, _: bytes) -> bytes:
        masked = decode(open_payload(answer))
        return as_answer(4, resigned(masked, nan(len(masked.body)), self.rogue), asked, self.rogue)

    def __call__(self, data: bytes, answer: bytes) -> bytes:
        request = open_request(data, self.rogue.coordinator)
        message, before = decode(request.payload), self._last
        self._last = answer
        if isinstance(message, Task):
            self.round = message.round // NUMBERS_PER_STAGE - STATISTICS_STAGE
            if message.purpose is not Purpose.TRAIN:
                self.round = 0
        if self.round == 0 or self.round in self.told.values() or not answer:
            return answer
        for name, lie in self.lies.items():
            if name not in self.told:
                if not isinstance(message, lie.asked):
                    return answer
                self.told[name] = self.round
                return lie.change(answer, request, before)
        return answer


def open_payload(answer: bytes) -> bytes | memoryview:
    reader = Reader(answer)
    reader.integer()
    reader.bytes(64)
    return reader.part()


MOST_ROUNDS = 40


@pytest.fixture(scope="module")
def lied_to(federation: LocalFederation) -> Iterator[tuple[Liar, Status]]:
    """A study in which the rogue told every lie, and how it stands at the end."""
    for name in HONEST:
        if federation.hospitals[name].process is None:
            federation.open(name)
    study = private_study(federation.directory, "lied-to", rounds=MOST_ROUNDS)
    study.write_text(study.read_text() + "[robustness]\nupdate_norm = 0.5\nmost_rejected = 30\n")
    liar = Liar()
    with RogueHospital(home_of(federation), liar) as rogue:
        liar.rogue = rogue
        federation.begin(study, dict.fromkeys((*HONEST, ROGUE), "data"))
        folder = StudyFolder(federation.home / "studies" / "lied-to")
        wait_until(
            lambda: len(liar.told) == len(liar.lies)
            and folder.status().round > liar.told["NaN"] + 1,
            "every lie told, and a round after the last", 400,
        )  # fmt: skip
        federation.run("study", "stop", "lied-to", "--home", federation.home)
        wait_until(lambda: folder.status().state in ENDED, "the study's end")
        yield liar, folder.status()


def test_every_round_is_finished_by_the_honest_hospitals(lied_to: tuple[Liar, Status]) -> None:
    liar, status = lied_to
    assert status.state is State.STOPPED, status.reason
    assert set(liar.told) == set(liar.lies)
    assert [one.round for one in status.rounds] == list(range(1, len(status.rounds) + 1))
    assert all({1, 2, 3} <= set(one.sites) for one in status.rounds)


@pytest.mark.parametrize(
    "lie", ["garbage", "sealed garbage", "wrong length", "old answer", "another name"]
)
def test_a_lie_costs_the_liar_the_round_and_nobody_else(
    lied_to: tuple[Liar, Status], federation: LocalFederation, lie: str
) -> None:
    liar, status = lied_to
    told = next(one for one in status.rounds if one.round == liar.told[lie])
    assert told.sites == (1, 2, 3)
    assert 4 in told.missing
    # Who, and why.
    assert re.search(rf"site 4: .*{liar.lies[lie].reason}", log_of(federation, "coordinator"))


def test_a_vector_of_nan_does_not_reach_the_model(
    lied_to: tuple[Liar, Status], federation: LocalFederation
) -> None:
    liar, status = lied_to
    told = next(one for one in status.rounds if one.round == liar.told["NaN"])
    # Nobody can see that one summand of a masked sum is nonsense; that the sum is, one can.
    assert told.rejected
    versions = list((federation.home / "studies" / "lied-to").glob("version-*.safetensors"))
    assert len(versions) > len(liar.lies)
    for file in versions:
        assert all(np.isfinite(tensor).all() for tensor in load_file(file).values())


def test_nothing_of_a_patient_or_a_key_is_in_any_log_or_at_the_coordinator(
    lied_to: tuple[Liar, Status], federation: LocalFederation
) -> None:
    files = [*federation.directory.glob("*.log"), *federation.home.rglob("*")]
    kept = [file.read_bytes() for file in files if file.is_file()]
    assert len(kept) > 20
    for secret in what_patients_have(federation) | private_keys(federation):
        assert not any(secret in data for data in kept)
