"""A model's tensors as one flat float32 vector, and the layout that gives it its meaning."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.codec import encode_parts
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Tensors = dict[str, "NDArray[np.float32]"]
"""Name of a parameter -> its values."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and shapes of a model's tensors in the order in which they are laid end to end."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.float32]]) -> Layout:
        """Return the layout of these tensors, in their order."""
        return cls(names=tuple(tensors), shapes=tuple(tensor.shape for tensor in tensors.values()))

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many numbers each tensor holds."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """How many numbers all tensors hold."""
        return sum(self.lengths)

    @property
    def digest(self) -> bytes:
        """SHA-256 over names and shapes: two sides with the same digest mean the same vector."""
        parts = [
            encode_parts(name.encode(), *shape)
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        return hashlib.sha256(encode_parts(*parts)).digest()

    def flatten(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Lay the tensors end to end: float32 ``[size]``.

        Raises:
            ConfigError: the tensors have other names or shapes than this layout.
        """
        found = Layout.of(tensors)
        if found != self:
            raise ConfigError(
                f"expected a model with layout {self.digest.hex()[:12]}, got "
                f"{found.digest.hex()[:12]}: the study's model and this software disagree"
            )
        return np.concatenate([np.ravel(t) for t in tensors.values()], dtype=np.float32)

    def unflatten(self, vector: NDArray[np.float32]) -> Tensors:
        """Cut a vector ``[size]`` into named tensors; they are views of it.

        Raises:
            ConfigError: the vector has another length.
        """
        if vector.shape != (self.size,):
            raise ConfigError(
                f"expected a model of {self.size} numbers, got an array of shape {vector.shape}"
            )
        ends = np.cumsum(self.lengths)
        pieces = np.split(vector, ends[:-1])
        return {
            name: piece.reshape(shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }
