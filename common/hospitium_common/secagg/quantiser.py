"""How values become ring elements: per tensor a public bound, and whether tensors are mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import LocalProtocolError, PeerProtocolError
from hospitium_common.secagg.hashing import Label, tagged_hash
from hospitium_common.secagg.rotation import SEED_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hospitium_common.secagg.policy import SecAggPolicy

LONGEST_VECTOR = 1 << 40
HEAVY_TAIL = {16: 32.0, 24: 64.0, 32: 64.0}
"""Ring width -> bound in units of the tensor's root mean square; updates are heavy-tailed."""
MIXED_TAIL = 5.0
"""Bound of mixed values in units of their standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """Per tensor its length and its bound B: values beyond ±B are clipped, and counted.

    With a ``rotation``, 32 public bytes, the tensors that are marked in ``mixed`` are mixed among
    each other in units of their bounds before they are clipped and rounded.
    """

    lengths: tuple[int, ...]
    bounds: tuple[float, ...]
    rotation: bytes = b""
    mixed: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.bounds):
            raise LocalProtocolError("expected one bound for each tensor")
        if len(self.rotation) not in (0, SEED_BYTES) or len(self.mixed) != (
            len(self.lengths) if self.rotation else 0
        ):
            raise LocalProtocolError("expected a rotation of 32 bytes and a mark for each tensor")
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

    @property
    def largest_norm(self) -> float:
        """The norm that no update has whose values were clipped at these bounds."""
        square, mixed, widest = 0.0, 0, 0.0
        marks = self.mixed or (False,) * len(self.lengths)
        for length, bound, mark in zip(self.lengths, self.bounds, marks, strict=True):
            if mark:
                mixed, widest = mixed + length, max(widest, bound)
            else:
                square += length * bound**2
        return math.sqrt(square + mixed * widest**2)

    def _parts(self) -> list[bytes]:
        pairs = zip(self.lengths, self.bounds, strict=True)
        parts = [encode_parts(n, np.float64(bound).tobytes()) for n, bound in pairs]
        return parts + ([encode_parts(self.rotation, bytes(self.mixed))] if self.rotation else [])

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
        rotation, mixed = b"", b""
        if not reader.at_end:
            last = Reader(reader.part())
            rotation, mixed = last.bytes(SEED_BYTES), last.bytes(count)
            last.finish()
        reader.finish()
        if not set(mixed) <= {0, 1}:
            raise PeerProtocolError("expected a mark of 0 or 1 for each tensor, got another")
        try:
            return cls(
                lengths=tuple(lengths), bounds=tuple(bounds), rotation=rotation,
                mixed=tuple(map(bool, mixed)),
            )  # fmt: skip
        except LocalProtocolError as error:
            raise PeerProtocolError(str(error)) from error


def quantiser_for(
    mean_squares: Sequence[float],
    lengths: Sequence[int],
    fallback: float,
    *,
    policy: SecAggPolicy,
    rotation: bytes = b"",
    sites: int,
) -> Quantiser:
    """Return a round's quantiser from the round before: per tensor a site's mean sum of squares.

    A tensor that did not move says nothing about the next round: it gets ``fallback`` as its
    bound, and is not mixed with others. Mixed values are nearly normal, so `MIXED_TAIL` standard
    deviations hold them, even if one of the ``sites`` made up the whole sum of squares.
    """
    factor = HEAVY_TAIL[policy.ring_bits]
    if rotation:
        factor = min(factor, MIXED_TAIL * math.sqrt(sites))
    bounds, moved = [], []
    for square, length in zip(mean_squares, lengths, strict=True):
        bound = factor * math.sqrt(max(square, 0.0) / max(length, 1))
        moved.append(bound > 0)
        bounds.append(min(bound, fallback) if bound > 0 else fallback)
    return Quantiser(
        lengths=tuple(lengths), bounds=tuple(bounds), rotation=rotation,
        mixed=tuple(moved) if rotation else (),
    )  # fmt: skip
