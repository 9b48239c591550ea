"""The durable book of everything a site has released, written before it leaves.

One SQLite file in WAL mode with full synchronisation. Rows are only ever added; each carries the
SHA-256 of its content and of the row before, so a row that was changed or taken out is noticed.

**Guarantees:** a spend is on disk when ``book`` returns. Booking the same round of the same study
again is the same spend, whatever the attempt (the update is cached and sent again); booking it
with other numbers is refused.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hospitium_common.codec import encode_parts
from hospitium_common.errors import BudgetExceeded, LocalProtocolError
from hospitium_common.privacy import SpendEvent, Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Kind = Literal["training", "statistics", "evaluation"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS spends (
    number INTEGER PRIMARY KEY,
    study BLOB NOT NULL,
    round INTEGER NOT NULL,
    kind TEXT NOT NULL,
    unit TEXT NOT NULL,
    sampling_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL,
    honest_sites INTEGER NOT NULL,
    digest BLOB NOT NULL,
    UNIQUE (study, round)
) STRICT;
CREATE TRIGGER IF NOT EXISTS spends_stay BEFORE UPDATE ON spends
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS spends_remain BEFORE DELETE ON spends
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
COLUMNS = "study, round, kind, unit, sampling_rate, noise_multiplier, steps, honest_sites"
KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
UNITS: dict[str, Unit | None] = {"none": None, "patient": "patient", "record": "record"}
FIRST_DIGEST = bytes(32)


@dataclass(frozen=True, kw_only=True)
class Spend:
    """One release: a round's training with its privacy event, or sums without noise (no event).

    ``round`` is the protocol's round number. A training without differential privacy has no
    event either; the policy had to allow it.
    """

    study: bytes
    round: int
    kind: Kind
    event: SpendEvent | None


class Ledger:
    """The ledger of one site."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def spends(self) -> tuple[Spend, ...]:
        """Return everything that was booked, oldest first.

        Raises:
            LocalProtocolError: a row was changed, or one is missing in the middle.
        """
        found, previous = [], FIRST_DIGEST
        with closing(
            self._database.execute(f"SELECT {COLUMNS}, digest FROM spends ORDER BY number")  # noqa: S608 - a constant
        ) as rows:
            for number, row in enumerate(rows, start=1):
                spend = _spend(row)
                previous = _digest(spend, previous)
                if previous != row[-1]:
                    raise LocalProtocolError(
                        f"expected an untouched ledger, row {number} does not match its digest; "
                        "restore the ledger from a backup before this site takes part again"
                    )
                found.append(spend)
        return tuple(found)

    def events(self, study: bytes | None = None) -> tuple[SpendEvent, ...]:
        """Return the privacy events so far, of one study or of all."""
        return tuple(
            spend.event
            for spend in self.spends()
            if spend.event is not None and study in (None, spend.study)
        )

    def book(self, spend: Spend, covers: Callable[[Sequence[SpendEvent]], bool]) -> None:
        """Write a spend to disk, if the budget ``covers`` all events of its study with it.

        Raises:
            BudgetExceeded: the budget does not cover it; nothing was written.
            LocalProtocolError: this round of this study was booked with other numbers.
        """
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._book(spend, covers)
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _book(self, spend: Spend, covers: Callable[[Sequence[SpendEvent]], bool]) -> None:
        booked = self.spends()
        same_round = [s for s in booked if (s.study, s.round) == (spend.study, spend.round)]
        if same_round:
            if same_round != [spend]:
                raise LocalProtocolError(
                    f"expected round {spend.round} to cost what it cost before, got other numbers"
                )
            return
        if spend.event is not None:
            own = [s.event for s in booked if s.study == spend.study and s.event is not None]
            if not covers([*own, spend.event]):
                raise BudgetExceeded(
                    f"round {spend.round}: expected the privacy budget to cover this round, it "
                    "does not; nothing was spent and this site leaves the study"
                )
        last = self._database.execute("SELECT digest FROM spends ORDER BY number DESC LIMIT 1")
        previous = (last.fetchone() or (FIRST_DIGEST,))[0]
        self._database.execute(
            f"INSERT INTO spends ({COLUMNS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - a constant
            (*_row(spend), _digest(spend, previous)),
        )


def _row(spend: Spend) -> tuple[bytes, int, str, str, float, float, int, int]:
    event = spend.event
    if event is None:
        return spend.study, spend.round, spend.kind, "none", 0.0, 0.0, 0, 0
    return (
        spend.study, spend.round, spend.kind, event.unit,
        event.sampling_rate, event.noise_multiplier, event.steps, event.honest_sites,
    )  # fmt: skip


def _spend(row: tuple[bytes, int, str, str, float, float, int, int, bytes]) -> Spend:
    study, number, kind, unit, rate, noise, steps, honest, _ = row
    if kind not in KINDS or unit not in UNITS:
        raise LocalProtocolError("expected a known kind of spend in the ledger, got another")
    event, known_unit = None, UNITS[unit]
    if known_unit is not None:
        event = SpendEvent(
            sampling_rate=rate, noise_multiplier=noise, steps=steps, unit=known_unit,
            honest_sites=honest,
        )  # fmt: skip
    return Spend(study=study, round=number, kind=KINDS[kind], event=event)


def _digest(spend: Spend, previous: bytes) -> bytes:
    study, number, kind, unit, rate, noise, steps, honest = _row(spend)
    numbers = struct.pack(">dd", rate, noise)
    parts = (previous, study, number, kind.encode(), unit.encode(), numbers, steps, honest)
    return hashlib.sha256(encode_parts(*parts)).digest()
