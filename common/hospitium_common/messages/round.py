"""The four exchanges of a round of HSA-1 (`secagg/README.md`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages.wire import Message, encode_table, read_table
from hospitium_common.secagg.hashing import Label, bitmap, members, tagged_hash
from hospitium_common.secagg.quantiser import Quantiser

SEALED_SHARE_BYTES = 12 + 64 + 16
"""Nonce, two shares of 32 bytes, and the tag of AES-256-GCM."""


class Purpose(IntEnum):
    """What a round adds up."""

    STATISTICS = 1
    TRAIN = 2
    EVALUATE = 3


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
    model: bytes | memoryview
    public: bytes

    def _parts(self) -> tuple[int | bytes | memoryview, ...]:
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
            encode_table(self.seed_commitments), encode_table(self.share_commitments),
            encode_table(self.sealed_shares),
        )  # fmt: skip

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            head=ReadyHead.read(reader),
            signature=reader.bytes(64),
            table=reader.bytes(),
            seed_commitments=read_table(reader.part(), 16),
            share_commitments=read_table(reader.part(), 32),
            sealed_shares=read_table(reader.part(), SEALED_SHARE_BYTES),
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
        return tagged_hash(Label.READY_BODY, table, *(encode_table(t) for t in tables))


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
            encode_table(self.signatures), encode_table(self.sealed_shares),
            encode_table(self.seed_commitments),
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
            signatures=read_table(reader.part(), 64),
            sealed_shares=read_table(reader.part(), SEALED_SHARE_BYTES),
            seed_commitments=read_table(reader.part(), 16),
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

    def _parts(self) -> tuple[int | bytes | memoryview, ...]:
        return (
            self.context, self.cohort, self.site, self.digest, self.signature,
            self.body, self.tail,
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
        return encode_table(self.digests), encode_table(self.signatures)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(digests=read_table(reader.part(), 64), signatures=read_table(reader.part(), 64))


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
        return (encode_table(self.acks),)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(acks=read_table(reader.part(), 64))


@dataclass(frozen=True, kw_only=True)
class Shares(Message):
    """Exchange D, from the site: one share for each member of the cohort, never two."""

    KIND = 11
    site: int
    shares: Mapping[int, bytes]

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.site, encode_table(self.shares)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(site=reader.integer(), shares=read_table(reader.part(), 32))
