"""A public random rotation: every coordinate becomes a mixture of many, so that none stands out.

A stretch of 4^k values is multiplied by random signs and by a Hadamard matrix, and scaled so that
its length stays (Ailon and Chazelle 2009; for quantised means Suresh et al. 2017). Mixtures are
nearly normal whatever was mixed, so that a ring of few bits needs no room for heavy tails.

A vector of any length is covered without padding: the last stretch ends with the vector and may
overlap the one before, which was mixed already. Each of the two steps is an orthogonal map of the
whole vector, and they are undone in reverse order.

The Hadamard matrix of order 4^k is the Kronecker product of two of order 2^k. So a stretch is a
square X, and to mix it is H X H: two products with a small matrix, the fastest form there is
without compiled code of one's own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hospitium_common.secagg.masks import keystream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Reals = TypeVar("Reals", NDArray[np.float32], NDArray[np.float64])

LARGEST_SIDE = 32
"""Side of the longest stretch. 1024 values mixed are as near to normal as 16384, and cheaper."""
AT_ONCE = 1 << 16
SEED_BYTES = 32


def rotate(vector: Reals, seed: bytes, threads: int = 1) -> None:
    """Rotate ``vector`` ``[size]`` in place; ``seed`` is 32 public bytes.

    **Guarantees:** lengths and inner products stay, up to floating-point rounding; on one machine
    the same vector and seed give the same bits at any time, since every sum is over one short row.
    """
    signs, hadamard = _matrices(seed, vector)

    def mix(squares: NDArray[Any]) -> None:
        squares *= signs
        _mix(squares, hadamard)

    whole, last = _stretches(vector, len(hadamard))
    _each(mix, whole, threads)
    _each(mix, last, threads)


def rotate_back(vector: Reals, seed: bytes, threads: int = 1) -> None:
    """Undo ``rotate`` in place, up to floating-point rounding."""
    signs, hadamard = _matrices(seed, vector)

    def unmix(squares: NDArray[Any]) -> None:
        _mix(squares, hadamard)
        squares *= signs

    whole, last = _stretches(vector, len(hadamard))
    _each(unmix, last, threads)
    _each(unmix, whole, threads)


def _each(
    step: Callable[[NDArray[Any]], None], stretches: Sequence[NDArray[Any]], threads: int
) -> None:
    if threads == 1 or len(stretches) < 2:
        for stretch in stretches:
            step(stretch)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(step, stretches))


def _stretches(vector: NDArray[Any], side: int) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Return squares ``[count, side, side]`` that cover the vector: disjoint ones, and then one.

    The last one ends with the vector; there is none where the others cover everything.
    """
    length = side * side
    whole = len(vector) - len(vector) % length
    stretches = [vector[at : min(at + AT_ONCE, whole)] for at in range(0, whole, AT_ONCE)]
    last = [] if whole == len(vector) else [vector[len(vector) - length :]]
    return [one.reshape(-1, side, side) for one in stretches], [
        one.reshape(-1, side, side) for one in last
    ]


def _matrices(seed: bytes, vector: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return random signs ``[side, side]``, the same for every square, and H."""
    side = LARGEST_SIDE
    while side > 1 and side * side > len(vector):
        side //= 2
    stream = np.frombuffer(keystream(seed, -(-side * side // 8)), np.uint8)
    bits = np.unpackbits(stream, count=side * side).reshape(side, side)
    return np.array([1, -1], vector.dtype)[bits], _hadamard(side, vector.dtype)


def _hadamard(side: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return Sylvester's symmetric matrix ``[side, side]``, scaled to be its own inverse."""
    rows = np.ones((1, 1), dtype)
    while len(rows) < side:
        rows = np.block([[rows, rows], [rows, -rows]])
    return np.asarray(rows / np.sqrt(side), dtype)


def _mix(squares: NDArray[Any], hadamard: NDArray[Any]) -> None:
    """Replace each X of ``squares`` ``[count, side, side]`` by H X H.

    As products of many small matrices, so that no library adds threads of its own.
    """
    np.matmul(hadamard, np.matmul(squares, hadamard), out=squares)
