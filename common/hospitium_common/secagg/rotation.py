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

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hospitium_common.secagg.masks import keystream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Reals = TypeVar("Reals", NDArray[np.float32], NDArray[np.float64])

LARGEST_SIDE = 32
"""Side of the longest stretch. 1024 values mixed are as near to normal as 16384, and cheaper."""
AT_ONCE = 1 << 20
SEED_BYTES = 32


def rotate(vector: Reals, seed: bytes) -> None:
    """Rotate ``vector`` ``[size]`` in place; ``seed`` is 32 public bytes.

    **Guarantees:** lengths and inner products stay, up to floating-point rounding; on one machine
    the same vector and seed give the same bits at any time, since every sum is over one short row.
    """
    side = _side(len(vector))
    signs, hadamard = _signs(seed, side, vector.dtype), _hadamard(side, vector.dtype)
    for begin, end in _stretches(len(vector), side):
        squares = vector[begin:end].reshape(-1, side, side)
        squares *= signs
        _mix(squares, hadamard)


def rotate_back(vector: Reals, seed: bytes) -> None:
    """Undo ``rotate`` in place, up to floating-point rounding."""
    side = _side(len(vector))
    signs, hadamard = _signs(seed, side, vector.dtype), _hadamard(side, vector.dtype)
    for begin, end in reversed(_stretches(len(vector), side)):
        squares = vector[begin:end].reshape(-1, side, side)
        _mix(squares, hadamard)
        squares *= signs


def _side(size: int) -> int:
    """Return 2^k, the side of the largest square that is not longer than the vector."""
    side = LARGEST_SIDE
    while side > 1 and side * side > size:
        side //= 2
    return side


def _stretches(size: int, side: int) -> list[tuple[int, int]]:
    """Return begin and end of whole numbers of squares that cover the vector, in order."""
    length = side * side
    whole = size - size % length
    found = [(at, min(at + AT_ONCE, whole)) for at in range(0, whole, AT_ONCE)]
    return found if whole == size else [*found, (size - length, size)]


def _signs(seed: bytes, side: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return random signs ``[side, side]``, the same for every square."""
    stream = np.frombuffer(keystream(seed, -(-side * side // 8)), np.uint8)
    bits = np.unpackbits(stream, count=side * side).reshape(side, side)
    signs: NDArray[Any] = np.array([1, -1], dtype)[bits]
    return signs


def _hadamard(side: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return Sylvester's symmetric matrix ``[side, side]``, scaled to be its own inverse."""
    rows = np.ones((1, 1), dtype)
    while len(rows) < side:
        rows = np.block([[rows, rows], [rows, -rows]])
    return np.asarray(rows / np.sqrt(side), dtype)


def _mix(squares: NDArray[Any], hadamard: NDArray[Any]) -> None:
    """Replace each X of ``squares`` ``[count, side, side]`` by H X H."""
    half = np.matmul(squares.reshape(-1, len(hadamard)), hadamard).reshape(squares.shape)
    np.matmul(hadamard, half, out=squares)
