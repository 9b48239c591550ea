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

REDUCTION = 0x1B  # x^8 = x^4 + x^3 + x + 1
GENERATOR = 0x03


def _public_tables() -> tuple[list[int], list[int]]:
    powers, logarithms, value = [0] * 255, [0] * 256, 1
    for exponent in range(255):
        powers[exponent], logarithms[value] = value, exponent
        doubled = (value << 1) ^ (0x100 | REDUCTION if value & 0x80 else 0)
        value ^= doubled
    return powers, logarithms


_POWERS, _LOGARITHMS = _public_tables()


def _times_public(secret: Bytes, public: Bytes) -> Bytes:
    """Multiply secret bytes by public ones, elementwise with broadcasting."""
    product = np.zeros(np.broadcast_shapes(secret.shape, public.shape), np.uint8)
    doubled = secret
    for bit in range(8):
        product ^= doubled * ((public >> np.uint8(bit)) & np.uint8(1))
        doubled = (doubled << np.uint8(1)) ^ ((doubled >> np.uint8(7)) * np.uint8(REDUCTION))
    return product


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
    coefficients = np.frombuffer(randomness, np.uint8).reshape(threshold - 1, len(secret))
    at = np.array(holders, np.uint8)[:, None]
    shares = np.zeros((len(holders), len(secret)), np.uint8)
    for coefficient in coefficients[::-1]:  # Horner's scheme
        shares = _times_public(shares ^ coefficient, at)
    shares ^= np.frombuffer(secret, np.uint8)
    return {holder: share.tobytes() for holder, share in zip(holders, shares, strict=True)}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Restore the secret from exactly ``threshold`` shares; wrong shares give a wrong secret."""
    holders = tuple(sorted(shares))
    rows = np.stack([np.frombuffer(shares[holder], np.uint8) for holder in holders])
    weighted = _times_public(rows, _weights_at_zero(holders)[:, None])
    restored: bytes = np.bitwise_xor.reduce(weighted, axis=0).tobytes()
    return restored


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
