"""The federation's roster: everybody who is enrolled, in versions that the governance key signs.

A site pins the governance key when it is enrolled, and from then on goes by the newest version it
accepted. The coordinator's server relays rosters; it cannot add a hospital or swap a key, because
it does not need the governance key to run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hospitium_common.codec import encode_parts
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.roster import LARGEST_INDEX, Roster
from hospitium_common.secagg.hashing import Label, is_signed_by, sign, tagged_hash
from hospitium_common.secagg.keys import PublicKeys

if TYPE_CHECKING:
    from collections.abc import Collection

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Member:
    """An enrolled site.

    ``index`` (1 to 255) is given once and never again; ``node_key`` is the public key with which
    its node logs in to the coordinator's server; ``expires`` is in seconds since 1970.
    """

    index: int
    name: str
    title: str
    keys: PublicKeys
    node_key: bytes
    expires: int
    revoked: bool = False

    def encode(self) -> bytes:
        """Return the member as bytes to sign."""
        return encode_parts(
            self.index, self.name.encode(), self.title.encode(), *self.keys.parts(),
            self.node_key, self.expires, int(self.revoked),
        )  # fmt: skip

    def is_active(self, now: float) -> bool:
        """Whether the site may take part at this time (seconds since 1970)."""
        return not self.revoked and now < self.expires


@dataclass(frozen=True, kw_only=True)
class FederationRoster:
    """One version of the roster. ``coordinator`` and ``governance`` are Ed25519 public keys."""

    name: str
    version: int
    coordinator: bytes
    governance: bytes
    members: tuple[Member, ...]
    signature: bytes = b""

    def __post_init__(self) -> None:
        indices = [member.index for member in self.members]
        if indices != sorted(set(indices)) or not all(1 <= i <= LARGEST_INDEX for i in indices):
            raise ConfigError("roster: expected sites with rising indices from 1 to 255")
        names = [member.name for member in self.members]
        keys = [key for m in self.members for key in (*m.keys.parts(), m.node_key)]
        if len(set(names)) != len(names) or len(set(keys)) != len(keys):
            raise ConfigError("roster: expected every name and every key once, got one twice")

    @cached_property
    def digest(self) -> bytes:
        """What the governance key signs."""
        members = (member.encode() for member in self.members)
        return tagged_hash(
            Label.FEDERATION, self.name.encode(), self.version, self.coordinator, self.governance,
            *members,
        )  # fmt: skip

    def signed_by(self, governance: Ed25519PrivateKey) -> FederationRoster:
        """Return the same version with the governance key's signature."""
        return replace(self, signature=sign(governance, Label.FEDERATION, self.digest))

    def check(self, governance: bytes) -> None:
        """Demand the signature of the governance key that was pinned.

        Raises:
            PeerProtocolError: it is another's, or none.
        """
        if self.governance != governance or not is_signed_by(
            governance, self.signature, Label.FEDERATION, self.digest
        ):
            raise PeerProtocolError(
                f"roster version {self.version}: expected the signature of the governance key "
                "that this site pinned",
                blame=0,
            )

    def member(self, index: int) -> Member:
        """Return the site with this index.

        Raises:
            PeerProtocolError: there is none.
        """
        for member in self.members:
            if member.index == index:
                return member
        raise PeerProtocolError(f"roster version {self.version}: expected site {index}, got none")

    def for_study(self, study: bytes, epoch: int, sites: Collection[int]) -> Roster:
        """Return the roster of one study and key epoch: the sites that pair in it.

        Raises:
            PeerProtocolError: a site is not enrolled, or was revoked.
        """
        members = [self.member(index) for index in sorted(sites)]
        revoked = [member.name for member in members if member.revoked]
        if revoked:
            raise PeerProtocolError(f"expected enrolled sites, got revoked ones: {revoked}", 0)
        return Roster(
            study=study,
            epoch=epoch,
            coordinator=self.coordinator,
            sites={member.index: member.keys for member in members},
        )

    def encode(self) -> bytes:
        """Return the roster as the JSON text of its file."""
        document = {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "coordinator": self.coordinator.hex(),
            "governance": self.governance.hex(),
            "members": [
                {
                    "index": member.index,
                    "name": member.name,
                    "title": member.title,
                    "sign": member.keys.sign.hex(),
                    "exchange": member.keys.exchange.hex(),
                    "encapsulate": member.keys.encapsulate.hex(),
                    "node_key": member.node_key.hex(),
                    "expires": member.expires,
                    "revoked": member.revoked,
                }
                for member in self.members
            ],
            "signature": self.signature.hex(),
        }
        return json.dumps(document, indent=2, ensure_ascii=False).encode()

    @classmethod
    def decode(cls, data: bytes) -> FederationRoster:
        """Read what ``encode`` wrote; the signature is not checked here.

        Raises:
            PeerProtocolError: the bytes are no roster.
        """
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise ValueError("another format")
            return cls(
                name=_text(fields["name"]),
                version=_count(fields["version"]),
                coordinator=_bytes(fields["coordinator"], 32),
                governance=_bytes(fields["governance"], 32),
                members=tuple(_member(row) for row in fields["members"]),
                signature=_bytes(fields["signature"], 64) if fields["signature"] else b"",
            )
        except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
            raise PeerProtocolError("expected a roster, got something else", blame=0) from error


