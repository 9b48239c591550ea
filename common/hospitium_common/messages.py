"""Every message between coordinator and site, and the only place where their bytes are laid out.

A message is one version byte, one kind byte, and length-prefixed parts. The four exchanges of a
round are those of HSA-1 (`secagg/README.md`); pair offers are relayed once per key epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.secagg.fixed_point import Quantiser
from hospitium_common.secagg.hashing import Label, bitmap, members, tagged_hash

VERSION = 1
SEALED_SHARE_BYTES = 12 + 64 + 16
"""Nonce, two shares of 32 bytes, and the tag of AES-256-GCM."""


class Purpose(IntEnum):
    """What a round adds up."""

    STATISTICS = 1
    TRAIN = 2
    EVALUATE = 3


class Reason(IntEnum):
    """Why a site refuses; it never says more, because details are the site's own."""

    PROTOCOL = 1
    NOT_APPROVED = 2
    BUDGET = 3
    DATA = 4
    LOCAL_FAULT = 5


class Message(ABC):
    """Base of all messages: ``encode`` here, ``_parts`` and ``_read`` in each kind."""

    KIND: ClassVar[int]

    @abstractmethod
    def _parts(self) -> tuple[int | bytes, ...]:
        """The message's parts in their fixed order."""

    @classmethod
    @abstractmethod
    def _read(cls, reader: Reader) -> Self:
        """Read the parts, each with its own length or limit."""

    def encode(self) -> bytes:
        """Return the message as bytes."""
        return bytes((VERSION, self.KIND)) + encode_parts(*self._parts())


def decode(data: bytes) -> Message:
    """Read any message.

    Raises:
        PeerProtocolError: not exactly one message of this version.
    """
    if len(data) < 2 or data[0] != VERSION or data[1] not in _KINDS:
        raise PeerProtocolError(f"expected a message of version {VERSION}, got something else")
    reader = Reader(memoryview(data)[2:])
    message = _KINDS[data[1]]._read(reader)
    reader.finish()
    return message


def _encode_table(table: Mapping[int, bytes]) -> bytes:
    """Site -> bytes of one length, as a bitmap of the sites and their bytes in rising order."""
    return encode_parts(bitmap(table), b"".join(table[site] for site in sorted(table)))


def _read_table(data: bytes | memoryview, length: int) -> dict[int, bytes]:
    """Read what ``_encode_table`` wrote."""
    reader = Reader(data)
    sites = members(reader.part(32).tobytes())
    values = reader.bytes(length * len(sites))
    reader.finish()
    if sites[:1] == (0,):
        raise PeerProtocolError("expected sites 1 to 255 in a table, got 0")
    return {site: values[at * length : (at + 1) * length] for at, site in enumerate(sites)}


@dataclass(frozen=True, kw_only=True)
class PairOffer:
    """Secret bytes from one site to another, sealed and signed."""

    sender: int
    receiver: int
    sealed: bytes
    signature: bytes

    def encode(self) -> bytes:
        """Return the offer as bytes."""
        return encode_parts(self.sender, self.receiver, self.sealed, self.signature)

    @classmethod
    def decode(cls, data: bytes) -> PairOffer:
        """Read what ``encode`` wrote."""
        reader = Reader(data)
        offer = cls(
            sender=reader.integer(),
            receiver=reader.integer(),
            sealed=reader.bytes(),
            signature=reader.bytes(64),
        )
        reader.finish()
        return offer


@dataclass(frozen=True, kw_only=True)
class PairRequest(Message):
    """Coordinator: make offers for this roster."""

    KIND = 1
    roster: bytes

    def _parts(self) -> tuple[int | bytes, ...]:
        return (self.roster,)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(roster=reader.bytes(32))


@dataclass(frozen=True, kw_only=True)
class PairOffers(Message):
    """Site: an offer for every site with a higher index; coordinator: those for this site."""

    KIND = 2
    offers: tuple[PairOffer, ...]

    def _parts(self) -> tuple[int | bytes, ...]:
        return tuple(offer.encode() for offer in self.offers)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        offers = []
        while not reader.at_end:
            offers.append(PairOffer.decode(reader.bytes()))
        return cls(offers=tuple(offers))


