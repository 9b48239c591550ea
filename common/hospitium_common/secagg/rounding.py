"""Stochastic rounding of scaled values to ring elements, a cache-sized chunk at a time.

**Unbiased.** With r the integer next to t·2^16, d uniform on 0 … m - 1 and m = 2^16, the rounded
value is floor((r + d) / m). Its mean is r / m, because floor((r + d) / m) adds up to r over all d
(Hermite's identity), and r / m is within 2^-17 of t. In 16-bit rings t is computed in float32,
which moves it by at most 2^-23 of itself, as it does every parameter of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hospitium_common.errors import LocalProtocolError
from hospitium_common.secagg.masks import Keystream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hospitium_common.secagg.policy import RingBits

CHUNK = 1 << 16
FINE = 1 << 16
"""Scaled values count in fractions of a step: 2^16 to a step."""


class Rounding:
    """One thread's dither and room for a chunk; it takes a stretch of the vector in order."""

    def __init__(
        self, ring_bits: RingBits, limit: int, dither_key: bytes, begin: int, *, wraps: bool
    ) -> None:
        """``begin`` is where in the vector the stretch begins, a multiple of 8."""
        self._ring_bits, self._wraps, real = ring_bits, wraps, real_type(ring_bits, wraps=wraps)
        self._top = float(limit * FINE)
        self._dither = Keystream(dither_key, 2 * begin)
        self._whole = np.empty(CHUNK, np.int32)
        self.room = np.empty(CHUNK, real)

    def round(self, scaled: NDArray[Any], words: NDArray[Any]) -> int:
        """Round ``scaled``, which is overwritten, to ``words``; return how many were clipped.

        Raises:
            LocalProtocolError: a value is NaN, infinite, or 10^29 times its bound.
        """
        clipped, beyond = 0, not (-self._top <= scaled.min() and scaled.max() <= self._top)
        if beyond:  # also where there is NaN
            if not np.isfinite(scaled).all():
                raise LocalProtocolError(
                    "expected finite values in the update, got NaN, infinity or a value far "
                    "beyond its bound: training diverged"
                )
            if not self._wraps:
                clipped = int(np.count_nonzero(np.abs(scaled) > self._top))
                np.clip(scaled, -self._top, self._top, out=scaled)
        dither, whole = self._dither.words(len(scaled)), self._whole[: len(scaled)]
        if scaled.dtype == np.float32:
            np.rint(scaled, out=scaled)
            np.copyto(whole, scaled, casting="unsafe")  # |whole| < 2^31: limit < 2^15
            np.add(whole, dither, out=whole)
            np.right_shift(whole, 16, out=whole)
            np.copyto(words, whole, casting="unsafe")
        else:
            _round_wide(scaled, dither, words, self._ring_bits)
        return clipped


def real_type(ring_bits: RingBits, *, wraps: bool) -> type[np.float32] | type[np.float64]:
    """What scaled values are computed in.

    In a 16-bit ring they have at most 31 bits, of which a float32 update knows 24; wider rings have
    47, and values that wrap around may have any number.
    """
    return np.float32 if ring_bits == 16 and not wraps else np.float64


def _round_wide(
    scaled: NDArray[np.float64], dither: NDArray[np.uint16], words: NDArray[Any],
    ring_bits: RingBits,
) -> None:  # fmt: skip
    """Round values of any size, in place; those beyond the ring wrap around it."""
    np.add(scaled, dither, out=scaled)
    np.add(scaled, 0.5, out=scaled)
    np.multiply(scaled, 1 / FINE, out=scaled)
    np.floor(scaled, out=scaled)
    half = 2.0 ** (ring_bits - 1)
    if not (-half <= scaled.min() and scaled.max() < half):
        scaled -= 2 * half * np.floor((scaled + half) / (2 * half))
    np.copyto(words, scaled.astype(np.int32), casting="unsafe")
    if ring_bits == 24:
        np.bitwise_and(words, 0xFFFFFF, out=words)
