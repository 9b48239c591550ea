"""The coordinator's folder: where everything is, and the settings in `coordinator.toml`."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hospitium_common.toml_file import quoted, read_toml

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")  # RFC 1123
TEMPLATE = """\
# The coordinator of one federation. A relative path starts at the folder of this file.
name = {name}                     # what the federation is called, in every roster

[network]
hosts = {hosts}    # how hospitals reach this machine; every one is in the certificate
port = {port}                         # the one public port: HTTPS, hospitals dial in here
listen = "0.0.0.0"                  # the address that this port is bound to
local_port = {local_port}                   # control of the server, on 127.0.0.1 only

[tls]
certificate = "tls/server.pem"      # `hospitium coordinator renew` makes a new one
key = "tls/server.key"
ca = "tls/ca.pem"                   # what hospitals trust; pinned when they are admitted
warn_days = 30                      # how long before it expires to ask for a renewal

[enrolment]
valid_days = 730                    # how long a hospital is enrolled before it must rotate its keys

[storage]
superlink = "superlink"             # the server's database: only masked and signed bytes
studies = "studies"                 # models, transcripts, figures and reports of every study
masked_vectors = false              # keep them too, so that `hospitium audit-round` can recompute
                                    # sums; sites x parameters x 2 to 4 bytes for every round
"""


def _host(value: str) -> str:
    """A host name (RFC 1123) or an IP address, as a hospital would dial it."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        if not HOST_NAME.fullmatch(value.lower()):
            raise ValueError(
                f"expected a host name or an IP address such as fl.example.org or 10.0.0.5, "
                f"got {value!r}; no https://, no port"
            ) from None
        return value.lower()


Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Network(_Section):
    """``[network]``: where hospitals reach the coordinator."""

    hosts: tuple[Host, ...] = Field(min_length=1)
    port: Port = 9092
    listen: Host = "0.0.0.0"  # noqa: S104 - hospitals dial in from outside
    local_port: Port = 9093

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address as ``host:port``; IPv6 addresses in brackets."""
        return tuple(f"[{h}]:{self.port}" if ":" in h else f"{h}:{self.port}" for h in self.hosts)


class Tls(_Section):
    """``[tls]``: the certificate that hospitals see."""

    certificate: Path = Path("tls/server.pem")
    key: Path = Path("tls/server.key")
    ca: Path = Path("tls/ca.pem")
    warn_days: int = Field(default=30, ge=1, le=180)


class Enrolment(_Section):
    """``[enrolment]``: for how long a hospital is enrolled."""

    valid_days: int = Field(default=730, ge=1, le=3650)


class Storage(_Section):
    """``[storage]``: folders of the server and of the studies, and what audits can go back to."""

    superlink: Path = Path("superlink")
    studies: Path = Path("studies")
    masked_vectors: bool = False


class CoordinatorSettings(_Section):
    """`coordinator.toml`; paths are as written there: ``CoordinatorHome`` resolves them."""

    name: str = Field(min_length=1, max_length=80)
    network: Network
    tls: Tls = Tls()
    enrolment: Enrolment = Enrolment()
    storage: Storage = Storage()


@dataclass(frozen=True)
class CoordinatorHome:
    """The folder of one coordinator."""

    path: Path

    def settings(self) -> CoordinatorSettings:
        """Read `coordinator.toml`.

        Raises:
            ConfigError: it is missing or wrong; one line per mistake, naming file and key.
        """
        return read_toml(
            CoordinatorSettings,
            self.settings_file,
            what="the coordinator's settings",
            remedy="`hospitium coordinator init NAME --host HOST` makes them, --home or "
            "HOSPITIUM_COORDINATOR_HOME says where they are",
        )

    def resolve(self, path: Path) -> Path:
        """Return a path of the settings as seen from here."""
        return self.path / path

    @property
    def settings_file(self) -> Path:
        """`coordinator.toml`."""
        return self.path / "coordinator.toml"

    @property
    def coordinator_key(self) -> Path:
        """The Ed25519 key that signs studies and requests."""
        return self.path / "keys" / "coordinator.key"

    @property
    def governance_key(self) -> Path:
        """The Ed25519 key that signs rosters; better kept elsewhere."""
        return self.path / "keys" / "governance.key"

    @property
    def governance_public(self) -> Path:
        """Its public half (hexadecimal), which stays when the key is moved away."""
        return self.path / "keys" / "governance.pub"

    @property
    def ca_key(self) -> Path:
        """The key that signs server certificates."""
        return self.path / "tls" / "ca.key"

    @property
    def roster(self) -> Path:
        """The newest roster; older versions are kept in ``rosters``."""
        return self.path / "roster.json"

    @property
    def rosters(self) -> Path:
        """Every version that was ever signed."""
        return self.path / "rosters"

    @property
    def admissions(self) -> Path:
        """What was handed to the hospitals."""
        return self.path / "admissions"


def settings_text(name: str, hosts: tuple[str, ...], port: int, local_port: int) -> str:
    """Return a commented `coordinator.toml`."""
    listed = "[" + ", ".join(quoted(host) for host in hosts) + "]"
    return TEMPLATE.format(name=quoted(name), hosts=listed, port=port, local_port=local_port)
