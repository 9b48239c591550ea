"""Secure aggregation: masks against the raw cipher, uploads and unmasking against Flower SecAgg+.

Ratios come from one run on one machine: both sides are warmed, then the fastest of five counts
(of fewer where Flower's side takes many seconds, of fifty for the masks alone). Every step of ours
is the one that sites and coordinator run, signatures, shares and all. What runs on one thread is
measured in processor time, which other work on the machine disturbs less; with threads only the
clock counts, and the machine has to be quiet.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from rich.console import Console

from hospitium_common.secagg.masks import BLOCK, Mask, add_masks, aligned, usable_threads
from hospitium_simulations.benchmarks import flower_secagg
from hospitium_simulations.benchmarks.paused_round import PausedRound
from hospitium_simulations.benchmarks.results import Result, publish

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

REPEATS, SHORT_REPEATS = 5, 50
PATIENCE_S = 12.0
"""A step that is measured for longer than this is not repeated again."""
MILLION = 10**6
UPLOADS = ((10, MILLION), (50, MILLION), (10, 25 * MILLION), (100, MILLION))
UNMASKINGS = {10: 3.0, 50: 50.0, 100: 80.0}
SMALL_MESSAGES = {50: (20.0, 11.0), 200: (100.0, 42.0)}


class Figures:
    """What was measured, next to what it should be; each shows as soon as it is there."""

    def __init__(self, console: Console) -> None:
        self.results: list[Result] = []
        self._console = console

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        target: float | None,
        better: Literal["lower", "higher"] = "higher",
    ) -> None:
        """Note a figure; ``better`` says on which side of its target it should be."""
        self.results.append(Result(what, round(value, 4), unit, target, better))
        self._console.print(f"{what}: {value:.4g} {unit}", highlight=False)


@dataclass
class Fastest:
    """The least seconds a step took: by the clock, and of the processor."""

    clock: float = float("inf")
    processor: float = float("inf")

    def time(self, step: Callable[[], object]) -> None:
        """Run a step once and keep its times where they are the least."""
        clock, processor = time.perf_counter(), time.process_time()
        step()
        self.processor = min(self.processor, time.process_time() - processor)
        self.clock = min(self.clock, time.perf_counter() - clock)


def fastest(*steps: Callable[[], object], repeats: int = REPEATS) -> list[Fastest]:
    """Return each step's fastest times; the steps take turns."""
    best = [Fastest() for _ in steps]
    begin = time.perf_counter()
    for _ in range(repeats + 1):  # the first one warms up, and counts where it is the only one
        for one, step in zip(best, steps, strict=True):
            one.time(step)
        if time.perf_counter() - begin > PATIENCE_S:
            break
    return best


def measure_masks(figures: Figures) -> None:
    """Compare mask expansion with addition to the cipher alone, and two threads to one."""
    zeros, into = memoryview(bytes(BLOCK)), aligned(BLOCK, np.uint8).data
    for sites in (10, 50):
        words, masks = aligned(MILLION, np.uint16), [Mask(bytes([i]) * 32, 1) for i in range(sites)]
        words[:] = 0

        def cipher_alone(words: NDArray[Any] = words, masks: list[Mask] = masks) -> None:
            for mask in masks:
                cipher = Cipher(algorithms.AES(mask.key), modes.CTR(bytes(16))).encryptor()
                for at in range(0, words.nbytes, BLOCK):
                    count = min(BLOCK, words.nbytes - at)
                    cipher.update_into(zeros[:count], into[:count])

        raw, one, two = fastest(
            cipher_alone, partial(add_masks, words, masks), partial(add_masks, words, masks, 2),
            repeats=SHORT_REPEATS,
        )  # fmt: skip
        size, name = len(masks) * words.nbytes / 1e9, f"{sites} masks over 1M"
        figures.add(f"{name}, one thread", size / one.processor, "GB/s", None)
        figures.add(f"{name}: cipher alone", size / raw.processor, "GB/s", None)
        figures.add(f"{name} / cipher alone", raw.processor / one.processor, "ratio", 0.85)
        # Ten masks take two threads less than 2 ms, of which starting them is a part.
        wanted = 1.7 if sites > 10 else None
        figures.add(f"{name}, two threads / one", one.clock / two.clock, "ratio", wanted)


