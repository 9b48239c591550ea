"""`hospitium site run` as a hospital runs it: real processes, real TLS, killed in every way."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from hospitium_client.keys import load_node_key
from hospitium_common.envelope import Request, open_answer, seal_request
from hospitium_common.messages import Standing, StudyState, decode
from hospitium_common.toml_file import with_text_value
from tests.fleet_kit import Coordinator, wait_for
from tests.site_kit import Hospitals

pytestmark = pytest.mark.deploy


class Running:
    """One hospital's processes, and a coordinator to ask it things."""

    def __init__(self, folder):
        self.hospitals = Hospitals(folder)
        self.home = self.hospitals.homes[1]
        self.coordinator = Coordinator(folder)
        key = load_node_key(self.home.node_key).public_key()
        self.node_id = self.coordinator.enrol(key)
        settings = self.home.settings_file.read_text()
        settings = with_text_value(
            settings, "coordinator", "address", self.coordinator.address, name="site.toml"
        )
        self.home.settings_file.write_text(settings.replace("busy_s = 0.15", "busy_s = 0.05"))
        self.home.ca.write_bytes(self.coordinator.authority)
        self.process, self.run = None, None

    def start(self):
        (self.home.path / "run" / "online").unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hospitium_common", "site", "run", "--home", self.home.path],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        wait_for((self.home.path / "run" / "online").exists)
        self.run = self.run or self.coordinator.begin_run()

    def child(self, name):
        def find():
            for child in psutil.Process(self.process.pid).children():
                if name in child.cmdline():
                    return child
            return None

        return wait_for(find)

    def standing(self, within_s=60.0):
        hospitals = self.hospitals
        request = Request(
            study=hospitals.study.digest, nonce=os.urandom(16), payload=hospitals.offer().encode()
        )
        sealed = seal_request(request, hospitals.coordinator)
        data = self.coordinator.ask(self.run, self.node_id, sealed, within_s)
        standing = decode(open_answer(data, hospitals.roster, request.digest).payload)
        assert isinstance(standing, Standing)
        return standing.state

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        self.coordinator.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Running(tmp_path_factory.mktemp("site"))
    made.start()
    yield made
    made.close()


def hospitium(site, *words):
    return subprocess.run(
        [sys.executable, "-m", "hospitium_common", "site", *words, "--home", site.home.path],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def test_a_study_arrives_over_the_network_and_is_approved_by_its_name(site):
    assert site.standing() is StudyState.WAITING
    assert "waits for approval" in hospitium(site, "studies").stdout
    assert "A small study" in hospitium(site, "review", "small-study").stdout
    folder = site.home.path / "records"
    done = hospitium(site, "approve", "small-study", "--data", str(folder))
    assert "Approved small-study" in done.stdout, done.stderr
    assert site.standing() is StudyState.APPROVED
    assert hospitium(site, "health").stdout == "well\n"


def test_a_killed_trainer_is_started_again_and_nothing_is_lost(site):
    before = site.child("trainer").pid
    os.kill(before, signal.SIGKILL)
    assert site.standing() is StudyState.APPROVED
    assert site.child("trainer").pid != before


def test_a_killed_node_is_started_again_and_let_in_at_once(site):
    before = site.child("node").pid
    os.kill(before, signal.SIGKILL)
    assert site.standing() is StudyState.APPROVED
    assert site.child("node").pid != before


def test_the_trainer_keeps_torch_loaded_and_the_node_never_loads_it(site):
    maps = {m.path for m in site.child("node").memory_maps()}
    assert not [path for path in maps if "libtorch" in path]
    maps = {m.path for m in site.child("trainer").memory_maps()}
    assert [path for path in maps if "libtorch" in path]


def test_nobody_outlives_a_killed_supervisor(site):
    children = psutil.Process(site.process.pid).children()
    assert len(children) == 2
    site.process.kill()
    site.process.wait()
    psutil.wait_procs(children, timeout=30)
    assert not [child for child in children if child.is_running()]
    site.start()
    assert site.standing() is StudyState.APPROVED


def test_sigterm_ends_everybody_and_leaves_no_socket(site):
    children = psutil.Process(site.process.pid).children()
    site.process.send_signal(signal.SIGTERM)
    assert site.process.wait(30) == 0
    assert not [child for child in children if child.is_running()]
    assert not site.home.socket.exists()
    assert hospitium(site, "health", "--trainer").returncode == 1


def test_the_site_log_says_what_happened_and_nobody_else_can_read_it(site):
    text = (site.home.log / "site.log").read_text()
    assert "small-study was offered and is WAITING" in text
    assert "small-study was offered and is APPROVED" in text
    assert "patient-" not in text
    for file in site.home.log.iterdir():
        assert file.stat().st_mode & 0o077 == 0
    supervisor = (site.home.log / "supervisor.log").read_text()
    assert "trainer was killed by signal 9" in supervisor
    assert "node was killed by signal 9" in supervisor
