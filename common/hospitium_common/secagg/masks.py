"""Masks: AES-256-CTR key streams, expanded straight into the addition.

The block of the vector and the block of key stream stay in the processor's cache while every peer's
mask passes over them; nothing as long as the model is ever allocated for a mask.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cryptography.hazmat.primitives.ciphers import CipherContext
    from numpy.typing import NDArray

    Words = TypeVar("Words", NDArray[np.uint16], NDArray[np.uint32], NDArray[np.uint64])

BLOCK = 1 << 17
_ZEROS = memoryview(bytes(BLOCK))


@dataclass(frozen=True)
class Mask:
    """A key that is used for one vector only, and whether its stream is added or taken away."""

    key: bytes
    sign: Literal[1, -1]


def keystream(key: bytes, length: int) -> bytes:
    """Return the first bytes of AES-256-CTR with a zero nonce (NIST SP 800-38A)."""
    return _cipher(key, 0).update(bytes(length))


def keystream_in_chunks(key: bytes, lengths: Iterable[int]) -> Iterator[bytes]:
    """Yield the same key stream piece by piece, each at most ``BLOCK`` bytes."""
    cipher = _cipher(key, 0)
    for length in lengths:
        yield cipher.update(_ZEROS[:length])


def _cipher(key: bytes, offset: int) -> CipherContext:
    counter = (offset // 16).to_bytes(16, "big")
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()


def add_masks(words: Words, masks: Sequence[Mask], threads: int = 1) -> None:
    """Add every mask to ``words`` in place, modulo 2^(word size)."""
    if threads == 1 or words.nbytes < 2 * threads * BLOCK:
        _add(words, masks, 0)
        return
    per_thread = -(-words.nbytes // threads // BLOCK) * BLOCK // words.itemsize
    begins = range(0, len(words), per_thread)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: _add(words[at : at + per_thread], masks, at), begins))


def _add(words: Words, masks: Sequence[Mask], begin: int) -> None:
    """Add to a stretch of the vector that begins at word ``begin``, a multiple of 16 bytes."""
    raw = bytearray(BLOCK)
    stream, view = memoryview(raw), np.frombuffer(raw, words.dtype)
    per_block = BLOCK // words.itemsize
    ciphers = [
        (
            _cipher(one.key, begin * words.itemsize).update_into,
            np.add if one.sign > 0 else np.subtract,
        )
        for one in masks
    ]
    for at in range(0, len(words), per_block):
        block = words[at : at + per_block]
        zeros, expanded, mask = _ZEROS[: block.nbytes], stream[: block.nbytes], view[: len(block)]
        for expand, operation in ciphers:
            expand(zeros, expanded)
            operation(block, mask, block)
