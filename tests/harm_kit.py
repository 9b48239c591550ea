"""Ways to hurt a federation of real processes, for tests of attacks and faults."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import sqlite3
import threading
from pathlib import Path

import psutil

from hospitium_simulations.local_federation import Hospital, LocalFederation
from hospitium_simulations.quick_study import PRIVATE, prepare_for_quick_studies, write_quick_study


def found(directory: Path, titles: tuple[str, ...]) -> LocalFederation:
    """Found a federation whose hospitals have data; nothing runs yet."""
    federation = LocalFederation(directory=directory, titles=titles)
    federation.found()
    for one in federation.hospitals.values():
        prepare_for_quick_studies(one)
    return federation


def private_study(directory: Path, name: str, *, steps: int = 1, **changes: object) -> Path:
    """Write a quick study with differential privacy, so that every training is in the ledger."""
    file = write_quick_study(directory, name, privacy=PRIVATE, **changes)
    file.write_text(file.read_text().replace("local_steps = 1\n", f"local_steps = {steps}\n"))
    return file


def what_patients_have(federation: LocalFederation) -> set[bytes]:
    """Every row of every hospital's table: what must be nowhere else."""
    return {
        line.partition(",")[2].encode()
        for one in federation.hospitals.values()
        for line in (one.home / "data" / "rows.csv").read_text().splitlines()[1:]
    }


def private_keys(federation: LocalFederation) -> set[bytes]:
    """What is private in every hospital's key files, as text and as bytes."""
    found: set[bytes] = set()
    for one in federation.hospitals.values():
        document = (one.home / "keys" / "site.keys").read_text()
        (private,) = re.findall(r'"private": *"([0-9a-f]+)"', document)
        found |= {private.encode(), bytes.fromhex(private)[-64:]}
        found.add((one.home / "keys" / "node.key").read_bytes().splitlines()[3])
    return found


def trainings_booked(one: Hospital) -> int:
    """How many trainings are in a hospital's ledger; looking does not get in its way."""
    ledger = sqlite3.connect(f"file:{one.home / 'ledger.sqlite'}?mode=ro", uri=True)
    with contextlib.closing(ledger):
        query = "SELECT count(*) FROM spends WHERE kind = 'training'"
        return int(ledger.execute(query).fetchone()[0])


def child_of(pid: int, word: str) -> int:
    """Return the one descendant of a process whose command line has a word."""
    children = psutil.Process(pid).children(recursive=True)
    lines = {child.pid: " ".join(child.cmdline()) for child in children}
    matching = [child for child, line in lines.items() if word in line]
    assert len(matching) == 1, f"expected one {word} under {pid}: {lines}"
    return matching[0]


def kill(pid: int) -> None:
    """End one process as a power cut would."""
    os.kill(pid, signal.SIGKILL)


def dial_through(one: Hospital, port: int) -> None:
    """Let a hospital's node dial another port of this machine."""
    settings = one.home / "site.toml"
    before = settings.read_text()
    after = re.sub(r'address = "127\.0\.0\.1:\d+"', f'address = "127.0.0.1:{port}"', before)
    assert str(port) in after
    settings.write_text(after)


class Line(threading.Thread):
    """A TCP line on loopback that can be cut: through ``Line.port`` one reaches ``target``.

    ``cut()`` is what a dead switch does: nothing is refused and nothing comes through. ``mend()``
    lets new connections through; those from before stay dead, as behind a firewall that forgot
    them.
    """

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listening.getsockname()[1])
        self._open = threading.Event()
        self._open.set()
        self._generation = 0
        self.bytes_through = 0
        self.start()

    def cut(self) -> None:
        self._open.clear()
        self._generation += 1

    def mend(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._generation += 1
        self._open.set()
        self._listening.close()

    def run(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near:
            self._open.wait()
            generation = self._generation
            with socket.create_connection(("127.0.0.1", self._target)) as far:
                peer = {near: far, far: near}
                while True:
                    ready, _, _ = select.select([near, far], [], [], 0.2)
                    if generation != self._generation:
                        self._open.wait()  # silent for as long as the line is cut
                        return
                    for one in ready:
                        try:
                            data = one.recv(1 << 16)
                            peer[one].sendall(data)
                        except OSError:
                            return
                        if not data:
                            return
                        self.bytes_through += len(data)
