"""Real numbers as elements of the ring Z mod 2^k, so that masks hide them and sums survive.

**Headroom.** With q = floor((2^(k-1) - 1) / n_max), an encoded value lies in ±q: it is clipped to
±(q - 1) and stochastic rounding moves it by less than 1. A sum over n ≤ n_max sites lies in ±n·q
⊂ ±(2^(k-1) - 1), so the signed value of the sum modulo 2^k is the exact integer sum.

**Unbiased.** floor(t + u) with u uniform in [0, 1) has mean t; u comes from AES-256-CTR in steps
of 2^-16, which biases a value by at most 2^-17 of a quantisation step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import LocalProtocolError, PeerProtocolError
from hospitium_common.secagg.hashing import Label, tagged_hash
from hospitium_common.secagg.masks import keystream_in_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from hospitium_common.secagg.policy import RingBits, SecAggPolicy

    Words = NDArray[np.uint16] | NDArray[np.uint32]

CHUNK = 1 << 15
LONGEST_VECTOR = 1 << 40
HEAVY_TAIL = {16: 32.0, 24: 64.0, 32: 64.0}
"""Ring width -> bound in units of the tensor's root mean square; updates are heavy-tailed."""


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """Per tensor its length and its bound B: values beyond ±B are clipped, and counted."""

    lengths: tuple[int, ...]
    bounds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.bounds):
            raise LocalProtocolError("expected one bound for each tensor")
        if not 0 <= self.size <= LONGEST_VECTOR:
            raise LocalProtocolError(f"expected at most {LONGEST_VECTOR} values, got {self.size}")
        if not all(math.isfinite(bound) and bound > 0 for bound in self.bounds):
            raise LocalProtocolError("expected finite, positive bounds")

    @property
    def size(self) -> int:
        """Length of the whole vector."""
        return sum(self.lengths)

    @cached_property
    def digest(self) -> bytes:
        """What stands for this quantiser in a round's context."""
        return tagged_hash(Label.QUANTISER, *self._parts())

    def _parts(self) -> list[bytes]:
        pairs = zip(self.lengths, self.bounds, strict=True)
        return [encode_parts(n, np.float64(bound).tobytes()) for n, bound in pairs]

    def encode(self) -> bytes:
        """Return the quantiser as bytes for a message."""
        return encode_parts(len(self.lengths), *self._parts())

    @classmethod
    def decode(cls, data: bytes) -> Quantiser:
        """Read what ``encode`` wrote."""
        reader, lengths, bounds = Reader(data), [], []
        count = reader.integer()
        if count > len(data):
            raise PeerProtocolError("expected a quantiser, got an impossible number of tensors")
        for _ in range(count):
            pair = Reader(reader.part())
            lengths.append(pair.integer())
            bounds.append(float(np.frombuffer(pair.part(8), np.float64)[0]))
            pair.finish()
        reader.finish()
        try:
            return cls(lengths=tuple(lengths), bounds=tuple(bounds))
        except LocalProtocolError as error:
            raise PeerProtocolError(str(error)) from error


def dtype_of(ring_bits: RingBits) -> type[np.uint16] | type[np.uint32]:
    """The machine word that holds a ring element; 24 bits travel as 3 bytes and sit in 4."""
    return np.uint16 if ring_bits == 16 else np.uint32


