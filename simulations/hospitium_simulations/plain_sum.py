"""The same rounds without masks: what secure aggregation is compared with. For simulations only.

It takes the sites' contributions straight from their `work`, which no deployment can do: a session
has no message that would carry one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.messages import Purpose
from hospitium_common.schedule import training_round
from hospitium_server.secure_sum import RoundPlan, RoundTotals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hospitium_client.work import Contribution, SiteWork
    from hospitium_common.entropy import Entropy
    from hospitium_common.study import Study


class PlainSum:
    """Adds up contributions in float64, without quantising or masking them."""

    def __init__(
        self, study: Study, works: Mapping[int, SiteWork], entropies: Mapping[int, Entropy]
    ) -> None:
        self._study, self._works, self._entropies = study, works, entropies

    def __call__(self, plan: RoundPlan) -> RoundTotals:
        """Let every site work, one after another, and add up."""
        vector = np.zeros(plan.quantiser.size)
        tail: np.ndarray[tuple[int], np.dtype[np.uint64]] | None = None
        for site in self._works:
            part = self._contribution(site, plan)
            vector += part.vector
            tail = part.tail.copy() if tail is None else tail + part.tail
        assert tail is not None  # noqa: S101 - a federation has sites
        result = hashlib.blake2b(vector.tobytes() + tail.tobytes()).digest()
        return RoundTotals(vector=vector, tail=tail, survivors=tuple(self._works), result=result)

    def _contribution(self, site: int, plan: RoundPlan) -> Contribution:
        work, entropy = self._works[site], self._entropies[site]
        if plan.purpose is Purpose.STATISTICS:
            return work.statistics()
        if plan.purpose is Purpose.EVALUATE:
            return work.evaluate(plan.parameters, plan.public)
        number = training_round(plan.number, self._study)
        return work.train(
            number, plan.parameters, plan.public, lambda label: entropy(f"{label}/{plan.number}")
        )
