"""Private training against plain PyTorch and Opacus: processor time per step, and peak memory.

Every way runs the same model on the same batch in one process and one thread, all in turn; the
fastest of several rounds counts, in processor time, which other work on the machine disturbs least.
The baseline is the faster plain way of the usual and the channels-last layout, with the fused
recurrent layers of torch. Memory is what one step adds to the process at its highest, each way in
a process of its own, against the smaller plain one.

The secure noise's share is of a step that clips and adds noise.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from hospitium_client.training.noise import SecureNoise
from hospitium_simulations.benchmarks.private_sides import (
    BATCH,
    GHOST,
    HOOKS,
    OURS,
    PLAIN,
    PLAIN_LAST,
    all_sides,
    side,
    subject,
)
from hospitium_simulations.benchmarks.results import Result, publish

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from hospitium_simulations.benchmarks.private_sides import Step

TARGETS = {
    "small CNN 28×28": 1.35,
    "LSTM 48×40, hidden 128": 1.35,
    "GRU 48×40, hidden 128": 1.3,
    "ResNet-18 28×28": 1.6,
    "ResNet-18 64×64": 1.6,
}
MEMORY_TARGET = 1.5
NOISE_TARGET = 0.1
USUAL_ROUNDS = 25
ROUNDS = {"ResNet-18 28×28": 2, "ResNet-18 64×64": 2}
MOST_SECONDS = 20.0
"""When one step of Opacus takes so long, its second one and its memory are left out."""
MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model: seconds of every way and round, bytes of every way, seconds of the noise."""

    name: str
    seconds: dict[str, list[float]]
    memory: dict[str, int]
    noise: float

    @property
    def plain(self) -> float:
        """Seconds of the fastest plain step."""
        return min(
            min(self.seconds[label]) for label in (PLAIN, PLAIN_LAST) if label in self.seconds
        )

    @property
    def plain_memory(self) -> int:
        """Bytes of the smallest plain step."""
        return min(self.memory[label] for label in (PLAIN, PLAIN_LAST) if label in self.memory)

    @property
    def machine_noise(self) -> float:
        """How much longer the usual plain step takes than the fastest, as a share."""
        return median(self.seconds[PLAIN]) / min(self.seconds[PLAIN]) - 1

    def ratio(self, label: str) -> float:
        """Time of a way over plain."""
        return min(self.seconds[label]) / self.plain

    def results(self) -> list[Result]:
        """Return the figures, those with a target first."""
        share = self.noise / (min(self.seconds[OURS]) + self.noise)
        memory = self.memory[OURS] / self.plain_memory
        found = [
            Result(
                f"{self.name}: ours / plain, time", self.ratio(OURS), "ratio", TARGETS[self.name]
            ),
            Result(f"{self.name}: ours / plain, peak memory", memory, "ratio", MEMORY_TARGET),
            Result(f"{self.name}: secure noise / step", share, "share", NOISE_TARGET),
            Result(f"{self.name}: machine noise", self.machine_noise, "share", None),
        ]
        for label, seconds in self.seconds.items():
            speed = BATCH / min(seconds)
            found.append(Result(f"{self.name}: {label}", speed, "samples/s", None, "higher"))
            if label in (HOOKS, GHOST):
                ratio = self.ratio(label)
                found.append(Result(f"{self.name}: {label} / plain, time", ratio, "ratio", None))
        return found


def timed(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return processor seconds of every way and round; Opacus is left out where it refuses."""
    times: dict[str, list[float]] = {}
    for label, step in steps.items():
        try:
            times[label] = [_seconds(step)]
        except RuntimeError:  # Opacus cannot follow layers that work in place
            if label not in (HOOKS, GHOST):
                raise
    for _ in range(rounds - 1):
        for label, seconds in times.items():
            if not _takes_long(label, seconds):
                seconds.append(_seconds(steps[label]))
    return times


def _takes_long(label: str, seconds: list[float]) -> bool:
    return label in (HOOKS, GHOST) and sum(seconds) > MOST_SECONDS


def _seconds(step: Step) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def noise_seconds(name: str) -> float:
    """Return how long the noise of one step takes to draw."""
    numbers = sum(p.numel() for p in subject(name)[0].parameters())
    source = SecureNoise(os.urandom(32))
    return min(
        _seconds(lambda: _draw(source, numbers)) for _ in range(ROUNDS.get(name, USUAL_ROUNDS))
    )


def _draw(source: SecureNoise, numbers: int) -> None:
    source.normal((numbers,), 1.0)


def peak_bytes(name: str, label: str) -> int:
    """Return what one or two steps of one way add to a fresh process at its highest."""
    context = multiprocessing.get_context("forkserver")  # imports once, keeps nothing measured
    context.set_forkserver_preload(["hospitium_simulations.benchmarks.private_sides"])
    answer: Queue[int] = context.Queue()
    process = context.Process(target=_grow, args=(name, label, answer))
    process.start()
    grown = answer.get()
    process.join()
    return grown


def _grow(name: str, label: str, answer: Queue[int]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    step = side(label, *subject(name))
    assert step is not None  # noqa: S101 - only ways that were timed are asked for
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _resident("VmRSS")
    for _ in range(1 if name in ROUNDS else 2):
        step()
    answer.put(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Return a field of the process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(name: str) -> Measured:
    """Measure one model."""
    seconds = timed(all_sides(name), ROUNDS.get(name, USUAL_ROUNDS))
    memory = {
        label: peak_bytes(name, label)
        for label, taken in seconds.items()
        if not _takes_long(label, taken)
    }
    return Measured(name=name, seconds=seconds, memory=memory, noise=noise_seconds(name))


def table_of(measured: list[Measured]) -> Table:
    """Return the figures for people."""
    table = Table(title=f"Private training, batch {BATCH}, one thread", title_justify="left")
    for column in ("model", "way", "samples/s", "time / plain", "at most", "MiB", "memory / plain"):
        table.add_column(column, justify="left" if column in ("model", "way") else "right")
    for one in measured:
        for label, seconds in one.seconds.items():
            bytes_ = one.memory.get(label)
            table.add_row(
                one.name if label == PLAIN else "", label, f"{BATCH / min(seconds):,.1f}",
                f"{one.ratio(label):.2f}", f"{TARGETS[one.name]:g}" if label == OURS else "",
                "" if bytes_ is None else f"{bytes_ / MEBIBYTE:,.0f}",
                "" if bytes_ is None else f"{bytes_ / one.plain_memory:.2f}",
            )  # fmt: skip
        table.add_row("", "machine noise", "", f"{one.machine_noise:.0%}", end_section=True)
    return table


def main() -> None:
    """Measure every model, print the table and write the figures."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    console = Console(width=110)
    measured = []
    for name in TARGETS:
        with console.status(f"measuring {name}"):
            measured.append(measure(name))
    console.print(table_of(measured))
    publish("private", [figure for one in measured for figure in one.results()])


if __name__ == "__main__":
    main()
