"""Trainer and node as the units run them: two users, one socket between them, and nothing else.

The numbers are those of the images; the socket's group is one that every system has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deployment_kit import wait_until
from tests.harm_kit import found

TRAINER, NODE, STRANGER = 10001, 10002, 10003
GROUP, GROUP_NUMBER = "daemon", 1
NODE_HOME = Path(__file__).parent.parent / "deploy" / "node-home.sh"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="only root can run processes under other users",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    site: Path
    node: Path
    socket: Path
    trainer: subprocess.Popen[bytes]


def as_user(user: int, *, in_group: bool) -> list[str]:
    """What comes before a command that a unit runs."""
    groups = [f"--groups={GROUP_NUMBER}"] if in_group else ["--clear-groups"]
    return ["setpriv", f"--reuid={user}", f"--regid={user}", *groups, "--no-new-privs",
            "--bounding-set=-all", "--inh-caps=-all"]  # fmt: skip


def hospitium(*words: object) -> list[str]:
    return [sys.executable, "-m", "hospitium_common", *map(str, words)]


def run(user: int, *command: str, in_group: bool) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COLUMNS": "200"}
    return subprocess.run(
        [*as_user(user, in_group=in_group), *command], capture_output=True, text=True,
        timeout=120, check=False, cwd="/", env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    # Not below pytest's own folder, which no other user may enter.
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    if run(STRANGER, sys.executable, "-c", "import hospitium_client", in_group=False).returncode:
        pytest.skip("other users may not read this installation")
    try:
        site = found(directory / "federation", ("St. Anna",)).hospitals["st-anna"].home
        for path in (site, *site.rglob("*")):
            os.chown(path, TRAINER, TRAINER)
        site.chmod(0o700)
        node = directory / "node"
        subprocess.run([NODE_HOME, site, node, str(NODE)], check=True)
        meeting = directory / "run"  # as hospitium.tmpfiles.conf makes it
        meeting.mkdir()
        os.chown(meeting, TRAINER, GROUP_NUMBER)
        meeting.chmod(0o2750)
        socket = meeting / "trainer.sock"
        words = ("site", "trainer", "--home", site, "--socket", socket, "--group", GROUP)
        with (directory / "trainer.log").open("wb") as log:
            trainer = subprocess.Popen(
                [*as_user(TRAINER, in_group=True), *hospitium(*words)],
                stdout=log, stderr=log, cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        try:
            wait_until(lambda: socket.exists() or trainer.poll() is not None, "the socket")
            assert trainer.poll() is None, (directory / "trainer.log").read_text()
            yield Machine(site=site, node=node, socket=socket, trainer=trainer)
        finally:
            trainer.terminate()
            trainer.wait(30)
    finally:
        shutil.rmtree(directory)


def test_the_node_reaches_the_trainer_and_a_stranger_does_not(machine: Machine) -> None:
    health = hospitium("site", "health", "--trainer", "--home", machine.node, "--socket",
                       machine.socket)  # fmt: skip
    well = run(NODE, *health, in_group=True)
    assert (well.returncode, well.stdout) == (0, "well\n"), well.stderr
    for user, in_group in ((STRANGER, False), (NODE, False)):
        assert run(user, *health, in_group=in_group).returncode != 0
    assert machine.socket.stat().st_mode & 0o777 == 0o660
    assert machine.socket.stat().st_gid == GROUP_NUMBER


def test_the_node_reads_neither_the_data_nor_the_keys_of_the_site(machine: Machine) -> None:
    for name in ("keys/site.keys", "data/rows.csv", "policy.toml", "pinned/roster.json"):
        refused = run(NODE, "cat", str(machine.site / name), in_group=True)
        assert "Permission denied" in refused.stderr
    # Its own home has what it needs, and the trainer may not look into it either.
    for name in ("keys/node.key", "site.toml", "pinned/ca.pem"):
        assert run(NODE, "cat", str(machine.node / name), in_group=True).returncode == 0
        assert run(TRAINER, "cat", str(machine.node / name), in_group=True).returncode != 0


def test_the_node_dials_with_what_its_home_has(machine: Machine) -> None:
    node = [*as_user(NODE, in_group=True), *hospitium("site", "node", "--home", machine.node,
            "--socket", machine.socket)]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    running = subprocess.Popen(node, stderr=subprocess.PIPE, text=True, cwd="/", env=environment)
    assert running.stderr is not None
    try:
        said = ""
        while "expected the coordinator to answer" not in said:  # no coordinator runs here
            line = running.stderr.readline()
            assert line, said
            said += line
    finally:
        running.terminate()
        running.wait(30)
        running.stderr.close()
