"""How the sites of a key epoch come by a secret with each other, relayed by the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.messages.wire import Message
from hospitium_common.secagg.hashing import bitmap, members


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
    """Coordinator: a key epoch begins; make offers to these sites.

    Both sides derive the epoch's ``roster`` (given by its digest) from the federation's roster of
    this ``version``, so the coordinator chooses who takes part, but never under which keys.
    """

    KIND = 1
    version: int
    epoch: int
    sites: tuple[int, ...]
    roster: bytes

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.version, self.epoch, bitmap(self.sites), self.roster

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            version=reader.integer(),
            epoch=reader.integer(),
            sites=members(reader.bytes(32)),
            roster=reader.bytes(32),
        )


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