@dataclass(frozen=True, kw_only=True)
class RosterChanges:
    """What a newer roster changes, by the sites' names."""

    added: tuple[str, ...]
    revoked: tuple[str, ...]
    other_keys: tuple[str, ...]
    """Sites that are there under other keys, or gone, or back after they were revoked."""
    extended: tuple[str, ...]
    """Sites whose title or expiry changed."""
    other_coordinator: bool

    @property
    def need_a_person(self) -> bool:
        """Whether an administrator must have compared something by telephone first."""
        return bool(self.other_keys) or self.other_coordinator


def changes(pinned: FederationRoster, offered: FederationRoster) -> RosterChanges:
    """Compare two versions, site by site."""
    before = {member.index: member for member in pinned.members}
    after = {member.index: member for member in offered.members}
    both = [(before[index], after[index]) for index in sorted(before.keys() & after.keys())]
    gone = [before[index].name for index in sorted(before.keys() - after.keys())]
    return RosterChanges(
        added=tuple(after[index].name for index in sorted(after.keys() - before.keys())),
        revoked=tuple(new.name for old, new in both if new.revoked and not old.revoked),
        other_keys=(*gone, *(new.name for old, new in both if not _is_the_same_site(old, new))),
        extended=tuple(
            new.name for old, new in both
            if (old.title, old.expires) != (new.title, new.expires)
        ),
        other_coordinator=(pinned.coordinator, pinned.governance, pinned.name)
        != (offered.coordinator, offered.governance, offered.name),
    )  # fmt: skip


def _is_the_same_site(old: Member, new: Member) -> bool:
    known = (old.name, old.keys, old.node_key) == (new.name, new.keys, new.node_key)
    return known and not (old.revoked and not new.revoked)


def _member(row: dict[str, Any]) -> Member:
    revoked = row["revoked"]
    if not isinstance(revoked, bool):
        raise TypeError("expected true or false")
    return Member(
        index=_count(row["index"]),
        name=_text(row["name"]),
        title=_text(row["title"]),
        keys=PublicKeys(
            sign=_bytes(row["sign"], 32),
            exchange=_bytes(row["exchange"], 32),
            encapsulate=_bytes(row["encapsulate"], 1184),
        ),
        node_key=_bytes(row["node_key"]),
        expires=_count(row["expires"]),
        revoked=revoked,
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 200:
        raise TypeError("expected a text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError("expected a count")
    return value


def _bytes(value: object, length: int | None = None) -> bytes:
    data = bytes.fromhex(_hex(value))
    if length is not None and len(data) != length:
        raise ValueError("expected another length")
    return data


def _hex(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("expected hexadecimal text")
    return value