def largest_value(policy: SecAggPolicy) -> int:
    """Return q: no site's encoded value exceeds it."""
    return int(((1 << (policy.ring_bits - 1)) - 1) // policy.n_max)


def quantise(
    values: NDArray[np.float32],
    quantiser: Quantiser,
    policy: SecAggPolicy,
    dither_key: bytes,
    *,
    wraps: bool = False,
) -> tuple[Words, int]:
    """Return ring elements ``[size]`` and how many values were clipped at their bound.

    ``dither_key`` is 32 fresh secret bytes: whoever knows it can undo part of the rounding. With
    ``wraps`` nothing is clipped: what lies beyond the bound wraps around the ring, so that the
    sum is a function of the sum of the rounded values and of nothing else.

    Raises:
        LocalProtocolError: the vector has another length or holds NaN or infinity.
    """
    if values.shape != (quantiser.size,):
        raise LocalProtocolError(
            f"expected {quantiser.size} values, got an array of shape {values.shape}"
        )
    words: NDArray[Any] = np.empty(len(values), dtype_of(policy.ring_bits))
    limit = largest_value(policy) - 1
    clipped = 0
    chunks = list(_chunks(quantiser))
    dithers = keystream_in_chunks(dither_key, (2 * (end - begin) for begin, end, _ in chunks))
    for (begin, end, bound), dither in zip(chunks, dithers, strict=True):
        scaled = values[begin:end] * np.float64(limit / bound)
        beyond = not (-limit <= scaled.min() and scaled.max() <= limit)  # also where there is NaN
        if beyond and not wraps:
            clipped += _clip(scaled, limit)
        scaled += np.frombuffer(dither, np.uint16) * np.float64(2.0**-16)
        np.floor(scaled, out=scaled)
        if beyond and wraps:
            _wrap(scaled, policy.ring_bits)
        words[begin:end] = scaled.astype(np.int32).astype(words.dtype)
    if policy.ring_bits == 24:
        words &= np.uint32(0xFFFFFF)
    return words, clipped


def _chunks(quantiser: Quantiser) -> Iterator[tuple[int, int, float]]:
    """Yield begin, end and bound of stretches of one tensor that fit the processor's cache."""
    at = 0
    for length, bound in zip(quantiser.lengths, quantiser.bounds, strict=True):
        for begin in range(at, at + length, CHUNK):
            yield begin, min(begin + CHUNK, at + length), bound
        at += length


def _clip(scaled: NDArray[np.float64], limit: int) -> int:
    if not np.isfinite(scaled).all():
        raise LocalProtocolError("expected finite values in the update, got NaN or infinity")
    beyond = int(np.count_nonzero(np.abs(scaled) > limit))
    np.clip(scaled, -limit, limit, out=scaled)
    return beyond


def _wrap(whole: NDArray[np.float64], ring_bits: RingBits) -> None:
    """Bring whole numbers into the signed range of the ring."""
    if not np.isfinite(whole).all():
        raise LocalProtocolError("expected finite values in the update, got NaN or infinity")
    half, size = 2.0 ** (ring_bits - 1), 2.0**ring_bits
    whole += half
    np.mod(whole, size, out=whole)
    whole -= half


def step_sizes(quantiser: Quantiser, policy: SecAggPolicy) -> tuple[float, ...]:
    """Return the distance of neighbouring encoded values, per tensor."""
    limit = largest_value(policy) - 1
    return tuple(bound / limit for bound in quantiser.bounds)


def sum_to_reals(words: Words, quantiser: Quantiser, policy: SecAggPolicy) -> NDArray[np.float64]:
    """Return the sum of the sites' values that an unmasked sum of ring elements stands for."""
    if policy.ring_bits == 16:
        signed = words.view(np.int16).astype(np.float64)
    elif policy.ring_bits == 24:
        signed = ((words << np.uint32(8)).view(np.int32) >> 8).astype(np.float64)
    else:
        signed = words.view(np.int32).astype(np.float64)
    limit, at = largest_value(policy) - 1, 0
    for length, bound in zip(quantiser.lengths, quantiser.bounds, strict=True):
        signed[at : at + length] *= bound / limit
        at += length
    return signed


def rounding_error(quantiser: Quantiser, policy: SecAggPolicy, sites: int) -> float:
    """Largest standard deviation of stochastic rounding in the Euclidean norm of the sum.

    One value errs with variance at most step²/4; ``sites`` · ``size`` of them are independent.
    """
    limit = largest_value(policy) - 1
    variance = sum(
        n * (bound / limit) ** 2 / 4
        for n, bound in zip(quantiser.lengths, quantiser.bounds, strict=True)
    )
    return math.sqrt(sites * variance)


def bounds_from_second_moments(
    second_moments: Sequence[float],
    lengths: Sequence[int],
    sites: int,
    policy: SecAggPolicy,
    fallback: float,
) -> tuple[float, ...]:
    """Return next round's bounds from the summed squares of the last one, per tensor.

    A tensor that did not move says nothing about the next round and gets ``fallback``.
    """  # fmt: skip
    factor = HEAVY_TAIL[policy.ring_bits]
    bounds = []
    for total, length in zip(second_moments, lengths, strict=True):
        root_mean_square = math.sqrt(max(total, 0.0) / (length * sites))
        bound = factor * root_mean_square
        bounds.append(min(bound, fallback) if bound > 0 else fallback)
    return tuple(bounds)


def pack_words(words: Words, ring_bits: RingBits) -> bytes:
    """Return ring elements as little-endian bytes; 24 bits as all low halves, then all tops."""
    if ring_bits != 24:
        return words.tobytes()
    return words.view(np.uint16)[::2].tobytes() + words.view(np.uint8)[2::4].tobytes()


def unpack_words(data: bytes | memoryview, ring_bits: RingBits, size: int) -> Words:
    """Read what ``pack_words`` wrote: a fresh array.

    Raises:
        PeerProtocolError: the bytes are not ``size`` ring elements.
    """
    if len(data) != size * ring_bits // 8:
        raise PeerProtocolError(
            f"expected {size} ring elements in {size * ring_bits // 8} bytes, got {len(data)}"
        )
    if ring_bits == 16:
        return np.frombuffer(data, np.uint16).copy()
    if ring_bits == 32:
        return np.frombuffer(data, np.uint32).copy()
    words = np.zeros(size, np.uint32)
    words.view(np.uint16)[::2] = np.frombuffer(data, np.uint16, size)
    words.view(np.uint8)[2::4] = np.frombuffer(data, np.uint8, size, 2 * size)
    return words
