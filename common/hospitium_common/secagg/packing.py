"""Ring elements as bytes, without a copy where the machine's words are the ring's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.errors import PeerProtocolError
from hospitium_common.secagg.fixed_point import dtype_of
from hospitium_common.secagg.masks import aligned

if TYPE_CHECKING:
    from hospitium_common.secagg.fixed_point import Words
    from hospitium_common.secagg.policy import RingBits


def pack_words(words: Words, ring_bits: RingBits) -> memoryview:
    """Return ring elements as little-endian bytes; 24 bits as all low halves, then all tops.

    16 and 32 bits are the bytes of ``words`` itself, which must not change any more.
    """
    if ring_bits != 24:
        return words.view(np.uint8).data
    packed = np.empty(3 * len(words), np.uint8)
    packed[: 2 * len(words)].view(np.uint16)[:] = words.view(np.uint16)[::2]
    packed[2 * len(words) :] = words.view(np.uint8)[2::4]
    return packed.data


def unpack_words(data: bytes | memoryview, ring_bits: RingBits, size: int) -> Words:
    """Read what ``pack_words`` wrote: a fresh array.

    Raises:
        PeerProtocolError: the bytes are not ``size`` ring elements.
    """
    if len(data) != size * ring_bits // 8:
        raise PeerProtocolError(
            f"expected {size} ring elements in {size * ring_bits // 8} bytes, got {len(data)}"
        )
    words = aligned(size, dtype_of(ring_bits))
    if ring_bits != 24:
        words[:] = np.frombuffer(data, words.dtype)
        return words
    words[:] = 0
    words.view(np.uint16)[::2] = np.frombuffer(data, np.uint16, size)
    words.view(np.uint8)[2::4] = np.frombuffer(data, np.uint8, size, 2 * size)
    return words
