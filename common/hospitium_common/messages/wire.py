"""What all messages share: one version byte, one kind byte, length-prefixed parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.secagg.hashing import bitmap, members

VERSION = 1


class Message(ABC):
    """Base of all messages: ``encode`` here, ``_parts`` and ``_read`` in each kind."""

    KIND: ClassVar[int]

    @abstractmethod
    def _parts(self) -> tuple[int | bytes | memoryview, ...]:
        """The message's parts in their fixed order."""

    @classmethod
    @abstractmethod
    def _read(cls, reader: Reader) -> Self:
        """Read the parts, each with its own length or limit."""

    def encode(self) -> bytes:
        """Return the message as bytes."""
        return encode_parts(*self._parts(), before=bytes((VERSION, self.KIND)))


def encode_table(table: Mapping[int, bytes]) -> bytes:
    """Site -> bytes of one length, as a bitmap of the sites and their bytes in rising order."""
    return encode_parts(bitmap(table), b"".join(table[site] for site in sorted(table)))


def read_table(data: bytes | memoryview, length: int) -> dict[int, bytes]:
    """Read what ``encode_table`` wrote."""
    reader = Reader(data)
    sites = members(reader.part(32).tobytes())
    values = reader.bytes(length * len(sites))
    reader.finish()
    if sites[:1] == (0,):
        raise PeerProtocolError("expected sites 1 to 255 in a table, got 0")
    return {site: values[at * length : (at + 1) * length] for at, site in enumerate(sites)}
