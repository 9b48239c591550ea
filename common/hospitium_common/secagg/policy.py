"""The numbers of secure aggregation that no coordinator may change in mid-study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hospitium_common.secagg.hashing import Label, tagged_hash

RingBits = Literal[16, 24, 32]
SMALLEST_COHORT = 3


@dataclass(frozen=True, kw_only=True)
class SecAggPolicy:
    """Ring width, cohort sizes, weight cap and tail length; all follow from the study document.

    ``study`` is the study's digest; ``tail_len`` counts 64-bit words.
    """

    study: bytes
    ring_bits: RingBits
    n_max: int
    m_min: int
    weight_cap: int
    tail_len: int

    @property
    def digest(self) -> bytes:
        """What stands for this policy in every context."""
        return tagged_hash(
            Label.POLICY, self.study, self.ring_bits, self.n_max, self.m_min, self.weight_cap,
            self.tail_len,
        )  # fmt: skip

    def threshold(self, invited: int) -> int:
        """Shares needed to unmask: two disjoint sets of this size overlap in honest sites."""
        return invited * 2 // 3 + 1

    def floor(self, invited: int) -> int:
        """The fewest sites whose sum may be unmasked."""
        return max(self.threshold(invited), self.m_min, SMALLEST_COHORT)
