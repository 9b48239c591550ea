"""Masks: AES-256-CTR key streams, expanded straight into the addition.

The block of the vector and the block of key stream stay in the processor's cache while every peer's
mask passes over them; nothing as long as the model is ever allocated for a mask. What is done can
be hashed while it is still in the cache, and while other threads mask what follows.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, CipherContext
    from numpy.typing import NDArray

    Words = NDArray[np.unsignedinteger[Any]]

BLOCK = 1 << 17
"""Bytes that are masked at once: with their key stream they fill a part of the L2 cache."""
STRETCH = 4 * BLOCK
"""Bytes that one thread masks before it takes the next ones."""
CACHE_LINE = 64
MOST_THREADS = 4
"""The digest of what is masked runs at the pace of about that many threads that mask."""
_ZEROS = memoryview(bytes(BLOCK))


@dataclass(frozen=True)
class Mask:
    """A key that is used for one vector only, and whether its stream is added or taken away."""

    key: bytes
    sign: Literal[1, -1]


def usable_threads() -> int:
    """Return how many threads to mask with on this machine; a site does nothing else meanwhile."""
    return min(os.cpu_count() or 1, MOST_THREADS)


def keystream(key: bytes, length: int) -> bytes:
    """Return the first bytes of AES-256-CTR with a zero nonce (NIST SP 800-38A)."""
    return _cipher(key, 0).update(bytes(length))


class Keystream:
    """The same key stream piece by piece, each at most ``BLOCK`` bytes, into one buffer."""

    def __init__(self, key: bytes, offset: int = 0) -> None:
        """``offset`` is where in the stream to begin, a multiple of 16 bytes."""
        self._cipher = _cipher(key, offset)
        self._buffer = aligned(BLOCK, np.uint8)

    def words(self, count: int) -> NDArray[np.uint16]:
        """Return the next ``count`` 16-bit words; the next call overwrites them."""
        piece = self._buffer[: 2 * count]
        self._cipher.update_into(_ZEROS[: 2 * count], piece.data)
        return piece.view(np.uint16)


def aligned(length: int, dtype: Any) -> NDArray[Any]:
    """Return an uninitialised array that begins with a cache line: additions run faster on it."""
    itemsize = np.dtype(dtype).itemsize
    raw = np.empty(length * itemsize + CACHE_LINE, np.uint8)
    begin = -raw.ctypes.data % CACHE_LINE
    found: NDArray[Any] = raw[begin : begin + length * itemsize].view(dtype)
    return found


def _counter(offset: int) -> bytes:
    return (offset // 16).to_bytes(16, "big")


def _cipher(key: bytes, offset: int) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(_counter(offset))).encryptor()


def add_masks(words: Words, masks: Sequence[Mask], threads: int = 1) -> None:
    """Add every mask to ``words`` in place, modulo 2^(word size)."""
    for _ in masked_stretches(words, masks, threads):
        pass


def masked_stretches(words: Words, masks: Sequence[Mask], threads: int = 1) -> Iterator[Words]:
    """Add every mask to ``words`` in place; yield it in order, stretch by stretch, when done.

    With more than one thread the caller works on a stretch while the next ones are masked.
    """
    if threads == 1 or words.nbytes < 2 * STRETCH:
        lane, length = _Lane(masks, words.dtype), BLOCK // words.itemsize
        for begin in range(0, len(words), length):
            yield lane.add(words, begin, begin + length)
        return
    yield from _by_threads(words, masks, threads)


def _by_threads(words: Words, masks: Sequence[Mask], threads: int) -> Iterator[Words]:
    length, lanes = STRETCH // words.itemsize, SimpleQueue[_Lane]()
    for _ in range(threads):
        lanes.put(_Lane(masks, words.dtype))

    def add(begin: int) -> Words:
        lane = lanes.get()
        try:
            return lane.add(words, begin, begin + length)
        finally:
            lanes.put(lane)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(add, range(0, len(words), length))


class _Lane:
    """What one thread needs: a cipher for each mask and room for a block of key stream."""

    def __init__(self, masks: Sequence[Mask], dtype: np.dtype[Any]) -> None:
        self._ciphers: list[AEADEncryptionContext | CipherContext] = [
            _cipher(mask.key, 0) for mask in masks
        ]
        self._steps = [
            (cipher.update_into, np.add if mask.sign > 0 else np.subtract)
            for cipher, mask in zip(self._ciphers, masks, strict=True)
        ]
        self._stream = aligned(BLOCK // dtype.itemsize, dtype)
        self._at = 0

    def add(self, words: Words, begin: int, end: int) -> Words:
        """Add to the words from ``begin``, a multiple of 16 bytes, to ``end``; return them."""
        stretch, itemsize = words[begin:end], words.itemsize
        if begin != self._at:
            for cipher in self._ciphers:
                cipher.reset_nonce(_counter(begin * itemsize))
        self._at = begin + len(stretch)
        per_block = BLOCK // itemsize
        for at in range(0, len(stretch), per_block):
            block = stretch[at : at + per_block]
            mask = self._stream[: len(block)]
            zeros, expanded = _ZEROS[: block.nbytes], mask.view(np.uint8).data
            for expand, operation in self._steps:
                expand(zeros, expanded)
                operation(block, mask, block)
        return stretch
