"""Shamir's secret sharing over GF(2^8), byte by byte (Shamir 1979; the field of AES, FIPS 197).

Secret bytes are only ever shifted, masked and xored: no table is indexed by a secret, and no branch
depends on one. Share numbers are public, so their logarithms may come from tables.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint64]

REDUCTION = 0x1B  # x^8 = x^4 + x^3 + x + 1
GENERATOR = 0x03
LOWEST_BITS = np.uint64(0x0101010101010101)
LOWER_BITS = np.uint64(0x7F7F7F7F7F7F7F7F)


def _public_tables() -> tuple[list[int], list[int]]:
    powers, logarithms, value = [0] * 255, [0] * 256, 1
    for exponent in range(255):
        powers[exponent], logarithms[value] = value, exponent
        doubled = (value << 1) ^ (0x100 | REDUCTION if value & 0x80 else 0)
        value ^= doubled
    return powers, logarithms


_POWERS, _LOGARITHMS = _public_tables()


def _doublings(secret: Bytes) -> Words:
    """Return secret bytes ``[rows, length]`` times 1, x, x², … x⁷: words ``[rows, 8, words]``."""
    doubled = np.zeros((len(secret), 8, -(-secret.shape[1] // 8) * 8), np.uint8)
    doubled[:, 0, : secret.shape[1]] = secret
    words = doubled.view(np.uint64)
    for bit in range(7):
        carry = (words[:, bit] >> np.uint64(7)) & LOWEST_BITS
        shifted = (words[:, bit] & LOWER_BITS) << np.uint64(1)
        words[:, bit + 1] = shifted ^ carry * np.uint64(REDUCTION)
    return words


def _combined(public: Bytes, secret: Bytes) -> Bytes:
    """Return the product over GF(2^8) of public ``[many, rows]`` and secret ``[rows, length]``.

    A product with a public byte is the sum of the doublings that the byte's bits choose.
    """
    doublings = _doublings(secret)
    by_word = np.ascontiguousarray(doublings.reshape(-1, doublings.shape[2]).T)
    bits = np.unpackbits(public[:, :, None], axis=2, bitorder="little").reshape(len(public), -1)
    chosen = (-bits.astype(np.int64)).view(np.uint64)  # all ones or all zeros
    total = np.array([np.bitwise_xor.reduce(by_word & row, axis=1) for row in chosen])
    return total.view(np.uint8)[:, : secret.shape[1]]


def split(
    secret: bytes, threshold: int, holders: Sequence[int], randomness: bytes
) -> dict[int, bytes]:
    """Share a secret among holders 1…255 so that any ``threshold`` of them can restore it.

    ``randomness`` holds the ``(threshold - 1) * len(secret)`` coefficient bytes.

    **Guarantees:** fewer than ``threshold`` shares are independent of the secret.

    Raises:
        ValueError: a parameter is out of range.
    """
    if not 1 <= threshold <= len(holders) or len(randomness) != (threshold - 1) * len(secret):
        raise ValueError("expected 1 ≤ threshold ≤ holders and randomness for each coefficient")
    if len(set(holders)) != len(holders) or not all(1 <= holder <= 255 for holder in holders):
        raise ValueError("expected distinct holders in 1 to 255")
    coefficients = np.frombuffer(secret + randomness, np.uint8).reshape(threshold, len(secret))
    shares = _combined(_powers(tuple(holders), threshold), coefficients)
    return {holder: share.tobytes() for holder, share in zip(holders, shares, strict=True)}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Restore the secret from exactly ``threshold`` shares; wrong shares give a wrong secret."""
    holders = tuple(sorted(shares))
    rows = np.stack([np.frombuffer(shares[holder], np.uint8) for holder in holders])
    restored: bytes = _combined(_weights_at_zero(holders)[None], rows).tobytes()
    return restored


@lru_cache(maxsize=64)
def _powers(holders: tuple[int, ...], count: int) -> Bytes:
    """Return the first powers, from 0, of every holder's number: ``[holder, count]``."""
    exponents = np.outer([_LOGARITHMS[holder] for holder in holders], np.arange(count)) % 255
    powers: Bytes = np.array(_POWERS, np.uint8)[exponents]
    return powers


@lru_cache(maxsize=64)
def _weights_at_zero(holders: tuple[int, ...]) -> Bytes:
    """Lagrange's weights at 0, the same for every secret that these holders share."""
    weights = []
    for one in holders:
        others = [other for other in holders if other != one]
        above = sum(_LOGARITHMS[other] for other in others)
        below = sum(_LOGARITHMS[one ^ other] for other in others)
        weights.append(_POWERS[(above - below) % 255])
    return np.array(weights, np.uint8)