def measure_uploads(figures: Figures) -> None:
    """Compare a site's step from its update to its masked message.

    Once on one thread, and once as a site does it: with all of its processor, and the rotation
    that is the rule in rings of 16 bits. Flower's side may use as many threads as it likes.
    """
    for sites, size in UPLOADS:
        update = np.random.default_rng(1).normal(0, 0.01, size).astype(np.float32)
        paused, threads = PausedRound(sites=sites, size=size), usable_threads()
        one, whole, theirs = fastest(
            partial(paused.masked_upload, update),
            partial(paused.masked_upload, update, threads, rotated=True),
            flower_secagg.upload(sites, update),
        )
        name = f"masked upload, {sites} sites, {size // MILLION}M"
        ours = f"{threads} threads, rotated"
        figures.add(f"{name}: one thread", one.processor * 1e3, "ms", None, "lower")
        figures.add(f"{name}: {ours}", whole.clock * 1e3, "ms", None, "lower")
        figures.add(f"{name}: Flower", theirs.processor * 1e3, "ms", None, "lower")
        ratio = theirs.processor / one.processor
        figures.add(f"{name}: Flower / one thread", ratio, "ratio", 10.0)
        figures.add(f"{name}: Flower / {ours}", theirs.clock / whole.clock, "ratio", 10.0)


def measure_unmasking(figures: Figures) -> None:
    """Compare the coordinator's work after the shares came in."""
    for sites, target in UNMASKINGS.items():
        for percent in (0, 10, 30):
            dropped = sites * percent // 100
            paused = PausedRound(sites=sites, size=MILLION)
            step = paused.unmasking(dropped)
            ours, theirs = fastest(step, flower_secagg.unmasking(sites, dropped, MILLION))
            name = f"unmasking, {sites} sites, {percent} % dropped"
            figures.add(f"{name}: ours", ours.processor * 1e3, "ms", None, "lower")
            ratio = theirs.processor / ours.processor
            figures.add(f"{name}: Flower / ours", ratio, "ratio", target)


def measure_small_messages(figures: Figures) -> None:
    """Take a site's processor time and bytes for everything but the vector."""
    for sites, (most_ms, most_kb) in SMALL_MESSAGES.items():
        paused = PausedRound(sites=sites, size=0)
        seconds, sent = paused.small_messages(REPEATS)
        figures.add(f"small messages, {sites} sites: processor", seconds * 1e3, "ms", most_ms,
                    "lower")  # fmt: skip
        figures.add(f"small messages, {sites} sites: up", sent / 1e3, "kB", most_kb, "lower")


def measure_bytes(figures: Figures) -> None:
    """Take the bytes that leave a site at a million parameters and ten sites."""
    paused = PausedRound(sites=10, size=MILLION)
    _, small = PausedRound(sites=10, size=0).small_messages(1)
    masked = len(paused.masked_upload(np.zeros(MILLION, np.float32)))
    flower = flower_secagg.upload(3, np.zeros(MILLION, np.float32))()
    rest = (masked - 2 * MILLION + small) / (2 * MILLION)
    figures.add("bytes per parameter, vector", 2.0, "B", 2.0, "lower")
    figures.add("bytes besides the vector", 100 * rest, "%", 1.0, "lower")
    figures.add("bytes per parameter, Flower", flower / MILLION, "B", None, "lower")


def measure_memory(figures: Figures) -> None:
    """Take the coordinator's peak while masked vectors arrive, with few and many sites."""
    peaks = {}
    for sites in (5, 200):
        paused = PausedRound(sites=sites, size=MILLION)
        arrive = paused.arriving_vectors()
        tracemalloc.start()
        arrive()
        peaks[sites] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        figures.add(f"coordinator's peak, {sites} sites, 1M", peaks[sites], "MB", None, "lower")
    figures.add("coordinator's peak, 200 sites / 5", peaks[200] / peaks[5], "ratio", 1.1, "lower")


PARTS: dict[str, Callable[[Figures], None]] = {
    "masks": measure_masks,
    "small": measure_small_messages,
    "bytes": measure_bytes,
    "memory": measure_memory,
    "uploads": measure_uploads,
    "unmasking": measure_unmasking,
}


def main() -> None:
    """Measure, print a table, and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    given = parser.parse_args()
    figures = Figures(Console())
    for name in given.parts or PARTS:
        PARTS[name](figures)
    publish("secagg", figures.results)


if __name__ == "__main__":
    main()
