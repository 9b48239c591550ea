"""The service: which nodes are let in, what is started again, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from hospitium_client.fleet import NotEnrolled
from hospitium_common.enrolment.public_keys import node_public_pem
from hospitium_server.nodes import NodeKeeper, read_nodes
from hospitium_server.settings import CoordinatorHome
from hospitium_simulations.local_federation import free_ports
from tests.coordinator_kit import RealSuperLink
from tests.enrolment_kit import NOW, Governance, member

PATIENCE_S = 60


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    made = RealSuperLink(tmp_path_factory.mktemp("superlink"))
    yield made
    made.process.stop()


class Home:
    """A coordinator's folder with a roster that a test changes."""

    def __init__(self, folder):
        self.home = CoordinatorHome(folder)
        self.governance = Governance()
        self.home.governance_public.parent.mkdir()
        public = self.governance.key.public_key().public_bytes_raw()
        self.home.governance_public.write_text(public.hex())

    def enroll(self, *members):
        self.home.roster.write_bytes(self.governance.roster(*members).encode())


def test_exactly_the_nodes_of_the_roster_are_let_in(superlink, tmp_path):
    home, now = Home(tmp_path), [float(NOW)]
    keeper = NodeKeeper(home.home, tmp_path, lambda: now[0])
    key = ec.generate_private_key(ec.SECP384R1())
    here = member(1, "st-anna", node_key=node_public_pem(key.public_key()))
    late, gone = member(2, "ukm", expires=NOW + 100), member(3, "mercy")

    def names():
        keeper.look(superlink.control)
        return sorted(node.name for node in superlink.control.nodes())

    home.enroll(here, late, gone)
    assert names() == ["mercy", "st-anna", "ukm"]
    home.enroll(here, late, member(3, "mercy", revoked=True))
    assert names() == ["st-anna", "ukm"]
    now[0] += 101
    assert names() == ["st-anna"]
    fleet = superlink.fleet(key)
    fleet.go_online()
    keeper.look(superlink.control)
    status = read_nodes(tmp_path)["st-anna"]
    assert status.online
    assert abs(status.last_heartbeat - time.time()) < PATIENCE_S
    home.enroll(member(1, "st-anna", node_key=here.node_key, revoked=True))
    assert names() == []
    with pytest.raises(NotEnrolled):
        fleet.receive(0)


def test_a_roster_that_cannot_be_trusted_changes_nothing_and_is_complained_about_once(
    superlink, tmp_path, caplog
):
    home = Home(tmp_path)
    keeper = NodeKeeper(home.home, tmp_path, lambda: float(NOW))
    home.enroll(member(1, "st-anna"))
    keeper.look(superlink.control)
    forged = Governance().roster(member(2, "rogue"))
    for data in (b"{", forged.encode()):
        home.home.roster.write_bytes(data)
        for _ in range(2):
            keeper.look(superlink.control)
        assert [node.name for node in superlink.control.nodes()] == ["st-anna"]
    assert len([one for one in caplog.records if one.levelname == "ERROR"]) == 2
    for node in superlink.control.nodes():
        superlink.control.unregister(node.node_id)


# --- the real command


class Served:
    """`hospitium coordinator serve` for a new federation."""

    def __init__(self, folder):
        self.home = CoordinatorHome(folder / "coordinator")
        self.log = folder / "log"
        port, local = free_ports(2)
        self._hospitium(
            "coordinator", "init", "net", "--host", "127.0.0.1", "--port", port, "--local-port",
            local,
        )  # fmt: skip
        self.port, self.local = port, local
        self.process = None

    def start(self):
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self._command("coordinator", "serve"), "--home", str(self.home.path)],
                stdout=output, stderr=output,
            )  # fmt: skip
        self.wait_until_up()

    def wait_until_up(self):
        wait(lambda: is_up(self.local), "the SuperLink to answer")

    def children(self):
        return [one.pid for one in psutil.Process(self.process.pid).children()]

    def child(self):
        (one,) = psutil.Process(self.process.pid).children()
        return one

    def refused(self, *words):
        done = subprocess.run(
            [*self._command(*words), "--home", str(self.home.path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done
        return done.stderr

    def _hospitium(self, *words):
        subprocess.run(
            [*self._command(*words), "--home", str(self.home.path)], check=True,
            capture_output=True,
        )  # fmt: skip

    def _command(self, *words):
        return [sys.executable, "-m", "hospitium_common", *(str(word) for word in words)]


def wait(condition, what):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"expected {what}"
        time.sleep(0.1)


def is_up(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).is_success
    except httpx.HTTPError:
        return False


def test_the_command_serves_starts_again_what_died_and_ends_cleanly(tmp_path):
    served = Served(tmp_path)
    served.start()
    try:
        wait(lambda: "net is ready" in served.log.read_text(), "that it says so")
        assert "another one is running" in served.refused("coordinator", "serve")
        # Its secrets are on nobody's command line, and its files are its owner's only.
        assert "token" not in " ".join(served.child().cmdline())
        database = served.home.path / "superlink" / "superlink.sqlite"
        assert database.stat().st_mode & 0o077 == 0
        (before,) = served.children()
        os.kill(before, signal.SIGKILL)
        wait(lambda: served.children() not in ([], [before]), "another SuperLink")
        served.wait_until_up()
    finally:
        served.process.send_signal(signal.SIGINT)
        code = served.process.wait(PATIENCE_S)
    assert code == 0
    log = served.log.read_text()
    assert "the SuperLink ended with code -9; it is started again" in log
    assert "Traceback" not in log


def test_when_the_service_is_killed_nothing_of_it_stays(tmp_path):
    served = Served(tmp_path)
    served.start()
    child = served.child()
    served.process.kill()
    served.process.wait()
    wait(lambda: not child.is_running(), "that its SuperLink ends too")
    served.start()  # the ports are free again, and what is on disk is good
    served.process.terminate()
    assert served.process.wait(PATIENCE_S) == 0


def test_a_port_that_is_taken_is_an_error_that_names_it(tmp_path):
    served = Served(tmp_path)
    served.start()
    try:
        other = tmp_path / "other"
        other.mkdir()
        second = Served(other)
        text = second.home.settings_file.read_text()
        second.home.settings_file.write_text(text.replace(f"= {second.port} ", f"= {served.port} "))
        said = second.refused("coordinator", "serve")
        assert f"{served.port}: expected to listen there" in said
    finally:
        served.process.terminate()
        served.process.wait(PATIENCE_S)


def test_what_is_read_of_nodes_survives_a_damaged_file(tmp_path):
    assert read_nodes(tmp_path) == {}
    (tmp_path / "nodes.json").write_text(json.dumps({"st-anna": {"odd": 1}}))
    assert read_nodes(tmp_path) == {}
