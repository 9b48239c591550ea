"""Noise that an attacker cannot predict or undo.

The stream is AES-256-CTR; normal deviates come from Box and Muller (1958) in float64. Each deviate is
the scaled sum of ``DRAWS`` independent ones, so that the gaps between floating-point numbers no
longer tell which values were possible (Mironov 2012; Holohan and Braghin 2021).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

DRAWS = 2
UNIT = 2.0**-53


class SecureNoise:
    """A generator from 32 secret bytes; two with the same key give the same numbers."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> Tensor:
        """Return ``count`` float64 numbers in (0, 1), on the grid of 2^-53."""
        raw = np.frombuffer(self._cipher.update(bytes(8 * count)), np.uint64)
        numbers = (raw >> np.uint64(11)).astype(np.float64)
        return torch.from_numpy((numbers + 0.5) * UNIT)

    def normal(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        """Return float32 noise of this standard deviation."""
        count = math.prod(shape)
        half = -(-count // 2)
        total = torch.zeros(2 * half, dtype=torch.float64)
        for _ in range(DRAWS):
            radius = self.uniform(half).log_().mul_(-2.0).sqrt_()
            angle = self.uniform(half).mul_(2 * math.pi)
            total[:half] += radius * angle.cos()
            total[half:] += radius * angle.sin()
        total *= deviation / math.sqrt(DRAWS)
        return total[:count].reshape(shape).to(torch.float32)
