"""A study's folder at the coordinator: what was submitted, what people want, and how it stands.

```
studies/<id>/
  study.toml  study.toml.sig       the study as submitted, and the coordinator's signature
  first.safetensors                its first weights
  order.json                       what a person wants: that it runs, or that it stops
  status.json                      how it stands, written by whoever runs it
  registry.sqlite  version-*.safetensors  rounds/    (registry.py, archive.py)
  model.safetensors  report.html   when it is finished
```

Commands and the server meet only here: a command writes the order, the server does it. So a study
can be submitted while the server is down, and no command ever needs one of its secrets.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError
from hospitium_common.first_model import load_first_model, make_first_model
from hospitium_common.study import load_study
from hospitium_common.study.signature import sign_study, signature_path

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.study import Study

FORMAT = 1
NOT_CONNECTED = "its node is not connected"


class State(StrEnum):
    """How a study stands."""

    SUBMITTED = "submitted"
    """The server has not taken it up yet."""
    WAITING = "waiting"
    """Not enough sites stand ready."""
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    """Somebody stopped it."""
    FAILED = "failed"
    """It stopped itself, and says why; it goes on when somebody resumes it."""


ENDED = (State.FINISHED, State.STOPPED, State.FAILED)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a person wants: ``number`` counts their orders, so that each is carried out once."""

    number: int
    run: bool


@dataclass(frozen=True, kw_only=True)
class SiteStatus:
    """Where a site is, since when (seconds since 1970), and in which round it was summed last."""

    name: str
    what: str
    since: float
    last_round: int | None = None


@dataclass(frozen=True, kw_only=True)
class RoundStatus:
    """A finished training round: who was missing, and how the model did that the sites received.

    Figures are totals over all sites; no file here holds one site's or one patient's.
    """

    round: int
    sites: tuple[int, ...]
    missing: dict[int, str] = field(default_factory=dict)
    auroc: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    rejected: str = ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a study stands. ``order`` is the last order that was carried out."""

    state: State
    order: int = 0
    reason: str = ""
    what: str = ""
    since: float = 0.0
    round: int = 0
    sites: dict[int, SiteStatus] = field(default_factory=dict)
    rounds: tuple[RoundStatus, ...] = ()

    def encode(self) -> bytes:
        """Return the status as the JSON text of its file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what ``encode`` wrote."""
        fields: dict[str, Any] = json.loads(data)
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        sites = {int(site): SiteStatus(**one) for site, one in fields.pop("sites").items()}
        rounds = tuple(_round_status(one) for one in fields.pop("rounds"))
        return cls(state=State(fields.pop("state")), sites=sites, rounds=rounds, **fields)


class StudyFolder:
    """One study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def id(self) -> str:
        """The study's id."""
        return self.path.name

    @property
    def file(self) -> Path:
        """The study as it was submitted."""
        return self.path / "study.toml"

    @property
    def first_model(self) -> Path:
        """Its first weights."""
        return self.path / "first.safetensors"

    @property
    def report(self) -> Path:
        """The report's page."""
        return self.path / "report.html"

    def study(self) -> Study:
        """Read the study.

        Raises:
            ConfigError: it is damaged.
        """
        return load_study(self.file)

    def offer(self) -> tuple[bytes, bytes]:
        """Return the study's document and its signature as bytes."""
        return self.file.read_bytes(), signature_path(self.file).read_bytes()

    def order(self) -> Order:
        """Return what a person wants.

        Raises:
            ConfigError: nobody wants anything: the submission was cut off.
        """
        path = self.path / "order.json"
        try:
            return Order(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected an order, got none that can be read; submit the study again"
            ) from error

    def give_order(self, *, run: bool) -> Order:
        """Write down what a person wants."""
        try:
            number = self.order().number + 1
        except ConfigError:
            number = 1
        order = Order(number=number, run=run)
        write_durably(self.path / "order.json", json.dumps(asdict(order)).encode())
        return order

    def status(self) -> Status:
        """Return how the study stands; just submitted, if nobody wrote anything yet.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.path / "status.json"
        try:
            return Status.decode(path.read_bytes())
        except FileNotFoundError:
            return Status(state=State.SUBMITTED)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected a status, got none that can be read; remove the file, "
                "the study itself is elsewhere"
            ) from error

    def write_status(self, status: Status) -> None:
        """Write down how the study stands."""
        write_durably(self.path / "status.json", status.encode())

    def end(self, state: State, reason: str) -> None:
        """Write down that nobody works on the study any more, and why.

        What is finished stays finished, even if somebody ordered to stop while it ended.
        """
        status = self.status()
        if status.state is State.FINISHED:
            state, reason = State.FINISHED, ""
        self.write_status(
            replace(status, state=state, reason=reason, what="", since=time.time(),
                    order=self.order().number)
        )  # fmt: skip

    @property
    def is_wanted(self) -> bool:
        """Whether somebody should work on it: it is ordered to run and has not ended since."""
        order, status = self.order(), self.status()
        return order.run and (status.order < order.number or status.state not in ENDED)


def submit(studies: Path, file: Path, key: Ed25519PrivateKey) -> StudyFolder:
    """Check a study, sign it, make its first model, and order it to run.

    Raises:
        ConfigError: the study is wrong, or another one under this id is there already.
    """
    study = load_study(file)
    folder = StudyFolder(studies / study.study.id)
    if (folder.path / "order.json").exists():
        same = folder.study().digest == study.digest
        raise ConfigError(
            f"{folder.path}: "
            + ("this study was submitted before; `hospitium study resume` lets it go on" if same
               else "expected a new id, got that of another study; give this one its own id")
        )  # fmt: skip
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_durably(folder.file, file.read_bytes())
    sign_study(study, folder.file, key)
    if folder.first_model.exists():
        load_first_model(folder.first_model, study)  # made on another machine: is it this study's?
    else:
        make_first_model(folder.file, folder.first_model)
    folder.give_order(run=True)
    return folder


def find(studies: Path, name: str) -> StudyFolder:
    """Return a study by its id.

    Raises:
        ConfigError: there is none.
    """
    known = {folder.id: folder for folder in every(studies)}
    if name not in known:
        listed = ", ".join(known) or "none was submitted yet"
        raise ConfigError(f"{name}: expected the id of a study, got another word; known: {listed}")
    return known[name]


def every(studies: Path) -> tuple[StudyFolder, ...]:
    """Return every study that was submitted, by id."""
    return tuple(StudyFolder(path.parent) for path in sorted(studies.glob("*/order.json")))


def _round_status(fields: dict[str, Any]) -> RoundStatus:
    missing = {int(site): why for site, why in fields.pop("missing").items()}
    return RoundStatus(sites=tuple(fields.pop("sites")), missing=missing, **fields)
