"""Model versions and the rounds that made them: one SQLite file, one safetensors file each.

A version is immutable and names its parent. Its row is written after its file is on disk, so a
crash or a full disk at any moment leaves the version before as the latest one.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from hospitium_common.durable import OWNER_ONLY, write_durably
from hospitium_common.errors import ConfigError, HospitiumError, LocalProtocolError
from hospitium_server.aggregation import OptimizerState
from hospitium_server.evaluation import Figures

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    number INTEGER PRIMARY KEY,
    study TEXT NOT NULL,
    layout TEXT NOT NULL,
    parent TEXT NOT NULL,
    digest TEXT NOT NULL,
    round TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS figures (number INTEGER PRIMARY KEY, validation TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS scores (number INTEGER PRIMARY KEY, score REAL) STRICT;
CREATE TABLE IF NOT EXISTS withdrawn (number INTEGER PRIMARY KEY, reason TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS evaluations (number INTEGER PRIMARY KEY, totals BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS attempts (
    round INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    unmasking INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS epochs (number INTEGER PRIMARY KEY) STRICT;
"""


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """One secure sum of a training round: over whom, their total weight, the mean's norm.

    ``norm_bound`` is the largest norm that the study allows; ``rejected`` says why the sum was
    not used.
    """

    survivors: tuple[int, ...]
    weight: int = 0
    norm: float = 0.0
    norm_bound: float = 0.0
    rejected: str = ""


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What happened in the round that made a version; ``missing`` says who was not there, why.

    ``quantisation_error`` is a bound on the rounding error's norm relative to the update's;
    ``rounding_to_noise`` relates it to the norm of the noise of differential privacy in the
    update, and is 0 where there is none or its size is unknown.
    ``lost`` marks a round that was cut off while it was unmasked, ``rejected`` says why a round's
    update was not used: in both cases the model is the one of version ``model_of``. ``withdrawn``
    says why the version's model does not count: later rounds went back to the one before.
    ``records`` are those of the statistics round, a ceiling of the weights; ``second_moments``
    are the sites' mean sums of squares, per tensor.
    """

    round: int
    survivors: tuple[int, ...] = ()
    missing: dict[int, str] = field(default_factory=dict)
    attempts: int = 0
    seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    update_norm: float = 0.0
    norm_bound: float = 0.0
    quantisation_error: float = 0.0
    rounding_to_noise: float = 0.0
    clipped_fraction: float = 0.0
    scaled_down: int = 0
    dropped_contributions: int = 0
    second_moments: tuple[float, ...] = ()
    result: str = ""
    lost: bool = False
    groups: tuple[GroupRecord, ...] = ()
    records: int = 0
    rejected: str = ""
    withdrawn: str = ""
    model_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class Version:
    """A model version: parameters float32 ``[size]``, server optimizer, and how it came about."""

    number: int
    parameters: NDArray[np.float32]
    optimizer: OptimizerState
    normalisation: bytes
    record: RoundRecord


class Registry:
    """The versions of one study in one directory."""

    def __init__(self, directory: Path, study: bytes, layout: bytes) -> None:
        self.directory = directory
        self._study, self._layout = study.hex(), layout.hex()
        self._database = _open(directory)
        with closing(self._database.execute("SELECT study, layout FROM versions LIMIT 1")) as rows:
            found = rows.fetchone()
        if found is not None and tuple(found) != (self._study, self._layout):
            raise ConfigError(
                f"{directory}: expected the models of study {self._study[:12]}, got those of "
                f"{found[0][:12]}; the study file was changed after it began. Use a new directory"
            )

    @classmethod
    def open_existing(cls, directory: Path) -> Registry:
        """Open a registry to read it, whatever its study is.

        Raises:
            ConfigError: there is none.
        """
        path = directory / "registry.sqlite"
        if not path.exists():
            raise ConfigError(f"{path}: expected a registry, got nothing there")
        with closing(sqlite3.connect(path)) as database:
            row = database.execute("SELECT study, layout FROM versions LIMIT 1").fetchone()
        study, layout = ("", "") if row is None else row
        return cls(directory, bytes.fromhex(study), bytes.fromhex(layout))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def next_attempt(self, round_number: int) -> int:
        """Count an attempt of a round, on disk before it begins."""
        self._write(
            "INSERT INTO attempts (round, last) VALUES (?, 1) "
            "ON CONFLICT (round) DO UPDATE SET last = last + 1",
            (round_number,),
        )
        query = "SELECT last FROM attempts WHERE round = ?"
        return int(self._database.execute(query, (round_number,)).fetchone()[0])

    def next_epoch(self) -> int:
        """Count a key epoch, on disk before any site is asked to pair."""
        self._write("INSERT INTO epochs SELECT coalesce(max(number), 0) + 1 FROM epochs", ())
        return int(self._database.execute("SELECT max(number) FROM epochs").fetchone()[0])

    def begin_unmasking(self, round_number: int) -> None:
        """Note, before any site is asked for shares, that this round may be unmasked from now."""
        self._write("UPDATE attempts SET unmasking = 1 WHERE round = ?", (round_number,))

    def may_be_unmasked(self, round_number: int) -> bool:
        """Whether sites may have released shares for a round: it cannot be run again."""
        query = "SELECT unmasking FROM attempts WHERE round = ?"
        row = self._database.execute(query, (round_number,)).fetchone()
        return row is not None and bool(row[0])

    def save(self, version: Version) -> None:
        """Write a version: first its file, then its row. A version that is there stays as it is.

        Raises:
            LocalProtocolError: this number is taken.
            HospitiumError: the disk is full; the versions before are untouched.
        """
        if self._digest_of(version.number):
            raise LocalProtocolError(f"expected a new version, {version.number} is there already")
        tensors: dict[str, NDArray[Any]] = {
            "parameters": version.parameters,
            "optimizer.first": version.optimizer.first,
            "optimizer.second": version.optimizer.second,
            "optimizer.average": version.optimizer.average,
            "normalisation": np.frombuffer(version.normalisation, np.uint8),
        }
        kept = version.record.model_of  # an update that was not used: the model is an older one
        parent = self._digest_of(version.number - 1 if kept is None else kept)
        metadata = {"study": self._study, "layout": self._layout, "parent": parent}
        data = safetensors.numpy.save(tensors, {**metadata, "version": str(version.number)})
        write_durably(self._file(version.number), data)
        self._write(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)",
            (
                version.number, self._study, self._layout, parent,
                hashlib.sha256(data).hexdigest(), json.dumps(asdict(version.record)),
            ),
        )  # fmt: skip

    def note(self, number: int, validation: Figures) -> None:
        """Note how a version does on validation patients; known one round after it was made."""
        self._write(
            "INSERT OR REPLACE INTO figures VALUES (?, ?)",
            (number, json.dumps(asdict(validation))),
        )

    def note_score(self, number: int, score: float) -> None:
        """Note by what the validation gate judges a version; higher is better, NaN undefined."""
        value = None if math.isnan(score) else score
        self._write("INSERT OR REPLACE INTO scores VALUES (?, ?)", (number, value))

    def scores(self) -> dict[int, float]:
        """Return every score that was noted, by version."""
        with closing(self._database.execute("SELECT number, score FROM scores")) as rows:
            return {int(n): math.nan if score is None else float(score) for n, score in rows}

    def withdraw(self, numbers: Iterable[int], reason: str) -> None:
        """Mark versions whose model does not count any more; all of them or none."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            for number in numbers:
                self._write("INSERT OR IGNORE INTO withdrawn VALUES (?, ?)", (number, reason))
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def standing(self, number: int) -> Version:
        """Return the newest version up to ``number`` that was not withdrawn."""
        query = (
            "SELECT max(number) FROM versions WHERE number <= ? "
            "AND number NOT IN (SELECT number FROM withdrawn)"
        )
        return self.load(int(self._database.execute(query, (number,)).fetchone()[0]))

    def keep_evaluation(self, number: int, totals: NDArray[np.uint64]) -> None:
        """Keep the totals of a version's evaluation: sites are not asked for them twice."""
        self._write("INSERT OR IGNORE INTO evaluations VALUES (?, ?)", (number, totals.tobytes()))

    def evaluation(self, number: int) -> NDArray[np.uint64] | None:
        """Return the totals of a version's evaluation, if there was one."""
        query = "SELECT totals FROM evaluations WHERE number = ?"
        row = self._database.execute(query, (number,)).fetchone()
        return None if row is None else np.frombuffer(row[0], np.uint64)

    def evaluations(self) -> tuple[NDArray[np.uint64], ...]:
        """Return the totals of every evaluation."""
        with closing(self._database.execute("SELECT totals FROM evaluations")) as rows:
            return tuple(np.frombuffer(totals, np.uint64) for (totals,) in rows)

    def latest(self) -> Version | None:
        """Return the last version that is wholly on disk."""
        with closing(self._database.execute("SELECT max(number) FROM versions")) as rows:
            number = rows.fetchone()[0]
        return None if number is None else self.load(int(number))

    def load(self, number: int) -> Version:
        """Return one version.

        Raises:
            ConfigError: the file is missing or is not what was written.
        """
        path = self._file(number)
        query = (
            "SELECT digest, round, reason FROM versions LEFT JOIN withdrawn USING (number) "
            "WHERE number = ?"
        )
        row = self._database.execute(query, (number,)).fetchone()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: expected model version {number}, got none") from error
        if row is None or hashlib.sha256(data).hexdigest() != row[0]:
            raise ConfigError(f"{path}: expected the version that was registered, got another")
        tensors = safetensors.numpy.load(data)
        return Version(
            number=number,
            parameters=tensors["parameters"],
            optimizer=OptimizerState(
                first=tensors["optimizer.first"],
                second=tensors["optimizer.second"],
                average=tensors["optimizer.average"],
            ),
            normalisation=tensors["normalisation"].tobytes(),
            record=_record(row[1], row[2]),
        )

    def history(self) -> tuple[tuple[RoundRecord, Figures | None], ...]:
        """Return every version's round and, where known, its validation figures."""
        query = (
            "SELECT round, validation, reason FROM versions LEFT JOIN figures USING (number) "
            "LEFT JOIN withdrawn USING (number) ORDER BY number"
        )
        with closing(self._database.execute(query)) as rows:
            return tuple(
                (_record(made, why), None if seen is None else Figures(**json.loads(seen)))
                for made, seen, why in rows
            )

    def lineage(self) -> tuple[tuple[int, str, str], ...]:
        """Return (number, digest, parent's digest) of every version."""
        query = "SELECT number, digest, parent FROM versions ORDER BY number"
        with closing(self._database.execute(query)) as rows:
            return tuple((int(n), str(digest), str(parent)) for n, digest, parent in rows)

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise HospitiumError(
                f"{self.directory / 'registry.sqlite'}: expected to write to it, got: {error}; "
                "what was finished is kept. Make room and run it again"
            ) from error

    def _digest_of(self, number: int) -> str:
        query = "SELECT digest FROM versions WHERE number = ?"
        row = self._database.execute(query, (number,)).fetchone()
        return "" if row is None else str(row[0])

    def _file(self, number: int) -> Path:
        return self.directory / f"version-{number:04d}.safetensors"


def _open(directory: Path) -> sqlite3.Connection:
    path = directory / "registry.sqlite"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.touch(mode=OWNER_ONLY)
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(SCHEMA)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path}: expected a registry or room for one, got: {error}") from error
    return database


def _record(text: str, withdrawn: str | None) -> RoundRecord:
    fields = json.loads(text)
    fields["survivors"] = tuple(fields["survivors"])
    fields["second_moments"] = tuple(fields["second_moments"])
    fields["missing"] = {int(site): reason for site, reason in fields["missing"].items()}
    fields["groups"] = tuple(
        GroupRecord(**{**group, "survivors": tuple(group["survivors"])})
        for group in fields.get("groups", ())
    )
    fields["withdrawn"] = withdrawn or ""
    return RoundRecord(**fields)
