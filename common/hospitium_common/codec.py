"""Strict, injective byte encodings: every part is length-prefixed, every byte is accounted for.

A *part* is a 4-byte big-endian length followed by that many bytes; an integer part is 8 bytes
big-endian. Two different lists of parts never encode to the same bytes, so hashes and signatures
over an encoding mean exactly one thing.
"""

from hospitium_common.errors import PeerProtocolError

MAX_PART_BYTES = 2**32 - 1


def encode_parts(*parts: int | bytes | memoryview, before: bytes = b"") -> bytes:
    """Concatenate parts, each behind its length; integers as 8 bytes big-endian, 0 to 2^64 - 1.

    ``before`` goes in front as it is. A memoryview is one of bytes; a large part is copied once.
    """
    pieces: list[bytes | memoryview] = [before]
    for part in parts:
        raw = part.to_bytes(8, "big") if isinstance(part, int) else part
        pieces += (len(raw).to_bytes(4, "big"), raw)
    return b"".join(pieces)


class Reader:
    """Takes a message apart, part by part; anything missing or left over is a protocol error."""

    def __init__(self, message: bytes | memoryview) -> None:
        self._view = memoryview(message)
        self._at = 0

    @property
    def at_end(self) -> bool:
        """Whether every byte was read."""
        return self._at == len(self._view)

    def part(self, length: int | None = None) -> memoryview:
        """Return the next part without copying; with ``length``, demand exactly that many bytes.

        Raises:
            PeerProtocolError: the message ends early or the part has another length.
        """
        found = int.from_bytes(self._take(4), "big")
        if length is not None and found != length:
            raise PeerProtocolError(f"expected a part of {length} bytes, got {found}")
        return self._take(found)

    def bytes(self, length: int | None = None) -> bytes:
        """Return the next part as its own bytes."""
        return bytes(self.part(length))

    def integer(self) -> int:
        """Return the next part as an unsigned 64-bit integer."""
        return int.from_bytes(self.part(8), "big")

    def finish(self) -> None:
        """Demand that nothing is left."""
        if not self.at_end:
            left = len(self._view) - self._at
            raise PeerProtocolError(f"expected the end of the message, got {left} more bytes")

    def _take(self, count: int) -> memoryview:
        if count > len(self._view) - self._at:
            left = len(self._view) - self._at
            raise PeerProtocolError(f"expected {count} more bytes, got {left}: truncated message")
        taken = self._view[self._at : self._at + count]
        self._at += count
        return taken
