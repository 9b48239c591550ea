"""Mutated bytes through every decoder, and what decodes through the protocol behind it.

A finished round gives one specimen of every message and file. Each input is a specimen with a few
bytes changed, cut, repeated or swapped for another specimen's. Whatever decodes must encode to the
same bytes again. Pair offers, tasks, READY and MASKED messages that still decode are signed anew,
as a malicious party would, and handed to the other side. Only declared errors may come out.
"""

from __future__ import annotations

import argparse
import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hospitium_common.errors import HospitiumError
from hospitium_simulations.benchmarks.results import Result, publish
from hospitium_simulations.benchmarks.specimens import Specimen, specimens

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTHS = (0, 1, 8, 12, 16, 31, 32, 33, 63, 64, 65, 255, 256, 2**16, 2**31, 2**32 - 1)
NUMBERS = (0, 1, 2, 3, 4, 5, 255, 256, 2**16, 2**31, 2**32, 2**63, 2**64 - 1)
KEPT_FAILURES = 20


@dataclass(kw_only=True)
class Findings:
    """How many inputs each decoder saw, how many it took, and what broke it."""

    inputs: Counter[str]
    taken: Counter[str]
    failures: list[tuple[str, str, str]]
    undeclared: int = 0


def mutate(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """Return the bytes with one to four changes."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        at = chance.randrange(len(raw) + 1)
        end = min(len(raw), at + chance.choice((1, 2, 4, 8, 32, 100)))
        match chance.randrange(9):
            case 0 if at < len(raw):
                raw[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(raw):
                raw[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            case 2:
                raw[at:end] = chance.choice(LENGTHS).to_bytes(4, "big")
            case 3:
                raw[at : at + 8] = chance.choice(NUMBERS).to_bytes(8, "big")
            case 4:
                del raw[at:end]
            case 5:
                raw[at:at] = raw[at:end]
            case 6:
                raw[at:at] = chance.randbytes(end - at)
            case 7:
                del raw[at:]
            case _:
                other = chance.choice(others)
                begin = chance.randrange(len(other) + 1)
                raw[at:end] = other[begin : begin + end - at]
    return bytes(raw)


def try_one(specimen: Specimen, data: bytes, found: Findings) -> None:
    """Decode one input; note any error that is not a declared one."""
    found.inputs[specimen.name] += 1
    try:
        value = specimen.read(data)
        found.taken[specimen.name] += 1
        if not specimen.is_same(value, data):
            raise AssertionError("decoded, but encodes to other bytes")
        specimen.use(value)
    except HospitiumError:
        return
    except Exception as error:
        found.undeclared += 1
        if len(found.failures) < KEPT_FAILURES:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            found.failures.append((specimen.name, text, data.hex()))


def search(seconds: float, seed: int) -> Findings:
    """Feed mutated specimens to their decoders for so many seconds."""
    chance = random.Random(seed)  # noqa: S311 - inputs of a search, not secrets
    found = Findings(inputs=Counter(), taken=Counter(), failures=[])
    kinds = specimens()
    others = [specimen.data for specimen in kinds]
    for specimen in kinds:
        specimen.use(specimen.read(specimen.data))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for specimen in kinds:
            for _ in range(20):
                try_one(specimen, mutate(specimen.data, others, chance), found)
    return found


def report(found: Findings, minutes: float, console: Console) -> None:
    """Print what was found and write it down."""
    table = Table(title=f"Mutated inputs, {minutes:g} minutes")
    for column in ("decoder", "inputs", "decoded", "undeclared errors"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    failures = Counter(name for name, _, _ in found.failures)
    for name, count in found.inputs.items():
        table.add_row(name, f"{count:,}", f"{found.taken[name]:,}", str(failures[name]))
    table.add_row("all", f"{found.inputs.total():,}", f"{found.taken.total():,}",
                  str(found.undeclared))  # fmt: skip
    console.print(table)
    for name, text, data in found.failures:
        console.print(f"{name}: {text}\n  {data[:400]}", markup=False)
    publish("fuzz_decoders", [
        Result("mutated inputs", found.inputs.total(), "inputs", None, "higher"),
        Result("undeclared errors", found.undeclared, "errors", 0),
    ])  # fmt: skip


def main() -> None:
    """Search, report, and exit with 1 if a decoder broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = search(60 * given.minutes, given.seed)
    report(found, given.minutes, Console())
    raise SystemExit(found.undeclared > 0)


if __name__ == "__main__":
    main()
