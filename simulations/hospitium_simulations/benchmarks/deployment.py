"""What a deployed round costs, against the same exchanges on stock Flower, in one run.

Both sides run as separate processes on this machine, over TLS: ours with node authentication,
signatures, masks and the trainer behind its socket; stock Flower with an app that only echoes.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil

from hospitium_server.registry import Registry
from hospitium_simulations.benchmarks.results import Result, publish
from hospitium_simulations.benchmarks.stock_flower import stock_exchanges
from hospitium_simulations.local_federation import LocalFederation
from hospitium_simulations.quick_study import prepare_for_quick_studies, write_quick_study

if TYPE_CHECKING:
    from hospitium_simulations.local_federation import Hospital

TITLES = ("North", "East", "South")
EXCHANGES = 4
"""Train, mask, confirm, unmask: a secure round has four."""
LARGE = 25_000_000
SETTLE_S, LOOK_S = 60.0, 30.0


def main() -> None:
    """Measure, print a table, and write ``bench-results/deploy.json``."""
    with tempfile.TemporaryDirectory() as directory:
        results = measure(Path(directory))
    publish("deploy", results)


def measure(directory: Path) -> list[Result]:
    """Run both, tiny and large, one after the other."""
    with LocalFederation(directory=directory / "ours", titles=TITLES) as federation:
        federation.found()
        for hospital in federation.hospitals.values():
            prepare_for_quick_studies(hospital)
        federation.serve()
        for name in federation.hospitals:
            federation.open(name)
        tiny, _ = _rounds(federation, "tiny", hidden="[8]", rounds=8)
        large, peak = _rounds(federation, "large", hidden="[4096, 4096, 1900]", rounds=4)
        idle = _idle(federation)
    stock = stock_exchanges(directory / "tiny", sites=3, exchanges=EXCHANGES, numbers=0)
    bulk = stock_exchanges(directory / "large", sites=3, exchanges=2, numbers=LARGE)
    return [
        Result("secure round, 3 sites, tiny model", tiny, "s", 2.5),
        Result("the same exchanges, stock Flower", sum(stock), "s", None),
        Result("stock Flower / ours, tiny model", sum(stock) / tiny, "ratio", 10, "higher"),
        Result("secure round, 25M parameters, 16 bits", large, "s", None),
        Result("one plain exchange, 25M, stock Flower", min(bulk), "s", None),
        Result("stock plain exchange / our round, 25M", min(bulk) / large, "ratio", 2, "higher"),
        Result("server application's peak, 25M", peak, "GB", 0.5),
        Result("idle site, node and trainer", idle, "% of a core", 1),
    ]


def _rounds(
    federation: LocalFederation, name: str, *, hidden: str, rounds: int
) -> tuple[float, float]:
    """Run a study; return a training round's median seconds and the study process's peak in GB."""
    file = write_quick_study(federation.directory, name, hidden=hidden, rounds=rounds)
    federation.begin(file, {hospital: "data" for hospital in federation.hospitals})
    peak = _watch(federation, name)
    registry = Registry.open_existing(federation.home / "studies" / name)
    seconds = [made.seconds for made, _ in registry.history() if made.round > 1]
    registry.close()
    return median(seconds), peak


def _watch(federation: LocalFederation, name: str) -> float:
    """Wait for a study's end, looking at the memory of whatever process works on it."""
    process = federation.coordinator_process
    if process is None:
        raise RuntimeError("expected a coordinator that runs")
    peak = 0
    while "finished" not in federation.run("study", "status", name, "--home", federation.home):
        for child in psutil.Process(process.pid).children(recursive=True):
            if any("app" in word for word in child.cmdline()):
                peak = max(peak, _peak_bytes(child.pid))
        time.sleep(0.5)
    return peak / 1e9


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _idle(federation: LocalFederation) -> float:
    """Return the largest share of a core that a site uses when nothing runs, in per cent."""
    time.sleep(SETTLE_S)
    before = {name: _processor_s(one) for name, one in federation.hospitals.items()}
    time.sleep(LOOK_S)
    used = [_processor_s(one) - before[name] for name, one in federation.hospitals.items()]
    return 100 * max(used) / LOOK_S


def _processor_s(hospital: Hospital) -> float:
    if hospital.process is None:
        raise RuntimeError("expected a hospital that runs")
    parent = psutil.Process(hospital.process.pid)
    times = [one.cpu_times() for one in (parent, *parent.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
