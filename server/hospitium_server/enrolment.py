"""Who is enrolled: requests in, rosters and admissions out, signed with the governance key.

Order matters when the power fails: a new version of the roster is on disk before anything that
was signed with it is handed out, so that one version number never names two rosters.
"""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.enrolment.admission import Admission
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.federation import FederationRoster, Member
from hospitium_common.roster import LARGEST_INDEX
from hospitium_server.certificates import certificate_pem, load_certificate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.enrolment.request import EnrolmentRequest
    from hospitium_server.settings import CoordinatorHome


class Kind(Enum):
    """What enrolling a request means."""

    NEW = "a new hospital"
    ROTATION = "new keys, vouched for by the old ones"
    RETURN = "a hospital that was revoked or has expired comes back under new keys"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What enrolling a request would do, before anybody agreed to it."""

    kind: Kind
    before: Member | None
    after: Member


def load_roster(home: CoordinatorHome) -> FederationRoster:
    """Read the newest roster and check that governance signed it.

    Raises:
        ConfigError: it is missing, damaged, or not signed by this federation's governance key.
    """
    try:
        data = home.roster.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{home.roster}: expected the roster, got: {error.strerror}; restore it from "
            f"{home.rosters} or your back-up"
        ) from error
    try:
        roster = FederationRoster.decode(data)
        roster.check(read_governance(home))
    except PeerProtocolError as error:
        raise ConfigError(f"{home.roster}: {error}; restore it from your back-up") from error
    return roster


def read_governance(home: CoordinatorHome) -> bytes:
    """Read the public governance key, which is here also when the private one is kept elsewhere.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = home.governance_public
    try:
        public = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise ConfigError(
            f"{path}: expected the public governance key, got: {error.strerror}; is "
            f"{home.path} the coordinator's folder? `hospitium coordinator init` makes one"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: expected hexadecimal digits, got something else") from error
    if len(public) != 32:
        raise ConfigError(f"{path}: expected a key of 32 bytes, got {len(public)}")
    return public


def keys_ever_used(home: CoordinatorHome) -> dict[bytes, str]:
    """Return every public key of every version of the roster, and whose it was.

    Raises:
        ConfigError: a version is damaged.
    """
    used = {}
    for path in (*sorted(home.rosters.glob("*.json")), home.roster):
        try:
            roster = FederationRoster.decode(path.read_bytes())
        except (OSError, PeerProtocolError) as error:
            raise ConfigError(f"{path}: expected a roster, got a damaged file") from error
        for member in roster.members:
            used.update(dict.fromkeys((*member.keys.parts(), member.node_key), member.name))
    return used


def plan_enrolment(
    roster: FederationRoster,
    request: EnrolmentRequest,
    used: Mapping[bytes, str],
    *,
    expires: int,
    now: float,
) -> Plan:
    """Decide what enrolling a request would do; nothing is changed.

    ``used`` are the keys that were ever enrolled; times are in seconds since 1970.

    Raises:
        ConfigError: the request does not hold, or is a duplicate in some way; says of whom.
    """
    request.check()
    plan_kind = _plan_rotation if request.is_rotation else _plan_entry
    plan = plan_kind(roster, request, expires, now)
    taken = {used[key] for key in (*request.keys.parts(), request.node_key) if key in used}
    if taken:
        raise ConfigError(
            f"{request.name}: expected keys that were never enrolled, got keys of "
            f"{', '.join(sorted(taken))}; the hospital must make new ones"
        )
    return plan


def enroll(roster: FederationRoster, plan: Plan, governance: Ed25519PrivateKey) -> FederationRoster:
    """Return the next version of the roster, with the plan carried out.

    Raises:
        ConfigError: this is not the federation's governance key.
    """
    others = [member for member in roster.members if member.index != plan.after.index]
    return next_version(roster, (*others, plan.after), governance)


def revoke(roster: FederationRoster, name: str, governance: Ed25519PrivateKey) -> FederationRoster:
    """Return the next version of the roster, with one hospital revoked.

    It stays in the roster: its index and its keys are never given to anybody else.

    Raises:
        ConfigError: there is no such hospital, or it is revoked already.
    """
    member = find(roster, name)
    if member.revoked:
        raise ConfigError(f"{name}: expected an enrolled hospital, it was revoked already")
    others = [other for other in roster.members if other.index != member.index]
    return next_version(roster, (*others, replace(member, revoked=True)), governance)


def next_version(
    roster: FederationRoster, members: tuple[Member, ...], governance: Ed25519PrivateKey
) -> FederationRoster:
    """Return the next version, signed.

    Raises:
        ConfigError: this is not the federation's governance key.
    """
    if governance.public_key().public_bytes_raw() != roster.governance:
        raise ConfigError(
            "expected the governance key of this federation, got another; name it with "
            "--governance-key"
        )
    ordered = tuple(sorted(members, key=lambda member: member.index))
    return replace(roster, version=roster.version + 1, members=ordered).signed_by(governance)


def store_roster(home: CoordinatorHome, roster: FederationRoster) -> None:
    """Keep a new version, durably; older ones stay in ``rosters``."""
    home.rosters.mkdir(mode=0o700, exist_ok=True)
    write_durably(home.rosters / f"{roster.version:05d}.json", roster.encode())
    write_durably(home.roster, roster.encode())


def write_admission(
    home: CoordinatorHome, roster: FederationRoster, name: str, governance: Ed25519PrivateKey
) -> Path:
    """Write what the hospital gets: addresses, CA, roster, signed with the governance key."""
    settings, member = home.settings(), find(roster, name)
    admission = Admission(
        index=member.index,
        addresses=settings.network.addresses,
        ca=certificate_pem(load_certificate(home.resolve(settings.tls.ca))),
        roster=roster,
    ).signed_by(governance)
    home.admissions.mkdir(mode=0o700, exist_ok=True)
    path = home.admissions / f"{name}.admission.json"
    write_durably(path, admission.encode())
    return path


def find(roster: FederationRoster, name: str) -> Member:
    """Return the hospital with this short name.

    Raises:
        ConfigError: there is none.
    """
    for member in roster.members:
        if member.name == name:
            return member
    known = ", ".join(member.name for member in roster.members) or "nobody yet"
    raise ConfigError(f"expected the name of an enrolled hospital, got {name!r}; enrolled: {known}")


@contextmanager
def one_at_a_time(home: CoordinatorHome) -> Iterator[None]:
    """Let one command change the roster at a time.

    Raises:
        ConfigError: another one is at it.
    """
    with (home.path / ".enrolment.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{home.path}: expected nobody else to change the roster now, another command "
                "does; try again"
            ) from error
        yield


def _plan_rotation(
    roster: FederationRoster, request: EnrolmentRequest, expires: int, now: float
) -> Plan:
    """Match a rotation with the hospital whose keys it replaces."""
    old = next((m for m in roster.members if m.keys.sign == request.replaces), None)
    if old is None or old.name != request.name:
        raise ConfigError(
            f"{request.name}: expected a request signed with this hospital's enrolled key, got "
            "one signed with another; it may have rotated its keys since"
        )
    if old.revoked:
        raise ConfigError(
            f"{request.name}: expected an enrolled hospital to rotate its keys, it was revoked: "
            "its old key vouches for nothing. It needs `hospitium site rotate --lost`"
        )
    kind = Kind.ROTATION if old.is_active(now) else Kind.RETURN
    return Plan(kind=kind, before=old, after=_member(old.index, request, expires))


def _plan_entry(
    roster: FederationRoster, request: EnrolmentRequest, expires: int, now: float
) -> Plan:
    """Find an index for a new hospital, or the old one of a hospital that comes back."""
    old = next((member for member in roster.members if member.name == request.name), None)
    if old is None:
        index = max((member.index for member in roster.members), default=0) + 1
        if index > LARGEST_INDEX:
            raise ConfigError(f"expected at most {LARGEST_INDEX} hospitals, the roster is full")
        return Plan(kind=Kind.NEW, before=None, after=_member(index, request, expires))
    if (old.keys, old.node_key) == (request.keys, request.node_key) and not old.revoked:
        remedy = (
            f"`hospitium coordinator admission {old.name}` writes its admission again"
            if old.is_active(now)
            else "its enrolment has expired: it sends a request of `hospitium site rotate`"
        )
        raise ConfigError(
            f"{old.name}: expected a new hospital, it is enrolled already as site {old.index}; "
            f"{remedy}"
        )
    if old.is_active(now):
        raise ConfigError(
            f"{old.name}: expected a name that nobody has, site {old.index} has it under other "
            "keys. To rotate keys: `hospitium site rotate`. If they were lost: "
            f"`hospitium coordinator revoke {old.name}` first. Another hospital: `site init --name`"
        )
    return Plan(kind=Kind.RETURN, before=old, after=_member(old.index, request, expires))


def _member(index: int, request: EnrolmentRequest, expires: int) -> Member:
    return Member(
        index=index,
        name=request.name,
        title=request.title,
        keys=request.keys,
        node_key=request.node_key,
        expires=expires,
    )