@dataclass(frozen=True, kw_only=True)
class Paired(Message):
    """Site: a root with every other site is on disk."""

    KIND = 3
    roster: bytes

    def _parts(self) -> tuple[int | bytes, ...]:
        return (self.roster,)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(roster=reader.bytes(32))


@dataclass(frozen=True, kw_only=True)
class Task(Message):
    """Exchange A, to the site: what to do, signed by the coordinator.

    ``model`` (float32 parameters) and ``public`` (figures that everyone may know) are bound by
    ``model_digest``, and that by the signature over the round's context.
    """

    KIND = 4
    study: bytes
    purpose: Purpose
    round: int
    attempt: int
    invited: tuple[int, ...]
    model_digest: bytes
    previous_result: bytes
    quantiser: Quantiser
    signature: bytes
    model: bytes
    public: bytes

    def _parts(self) -> tuple[int | bytes, ...]:
        return (
            self.study, self.purpose, self.round, self.attempt, bitmap(self.invited),
            self.model_digest, self.previous_result, self.quantiser.encode(), self.signature,
            self.model, self.public,
        )  # fmt: skip

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        study, purpose = reader.bytes(32), reader.integer()
        if purpose not in list(Purpose):
            raise PeerProtocolError("expected a known purpose, got another")
        return cls(
            study=study,
            purpose=Purpose(purpose),
            round=reader.integer(),
            attempt=reader.integer(),
            invited=members(reader.bytes(32)),
            model_digest=reader.bytes(32),
            previous_result=reader.bytes(64),
            quantiser=Quantiser.decode(reader.bytes()),
            signature=reader.bytes(64),
            model=reader.bytes(),
            public=reader.bytes(),
        )


@dataclass(frozen=True, kw_only=True)
class ReadyHead:
    """What a site commits to before masking, and what its signature covers."""

    context: bytes
    site: int
    self_mask_commitment: bytes
    table_key_commitment: bytes
    body_digest: bytes

    def parts(self) -> tuple[bytes, int, bytes, bytes, bytes]:
        """The head in its fixed order."""
        return (
            self.context, self.site, self.self_mask_commitment, self.table_key_commitment,
            self.body_digest,
        )  # fmt: skip

    @classmethod
    def read(cls, reader: Reader) -> ReadyHead:
        """Read a head that stands at the front of a message or table row."""
        return cls(
            context=reader.bytes(32),
            site=reader.integer(),
            self_mask_commitment=reader.bytes(32),
            table_key_commitment=reader.bytes(32),
            body_digest=reader.bytes(32),
        )


@dataclass(frozen=True, kw_only=True)
class Ready(Message):
    """Exchange A, from the site: commitments, sealed shares, and the sealed table of pair seeds."""

    KIND = 5
    head: ReadyHead
    signature: bytes
    table: bytes
    seed_commitments: Mapping[int, bytes]
    share_commitments: Mapping[int, bytes]
    sealed_shares: Mapping[int, bytes]

    def _parts(self) -> tuple[int | bytes, ...]:
        return (
            *self.head.parts(), self.signature, self.table,
            _encode_table(self.seed_commitments), _encode_table(self.share_commitments),
            _encode_table(self.sealed_shares),
        )  # fmt: skip

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            head=ReadyHead.read(reader),
            signature=reader.bytes(64),
            table=reader.bytes(),
            seed_commitments=_read_table(reader.part(), 16),
            share_commitments=_read_table(reader.part(), 32),
            sealed_shares=_read_table(reader.part(), SEALED_SHARE_BYTES),
        )

    def is_whole(self, invited: Collection[int]) -> bool:
        """Whether the body is the one in the head, and names every invited site."""
        tables = (self.seed_commitments, self.share_commitments, self.sealed_shares)
        others = set(invited) - {self.head.site}
        return (
            self.head.body_digest == self.body_digest(self.table, *tables)
            and len(self.table) == 32 * len(others)
            and set(self.sealed_shares) == set(self.seed_commitments) == others
            and set(self.share_commitments) == set(invited)
        )

    @staticmethod
    def body_digest(
        table: bytes,
        seed_commitments: Mapping[int, bytes],
        share_commitments: Mapping[int, bytes],
        sealed_shares: Mapping[int, bytes],
    ) -> bytes:
        """Digest of everything behind the head."""
        tables = (seed_commitments, share_commitments, sealed_shares)
        return tagged_hash(Label.READY_BODY, table, *(_encode_table(t) for t in tables))


