"""Where randomness comes from: always an argument, always labelled.

Protocol and privacy code never reaches for a generator of its own. It asks an ``Entropy`` for
32 fresh bytes under a label that says what they are for, so that production draws from the
operating system and a simulation can be repeated bit for bit.
"""

import hashlib
import hmac
import os
from collections.abc import Callable

SEED_BYTES = 32

Entropy = Callable[[str], bytes]
"""Label in, 32 bytes out. Two calls with the same label may or may not give the same bytes."""


def system_entropy(label: str) -> bytes:
    """Return 32 bytes from the operating system's generator."""
    return os.urandom(SEED_BYTES)


def seeded_entropy(seed: bytes) -> Entropy:
    """Return a repeatable source: HMAC-SHA256(seed, label). For simulations and tests only.

    Whoever knows the seed can remove every mask and every noise drawn from it.
    """

    def draw(label: str) -> bytes:
        return hmac.new(seed, label.encode(), hashlib.sha256).digest()

    return draw
