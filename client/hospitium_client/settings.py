"""The hospital's folder: where everything is, and the settings in `site.toml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from hospitium_common.errors import ConfigError
from hospitium_common.study.sections import Identifier
from hospitium_common.toml_file import quoted, read_toml

TEMPLATE = """\
# This hospital's settings. A relative path starts at the folder of this file.
name = {name}
title = {title}

[coordinator]
address = ""                        # host:port; `hospitium site admit` writes it here

[data]
default = ""                        # the folder with this hospital's records, e.g. "/srv/records"

[data.studies]                      # for a study that reads another folder: its id = "folder"

[compute]
device = "cpu"                      # where models train: "cpu", "cuda" or "cuda:NUMBER"

[keys]
passphrase_file = ""                # mode 0600; empty: no passphrase, the environment variable
                                    # HOSPITIUM_SITE_PASSPHRASE, or asked for at the start

[polling]
busy_s = 0.15                       # seconds between two looks while a study runs
idle_s = 5.0                        # longest pause in seconds when nothing runs
"""


def _address(value: str) -> str:
    """``host:port``, or nothing before the site was admitted."""
    host, colon, port = value.rpartition(":")
    if value and not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"expected host:port such as fl.example.org:9092, got {value!r}")
    if "/" in value or any(sign.isspace() for sign in value):
        raise ValueError(f"expected host:port without https:// and spaces, got {value!r}")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CoordinatorAddress(_Section):
    """``[coordinator]``: where the node dials in."""

    address: Annotated[str, AfterValidator(_address)] = ""


class Data(_Section):
    """``[data]``: which folder holds the records of a study; "" is none."""

    default: str = ""
    studies: dict[str, str] = Field(default_factory=dict)


class Compute(_Section):
    """``[compute]``: what trains the models, by torch's name for it."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")


class Keys(_Section):
    """``[keys]``: how the keys are unlocked."""

    passphrase_file: str = ""


class Polling(_Section):
    """``[polling]``: how often the node looks for work, in seconds."""

    busy_s: float = Field(default=0.15, ge=0.05, le=5)
    idle_s: float = Field(default=5.0, ge=0.1, le=300)

    @model_validator(mode="after")
    def _idle_is_slower(self) -> Self:
        if self.idle_s < self.busy_s:
            raise ValueError(f"expected idle_s ≥ busy_s, got {self.idle_s} < {self.busy_s}")
        return self


class SiteSettings(_Section):
    """`site.toml`; ``SiteHome`` resolves its paths."""

    name: Identifier
    title: str = Field(min_length=1, max_length=200)
    coordinator: CoordinatorAddress = CoordinatorAddress()
    data: Data = Data()
    compute: Compute = Compute()
    keys: Keys = Keys()
    polling: Polling = Polling()


@dataclass(frozen=True)
class SiteHome:
    """The folder of one hospital."""

    path: Path

    def settings(self) -> SiteSettings:
        """Read `site.toml`.

        Raises:
            ConfigError: it is missing or wrong; one line per mistake, naming file and key.
        """
        return read_toml(
            SiteSettings,
            self.settings_file,
            what="this hospital's settings",
            remedy='`hospitium site init "NAME OF THE HOSPITAL"` makes them, --home or '
            "HOSPITIUM_SITE_HOME says where they are",
        )

    def data_of(self, study: str) -> Path:
        """Return the folder with the records of a study (its id).

        Raises:
            ConfigError: `site.toml` names none.
        """
        data = self.settings().data
        folder = data.studies.get(study, data.default)
        if not folder:
            raise ConfigError(
                f"{self.settings_file}: data.default: expected the folder with this hospital's "
                f"records, or one for {study} under [data.studies], got neither"
            )
        return self.path / folder

    @property
    def settings_file(self) -> Path:
        """`site.toml`."""
        return self.path / "site.toml"

    @property
    def policy(self) -> Path:
        """What this hospital allows."""
        return self.path / "policy.toml"

    @property
    def ledger(self) -> Path:
        """The privacy spent at this hospital."""
        return self.path / "ledger.sqlite"

    @property
    def studies(self) -> Path:
        """One folder for each study, named by its digest."""
        return self.path / "studies"

    @property
    def site_keys(self) -> Path:
        """The trainer's keys: they sign, and receive secrets."""
        return self.path / "keys" / "site.keys"

    @property
    def node_key(self) -> Path:
        """The key with which the node logs in to the coordinator's server."""
        return self.path / "keys" / "node.key"

    @property
    def next_site_keys(self) -> Path:
        """New keys of the trainer that wait for their admission."""
        return self.path / "keys" / "next" / "site.keys"

    @property
    def next_node_key(self) -> Path:
        """The new key of the node that waits with them."""
        return self.path / "keys" / "next" / "node.key"

    @property
    def request(self) -> Path:
        """The newest request for enrolment, as it was handed out."""
        return self.path / "request.json"

    @property
    def pinned(self) -> Path:
        """What this hospital trusts: ``roster.json`` and ``ca.pem``; perhaps ``pending.json``."""
        return self.path / "pinned"

    @property
    def ca(self) -> Path:
        """The CA of the coordinator's server."""
        return self.pinned / "ca.pem"

    @property
    def socket(self) -> Path:
        """Where node and trainer meet."""
        return self.path / "run" / "trainer.sock"

    @property
    def log(self) -> Path:
        """The folder of the logs."""
        return self.path / "log"


def settings_text(name: str, title: str) -> str:
    """Return a commented `site.toml`."""
    return TEMPLATE.format(name=quoted(name), title=quoted(title))