@dataclass(frozen=True, kw_only=True)
class MaskRequest(Message):
    """Exchange B, to the site: the cohort, and what its members sent for this site."""

    KIND = 6
    heads: tuple[ReadyHead, ...]
    signatures: Mapping[int, bytes]
    sealed_shares: Mapping[int, bytes]
    seed_commitments: Mapping[int, bytes]

    def _parts(self) -> tuple[int | bytes, ...]:
        return (
            encode_parts(*(encode_parts(*head.parts()) for head in self.heads)),
            _encode_table(self.signatures), _encode_table(self.sealed_shares),
            _encode_table(self.seed_commitments),
        )  # fmt: skip

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        rows, heads = Reader(reader.part()), []
        while not rows.at_end:
            row = Reader(rows.part())
            heads.append(ReadyHead.read(row))
            row.finish()
        return cls(
            heads=tuple(heads),
            signatures=_read_table(reader.part(), 64),
            sealed_shares=_read_table(reader.part(), SEALED_SHARE_BYTES),
            seed_commitments=_read_table(reader.part(), 16),
        )


@dataclass(frozen=True, kw_only=True)
class Masked(Message):
    """Exchange B, from the site: the only message that carries an update, and it is masked."""

    KIND = 7
    context: bytes
    cohort: bytes
    site: int
    digest: bytes
    signature: bytes
    body: bytes | memoryview
    tail: bytes | memoryview

    def _parts(self) -> tuple[int | bytes, ...]:
        return (
            self.context, self.cohort, self.site, self.digest, self.signature,
            bytes(self.body), bytes(self.tail),
        )  # fmt: skip

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            context=reader.bytes(32),
            cohort=reader.bytes(32),
            site=reader.integer(),
            digest=reader.bytes(64),
            signature=reader.bytes(64),
            body=reader.part(),
            tail=reader.part(),
        )


@dataclass(frozen=True, kw_only=True)
class ConfirmRequest(Message):
    """Exchange C, to the site: the survivors, with the digests that they signed."""

    KIND = 8
    digests: Mapping[int, bytes]
    signatures: Mapping[int, bytes]

    def _parts(self) -> tuple[int | bytes, ...]:
        return _encode_table(self.digests), _encode_table(self.signatures)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            digests=_read_table(reader.part(), 64), signatures=_read_table(reader.part(), 64)
        )


@dataclass(frozen=True, kw_only=True)
class Ack(Message):
    """Exchange C, from the site: one signature over one set of survivors, ever."""

    KIND = 9
    site: int
    signature: bytes

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.site, self.signature

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(site=reader.integer(), signature=reader.bytes(64))


@dataclass(frozen=True, kw_only=True)
class UnmaskRequest(Message):
    """Exchange D, to the site: the confirmations of the others."""

    KIND = 10
    acks: Mapping[int, bytes]

    def _parts(self) -> tuple[int | bytes, ...]:
        return (_encode_table(self.acks),)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(acks=_read_table(reader.part(), 64))


@dataclass(frozen=True, kw_only=True)
class Shares(Message):
    """Exchange D, from the site: one share for each member of the cohort, never two."""

    KIND = 11
    site: int
    shares: Mapping[int, bytes]

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.site, _encode_table(self.shares)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(site=reader.integer(), shares=_read_table(reader.part(), 32))


@dataclass(frozen=True, kw_only=True)
class Refusal(Message):
    """Site: no, and in one word why."""

    KIND = 12
    reason: Reason
    blame: int | None

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.reason, 256 if self.blame is None else self.blame

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        reason, blame = reader.integer(), reader.integer()
        if reason not in list(Reason) or blame > 256:
            raise PeerProtocolError("expected a known reason for a refusal, got another")
        return cls(reason=Reason(reason), blame=None if blame == 256 else blame)


_KINDS: dict[int, type[Message]] = {
    kind.KIND: kind
    for kind in (
        PairRequest, PairOffers, Paired, Task, Ready, MaskRequest, Masked, ConfirmRequest, Ack,
        UnmaskRequest, Shares, Refusal,
    )
}  # fmt: skip
