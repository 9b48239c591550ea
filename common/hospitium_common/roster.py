"""The roster: who is enrolled, under which keys, signed outside the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.secagg.hashing import Label, is_signed_by, sign, tagged_hash
from hospitium_common.secagg.keys import PublicKeys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LARGEST_INDEX = 255


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Roster index 1…255 -> public keys, for one study and one key epoch.

    ``coordinator`` is the coordinator's Ed25519 key. Governance keys sign ``digest``: the
    coordinator alone can neither add a site nor swap a key.
    """

    study: bytes
    epoch: int
    coordinator: bytes
    sites: Mapping[int, PublicKeys]
    signatures: tuple[tuple[bytes, bytes], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.sites or not all(1 <= index <= LARGEST_INDEX for index in self.sites):
            raise ConfigError("roster: expected sites with indices 1 to 255")
        keys = [key for public in self.sites.values() for key in public.parts()]
        if len(set(keys)) != len(keys):
            raise ConfigError("roster: expected every key once, got the same key twice")

    @cached_property
    def digest(self) -> bytes:
        """What stands for this roster in every context and signature."""
        sites = [encode_parts(i, *self.sites[i].parts()) for i in sorted(self.sites)]
        return tagged_hash(Label.ROSTER, self.study, self.epoch, self.coordinator, *sites)

    def signed_by(self, governance: Ed25519PrivateKey) -> Roster:
        """Return the roster with one more governance signature."""
        public = governance.public_key().public_bytes_raw()
        signature = sign(governance, Label.ROSTER_SIGNATURE, self.digest)
        return Roster(
            study=self.study, epoch=self.epoch, coordinator=self.coordinator, sites=self.sites,
            signatures=(*self.signatures, (public, signature)),
        )  # fmt: skip

    def check(self, governance: Sequence[bytes], quorum: int = 1) -> None:
        """Demand signatures by ``quorum`` of the governance keys that this site trusts.

        Raises:
            PeerProtocolError: there are too few.
        """
        agreed = {
            public
            for public, signature in self.signatures
            if public in governance
            and is_signed_by(public, signature, Label.ROSTER_SIGNATURE, self.digest)
        }
        if len(agreed) < quorum:
            raise PeerProtocolError(
                f"roster: expected {quorum} governance signatures, got {len(agreed)}", blame=0
            )

    def encode(self) -> bytes:
        """Return the roster as bytes, for those who check a round afterwards."""
        return encode_parts(
            self.study, self.epoch, self.coordinator,
            encode_parts(*(encode_parts(i, *self.sites[i].parts()) for i in sorted(self.sites))),
            encode_parts(*(part for pair in self.signatures for part in pair)),
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> Roster:
        """Read what ``encode`` wrote; signatures are not checked here.

        Raises:
            PeerProtocolError: the bytes are no roster.
        """
        reader = Reader(data)
        study, epoch, coordinator = reader.bytes(32), reader.integer(), reader.bytes(32)
        rows, sites = Reader(reader.part()), dict[int, PublicKeys]()
        while not rows.at_end:
            row = Reader(rows.part())
            index = row.integer()
            sites[index] = PublicKeys(
                sign=row.bytes(32), exchange=row.bytes(32), encapsulate=row.bytes()
            )
            row.finish()
        pairs, signatures = Reader(reader.part()), list[tuple[bytes, bytes]]()
        while not pairs.at_end:
            signatures.append((pairs.bytes(32), pairs.bytes(64)))
        reader.finish()
        try:
            roster = cls(
                study=study, epoch=epoch, coordinator=coordinator, sites=sites,
                signatures=tuple(signatures),
            )  # fmt: skip
        except ConfigError as error:
            raise PeerProtocolError(str(error)) from error
        if roster.encode() != data:
            raise PeerProtocolError("expected a roster in its one form, got another order")
        return roster
