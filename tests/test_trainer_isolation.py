"""The trainer as its unit and its container run it: no network at all, and it works.

The real process runs in an empty network namespace (``PrivateNetwork=``, ``network_mode: none``)
and may open sockets of no other family than Unix (``RestrictAddressFamilies=AF_UNIX``).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hospitium_client.trainer_service import TrainerClient
from hospitium_common.envelope import Request, open_answer, seal_request
from hospitium_common.federation import FederationRoster
from hospitium_common.messages import Standing, StudyOffer, StudyState, decode
from hospitium_common.study import load_study
from hospitium_common.study.signature import sign_study, signature_path
from hospitium_server.keys import load_key
from hospitium_server.settings import CoordinatorHome
from tests.deployment_kit import wait_until
from tests.harm_kit import found, private_study

APART = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
# seccomp's classic BPF (x86-64): socket() and socketpair() for AF_UNIX, EAFNOSUPPORT for the rest.
UNIX_SOCKETS_ONLY = """\
import ctypes, os, struct, sys
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
SYSTEM_CALL, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, REFUSE, END = 0x7FFF0000, 0x00050000 | 97, 0x80000000
program = [
    (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, 0xC000003E), (RETURN, 0, 0, END),
    (LOAD, 0, 0, SYSTEM_CALL), (EQUAL, 2, 0, 41), (EQUAL, 1, 0, 53), (RETURN, 0, 0, ALLOW),
    (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 0, 1, 1), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
whole = Program(len(program), ctypes.addressof(code))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.byref(whole), 0, 0):
    sys.exit(f"no filter: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[1], sys.argv[1:])
"""
PROBE = """\
import json, socket, sys
found = {"interfaces": {name: open(f"/sys/class/net/{name}/operstate").read().strip()
                        for _, name in socket.if_nameindex()}}
for address in json.loads(sys.argv[1]):
    try:
        socket.create_connection(tuple(address), timeout=5).close()
    except OSError as error:
        found[address[0]] = error.strerror or type(error).__name__
    else:
        found[address[0]] = "connected"
print(json.dumps(found))
"""


def may_unshare() -> bool:
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter"))
    return (
        tools and subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0
    )


pytestmark = [
    pytest.mark.skipif(not may_unshare(), reason="network namespaces cannot be made here"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter is one for x86-64"),
]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A trainer in its cell, and the coordinator's home to send it something."""

    process: subprocess.Popen[bytes]
    client: TrainerClient
    coordinator: CoordinatorHome
    site: Path
    directory: Path


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    directory = tmp_path_factory.mktemp("cell")
    federation = found(directory / "federation", ("St. Anna",))
    site = federation.hospitals["st-anna"].home
    launcher = directory / "unix_sockets_only.py"
    launcher.write_text(UNIX_SOCKETS_ONLY)
    trainer = [sys.executable, "-m", "hospitium_common", "site", "trainer", "--home", str(site)]
    with (directory / "trainer.log").open("wb") as log:
        process = subprocess.Popen(
            [*APART, sys.executable, str(launcher), *trainer],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    client = TrainerClient(site / "run" / "trainer.sock")
    try:
        wait_until(lambda: client.is_serving() or process.poll() is not None, "an answer")
        assert process.poll() is None, (directory / "trainer.log").read_text()
        yield Cell(
            process=process, client=client, directory=directory, site=site,
            coordinator=CoordinatorHome(federation.home),
        )  # fmt: skip
    finally:
        client.close()
        process.terminate()
        process.wait(20)


def probe(addresses: list[tuple[str, int]], *around: str) -> dict[str, object]:
    """Look around and try to connect; ``around`` is put before the command."""
    command = [*around, sys.executable, "-c", textwrap.dedent(PROBE), json.dumps(addresses)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_trainer_has_no_interface_that_is_up_and_reaches_no_address(cell: Cell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
        # 192.0.2.1 is nobody's (RFC 5737); from in there it cannot be reached, whoever has it.
        elsewhere = [("127.0.0.1", port), ("::1", port), ("192.0.2.1", 443)]
        inside = ["nsenter", "--target", str(cell.process.pid), "--net", "--"]
        # /sys shows the namespace in which it was mounted.
        inside += ["unshare", "--mount", "sh", "-c", 'mount -t sysfs sys /sys && exec "$@"', "sh"]
        found = probe(elsewhere, *inside)
        assert found.pop("interfaces") == {"lo": "down"}
        assert found == {
            "127.0.0.1": "Network is unreachable",
            "::1": "Cannot assign requested address",
            "192.0.2.1": "Network is unreachable",
        }
        # The same probe from outside does connect: it can tell the difference.
        assert probe(elsewhere[:1])["127.0.0.1"] == "connected"


def test_the_trainer_may_open_no_socket_but_unix_ones(cell: Cell) -> None:
    status = Path(f"/proc/{cell.process.pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status
    launcher = cell.directory / "unix_sockets_only.py"
    code = "import socket; socket.socketpair(); socket.socket(socket.AF_INET)"
    refused = subprocess.run(
        [sys.executable, launcher, sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Address family not supported" in refused.stderr
    # No socket of the trainer's is of another family either.
    for table in ("tcp", "tcp6", "udp", "udp6", "raw"):
        rows = Path(f"/proc/{cell.process.pid}/net/{table}").read_text().splitlines()
        assert len(rows) == 1, table


def test_the_trainer_answers_over_the_unix_socket(cell: Cell) -> None:
    key = load_key(cell.coordinator.coordinator_key)
    file = private_study(cell.directory, "small")
    study = load_study(file)
    sign_study(study, file, key)
    roster = FederationRoster.decode(cell.coordinator.roster.read_bytes())
    offer = StudyOffer(
        document=file.read_bytes(),
        signature=signature_path(file).read_bytes(),
        roster=roster.encode(),
    )
    request = Request(study=study.digest, nonce=os.urandom(16), payload=offer.encode())
    answer = cell.client.exchange(seal_request(request, key), deadline_s=60)
    standing = decode(open_answer(answer, roster, request.digest).payload)
    assert standing == Standing(state=StudyState.WAITING, roster_version=roster.version)


def test_the_socket_is_its_owners_alone(cell: Cell) -> None:
    path = cell.site / "run" / "trainer.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
