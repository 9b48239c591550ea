"""Real numbers as elements of the ring Z mod 2^k, so that masks hide them and sums survive.

**Headroom.** With q = floor((2^(k-1) - 1) / n_max), an encoded value lies in ±q: it is clipped to
±(q - 1) and stochastic rounding moves it by less than 1. A sum over n ≤ n_max sites lies in ±n·q
⊂ ±(2^(k-1) - 1), so the signed value of the sum modulo 2^k is the exact integer sum.

**Unbiased.** A value is rounded up or down at random, with its own mean: see `rounding`.

**Rotated.** With a rotation the scaled values of all tensors are mixed before they are clipped and
rounded, and unmixed after they were added up (`rotation`). It is linear and orthogonal: sums stay
sums, rounding stays unbiased, and its variance per value stays what it is without.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hospitium_common.errors import LocalProtocolError
from hospitium_common.secagg.masks import aligned
from hospitium_common.secagg.rotation import rotate, rotate_back
from hospitium_common.secagg.rounding import CHUNK, FINE, Rounding, real_type

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hospitium_common.secagg.policy import RingBits, SecAggPolicy
    from hospitium_common.secagg.quantiser import Quantiser

    Words = NDArray[np.uint16] | NDArray[np.uint32]


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
    threads: int = 1,
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
    words, limit = aligned(len(values), dtype_of(policy.ring_bits)), largest_value(policy) - 1
    factors = [limit * FINE / bound for bound in quantiser.bounds]
    scaling = _Scaling(values, quantiser.lengths, factors)
    if quantiser.rotation:
        scaled = np.empty(len(values), real_type(policy.ring_bits, wraps=wraps))
        scaling.write(0, scaled)
        _on_mixed(scaled, quantiser, partial(rotate, threads=threads))
        scaling = _Scaling(scaled, (len(scaled),), (1.0,))

    def stretch(begin: int) -> int:
        rounding = Rounding(policy.ring_bits, limit, dither_key, begin, wraps=wraps)
        end, clipped = min(begin + per_thread, len(values)), 0
        for at in range(begin, end, CHUNK):
            upto = min(at + CHUNK, end)
            scaled = rounding.room[: upto - at]
            scaling.write(at, scaled)
            clipped += rounding.round(scaled, words[at:upto])
        return clipped

    per_thread = -(-len(values) // (threads * CHUNK)) * CHUNK
    begins = range(0, len(values), max(per_thread, 1))
    if len(begins) <= 1:
        return words, sum(map(stretch, begins))
    with ThreadPoolExecutor(threads) as pool:
        return words, sum(pool.map(stretch, begins))


class _Scaling:
    """Values that are multiplied by a factor per tensor when they are needed."""

    def __init__(
        self, values: NDArray[Any], lengths: Sequence[int], factors: Sequence[float]
    ) -> None:
        self._values, self._factors = values, factors
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def write(self, begin: int, out: NDArray[Any]) -> None:
        """Write scaled values from ``begin`` on into ``out``, whose length says how many."""
        end = begin + len(out)
        tensor, at = int(np.searchsorted(self._ends, begin, side="right")), begin
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # what overflows is not rounded but refused
            while at < end:
                upto = min(end, int(self._ends[tensor]))
                factor = out.dtype.type(self._factors[tensor])
                np.multiply(self._values[at:upto], factor, out=out[at - begin : upto - begin])
                tensor, at = tensor + 1, upto


def _on_mixed(
    vector: NDArray[Any], quantiser: Quantiser, turn: Callable[[NDArray[Any], bytes], None]
) -> None:
    """Let ``turn`` work, in place, on the tensors of ``vector`` that are mixed, end to end."""
    if all(quantiser.mixed):
        turn(vector, quantiser.rotation)
        return
    ends = np.cumsum(quantiser.lengths)
    marked = [
        vector[end - length : end]
        for end, length, mark in zip(ends, quantiser.lengths, quantiser.mixed, strict=True)
        if mark
    ]
    if not marked:
        return
    together = np.concatenate(marked)
    turn(together, quantiser.rotation)
    at = 0
    for tensor in marked:
        tensor[...] = together[at : at + len(tensor)]
        at += len(tensor)


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
    if quantiser.rotation:
        _on_mixed(signed, quantiser, rotate_back)
    limit, at = largest_value(policy) - 1, 0
    for length, bound in zip(quantiser.lengths, quantiser.bounds, strict=True):
        signed[at : at + length] *= bound / limit
        at += length
    return signed


def rounding_error(quantiser: Quantiser, policy: SecAggPolicy, sites: int) -> float:
    """Largest standard deviation of stochastic rounding in the Euclidean norm of the sum.

    One value errs with variance at most step²/4; ``sites`` · ``size`` of them are independent, and
    a rotation, which is orthogonal, leaves the variance of each as it is.
    """
    limit = largest_value(policy) - 1
    variance = sum(
        n * (bound / limit) ** 2 / 4
        for n, bound in zip(quantiser.lengths, quantiser.bounds, strict=True)
    )
    return math.sqrt(sites * variance)
