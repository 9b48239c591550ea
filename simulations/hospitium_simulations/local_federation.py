"""A coordinator and its hospitals as separate processes on this machine, over real TLS.

Everything is done with the commands that people type; only the telephone call is left out. Used by
`hospitium demo`, by tests of the deployment and by its benchmark.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from hospitium_client.settings import SiteHome
from hospitium_client.studies import all_studies
from hospitium_common.enrolment.names import name_from_title
from hospitium_common.errors import HospitiumError
from hospitium_common.study import load_study
from hospitium_server.settings import CoordinatorHome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

SMALLEST_COHORT = 3
GRACE_S = 20.0
ARRIVAL_S = 60.0


@dataclass(kw_only=True)
class Hospital:
    """One hospital on this machine: its folder, and its processes while they run."""

    name: str
    title: str
    home: Path
    process: subprocess.Popen[bytes] | None = None


@dataclass(kw_only=True)
class LocalFederation:
    """Homes under ``directory``; ``say`` gets every command as it is run."""

    directory: Path
    titles: Sequence[str]
    say: Callable[[str], None] = lambda line: None
    environment: Mapping[str, str] = field(default_factory=dict)
    hospitals: dict[str, Hospital] = field(default_factory=dict)
    coordinator_process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """The coordinator's folder."""
        return self.directory / "coordinator"

    def __post_init__(self) -> None:
        self.directory = self.directory.absolute()
        for title in self.titles:
            name = name_from_title(title)
            home = self.directory / name
            self.hospitals[name] = Hospital(name=name, title=title, home=home)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def found(self) -> None:
        """Found the federation and enroll every hospital; each sends one file and gets one back."""
        founded = self.directory / "founded"
        if founded.exists():
            return
        for leftover in (self.home, *(hospital.home for hospital in self.hospitals.values())):
            shutil.rmtree(leftover, ignore_errors=True)  # of a start that was interrupted
        self.directory.mkdir(parents=True, exist_ok=True)
        port, local_port = free_ports(2)
        self.run(
            "coordinator", "init", "demo", "--host", "127.0.0.1", "--home", self.home,
            "--port", port, "--local-port", local_port,
        )  # fmt: skip
        for hospital in self.hospitals.values():
            self.run("site", "init", hospital.title, "--home", hospital.home)
            self.run("coordinator", "enroll", f"{hospital.name}.request.json", "--home", self.home,
                     "--yes")  # fmt: skip
        for hospital in self.hospitals.values():
            # The first admissions know only the hospitals before them; the network brings the rest.
            self.run("site", "admit", f"{hospital.name}.admission.json", "--home", hospital.home,
                     "--yes")  # fmt: skip
            policy = hospital.home / "policy.toml"
            rules = policy.read_text(encoding="utf-8")
            rules = rules.replace("minimum_sites = 5", f"minimum_sites = {SMALLEST_COHORT}")
            policy.write_text(rules, encoding="utf-8")
        founded.touch()

    def serve(self) -> None:
        """Start the coordinator and wait until it takes connections."""
        self.coordinator_process = self._start(
            "coordinator.log", "coordinator", "serve", "--home", self.home
        )
        self._wait_for_port()

    def open(self, name: str) -> None:
        """Start one hospital's node and trainer."""
        hospital = self.hospitals[name]
        hospital.process = self._start(f"{name}.log", "site", "run", "--home", hospital.home)

    def begin(self, study: Path, data: Mapping[str, str]) -> None:
        """Submit a study; every hospital in ``data`` approves it for that folder of its home."""
        document = load_study(study)
        if not (self.home / "studies" / document.study.id / "order.json").exists():
            self.run("study", "submit", study.name, "--home", self.home)
        for name, folder in data.items():
            hospital = self.hospitals[name]
            _wait_for_arrival(SiteHome(hospital.home), document.digest)
            self.run("site", "approve", document.study.id, "--data", hospital.home / folder,
                     "--home", hospital.home)  # fmt: skip

    def run(self, *arguments: object) -> str:
        """Run one command in ``directory`` and return what it printed.

        Raises:
            HospitiumError: it failed; with what it said.
        """
        words = [str(one) for one in arguments]
        self.say("hospitium " + " ".join(self._shortened(word) for word in words))
        done = subprocess.run(  # noqa: S603 - our own program
            [*_program(), *words], cwd=self.directory, env=self._environment(),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise HospitiumError(f"`hospitium {' '.join(words)}` failed: {done.stderr.strip()}")
        return done.stdout

    def show(self, *arguments: object) -> None:
        """Run one command in this terminal.

        Raises:
            HospitiumError: it failed.
        """
        words = [str(one) for one in arguments]
        self.say("hospitium " + " ".join(self._shortened(word) for word in words))
        command = [*_program(), *words]
        code = subprocess.call(command, cwd=self.directory, env=self._environment())  # noqa: S603 - our own program
        if code:
            raise HospitiumError(f"`hospitium {' '.join(words)}` failed with code {code}")

    def stop(self) -> None:
        """Ask every process to end, and make sure that it does."""
        running = [hospital.process for hospital in self.hospitals.values()]
        for process in (*running, self.coordinator_process):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (*running, self.coordinator_process):
            if process is not None:
                _end(process)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and its children at once, as a power cut would."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self, log: str, *arguments: object) -> subprocess.Popen[bytes]:
        words = [str(one) for one in arguments]
        self.say("hospitium " + " ".join(self._shortened(word) for word in words) + " &")
        with (self.directory / log).open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - our own program
                [*_program(), *words], cwd=self.directory, env=self._environment(),
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def _wait_for_port(self, patience_s: float = 60.0) -> None:
        process, network = self.coordinator_process, CoordinatorHome(self.home).settings().network
        until = time.monotonic() + patience_s
        while time.monotonic() < until and process is not None and process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", network.port), 1):
                return
            time.sleep(0.1)
        raise HospitiumError(
            f"{self.directory / 'coordinator.log'}: expected the coordinator to take connections, "
            "it does not; its log says why"
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **self.environment}

    def _shortened(self, word: str) -> str:
        return f'"{word}"' if " " in word else word.replace(f"{self.directory}/", "")


def free_ports(count: int) -> list[int]:
    """Return ports on loopback that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_for_arrival(home: SiteHome, digest: bytes) -> None:
    """Wait until the coordinator's offer has reached a hospital: people approve what they saw."""
    until = time.monotonic() + ARRIVAL_S
    while not any(one.study.digest == digest for one in all_studies(home.studies)):
        if time.monotonic() > until:
            raise HospitiumError(
                f"{home.path}: expected the study to arrive within {ARRIVAL_S:.0f} s, it did not; "
                "the log beside it says why"
            )
        time.sleep(0.1)


def _program() -> list[str]:
    return [sys.executable, "-m", "hospitium_common"]


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
