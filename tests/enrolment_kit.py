"""A federation on disk for tests: a coordinator, hospitals, and the files they exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner, Result

from hospitium_client.cli import app as site_app
from hospitium_client.enrolment import Decision, PinnedRosters
from hospitium_client.settings import SiteHome
from hospitium_common.enrolment.public_keys import node_public_pem
from hospitium_common.federation import FederationRoster, Member
from hospitium_common.secagg.keys import SiteKeys
from hospitium_server.cli import app as coordinator_app
from hospitium_server.enrolment import load_roster
from hospitium_server.settings import CoordinatorHome

NOW = 1_800_000_000
YEAR_S = 365 * 24 * 60 * 60


@dataclass
class Federation:
    """One folder with a coordinator and hospitals; commands run in it as at a terminal."""

    folder: Path

    @property
    def coordinator(self) -> CoordinatorHome:
        return CoordinatorHome(self.folder / "coordinator")

    def site(self, name: str) -> SiteHome:
        return SiteHome(self.folder / name)

    def run_coordinator(self, *arguments: str, typed: str = "") -> Result:
        home = ["--home", str(self.coordinator.path)]
        return CliRunner().invoke(coordinator_app, [*arguments, *home], input=typed)

    def run_site(self, name: str, *arguments: str, typed: str = "") -> Result:
        home = ["--home", str(self.folder / name)]
        return CliRunner().invoke(site_app, [*arguments, *home], input=typed)

    def found(self) -> None:
        succeed(self.run_coordinator("init", "thorax-net", "--host", "localhost"))

    def request(self, name: str, title: str | None = None) -> Path:
        succeed(self.run_site(name, "init", title or name.upper(), "--name", name))
        return self.folder / f"{name}.request.json"

    def enroll(self, name: str) -> Path:
        succeed(self.run_coordinator("enroll", f"{name}.request.json", "--yes"))
        return self.folder / f"{name}.admission.json"

    def join(self, name: str) -> None:
        self.request(name)
        self.enroll(name)
        succeed(self.run_site(name, "admit", f"{name}.admission.json", "--yes"))

    def relay(self, name: str) -> Decision:
        """The coordinator offers its newest roster to a hospital."""
        return PinnedRosters(self.site(name)).offer(load_roster(self.coordinator))


def succeed(result: Result) -> str:
    """Demand that a command did what it should, and return what it printed."""
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def refuse(result: Result) -> str:
    """Demand that a command refused with an error of ours, and return its text."""
    assert result.exception is not None, result.output
    assert type(result.exception).__module__ == "hospitium_common.errors", repr(result.exception)
    return str(result.exception)


def member(index: int, name: str | None = None, **changes: object) -> Member:
    """A hospital with fresh keys that is enrolled for a year."""
    fields = {
        "index": index,
        "name": name or f"site-{index}",
        "title": f"Hospital {index}",
        "keys": SiteKeys.generate().public(),
        "node_key": node_public_pem(ec.generate_private_key(ec.SECP384R1()).public_key()),
        "expires": NOW + YEAR_S,
    }
    return Member(**{**fields, **changes})


class Governance:
    """Signs rosters of three hospitals; ``next`` changes the newest one."""

    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.coordinator = Ed25519PrivateKey.generate().public_key().public_bytes_raw()

    def roster(self, *members: Member, version: int = 4) -> FederationRoster:
        return FederationRoster(
            name="thorax-net",
            version=version,
            coordinator=self.coordinator,
            governance=self.key.public_key().public_bytes_raw(),
            members=members,
        ).signed_by(self.key)

    def next(self, roster: FederationRoster, **changes: object) -> FederationRoster:
        changes = {"version": roster.version + 1, **changes}
        return replace(roster, **changes).signed_by(self.key)
