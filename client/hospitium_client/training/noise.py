"""Noise that an attacker cannot predict or undo.

The stream is AES-256-CTR; normal deviates come from Box and Muller (1958) in float64. Each number
is the scaled sum of ``DRAWS`` independent deviates, rounded to float32, so that the gaps between
floating-point numbers no longer tell which values were possible (Mironov 2012; Holohan and Braghin
2021). Two numbers share their deviates with orthogonal signs: they are independent all the same,
and two fresh deviates go into each, so that no set of numbers can be solved for single deviates.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

DRAWS = 4
"""Deviates per number, as many as Opacus's secure mode adds up."""
PART = 1 << 15
"""Numbers made at a time: what fits into a processor's cache."""
UNIT = 2.0**-53


class SecureNoise:
    """A generator from 32 secret bytes; two with the same key give the same numbers."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> Tensor:
        """Return ``count`` float64 numbers in (0, 1), on the grid of 2^-53."""
        raw = np.frombuffer(self._cipher.update(bytes(8 * count)), np.uint64)
        numbers = (raw >> np.uint64(11)).astype(np.float64)
        numbers += 0.5
        numbers *= UNIT
        return torch.from_numpy(numbers)

    def normal(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        """Return float32 noise of this standard deviation."""
        count = math.prod(shape)
        result = torch.empty(count, dtype=torch.float32)
        for begin in range(0, count, PART):
            part = result[begin : begin + PART]
            part.copy_(self._deviates(len(part)).mul_(deviation / math.sqrt(DRAWS)))
        return result.reshape(shape)

    def _deviates(self, count: int) -> Tensor:
        """Return float64 sums of ``DRAWS`` standard normal deviates."""
        quarter = -(-count // 4)
        radius = self.uniform(DRAWS * quarter).log_().mul_(-2.0).sqrt_().view(DRAWS, quarter)
        angle = self.uniform(DRAWS * quarter).mul_(2 * math.pi).view(DRAWS, quarter)
        sums = []
        for deviates in (angle.cos(), angle.sin_()):
            even, odd = deviates.mul_(radius).view(2, 2, quarter).sum(0)
            sums += [even + odd, even - odd]
        return torch.cat(sums)[:count]
