"""The same rounds without masks: what secure aggregation is compared with. For simulations only.

It takes the sites' contributions straight from their `work`, which no deployment can do: a session
has no message that would carry one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.messages import Purpose
from hospitium_common.schedule import groups, training_round
from hospitium_server.secure_sum import GroupSum, RoundPlan, RoundTotals

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
        """Let every site work, one after another, and add up, group by group."""
        training = plan.purpose is Purpose.TRAIN
        members = groups(self._works, self._study) if training else (tuple(self._works),)
        sums = tuple(self._sum(sites, plan) for sites in members)
        parts = [part for one in sums for part in (one.vector.tobytes(), one.tail.tobytes())]
        return RoundTotals(groups=sums, result=hashlib.blake2b(b"".join(parts)).digest())

    def _sum(self, sites: tuple[int, ...], plan: RoundPlan) -> GroupSum:
        vector = np.zeros(plan.quantiser.size)
        tails = []
        for site in sites:
            part = self._contribution(site, plan)
            vector += part.vector
            tails.append(part.tail)
        return GroupSum(vector=vector, tail=np.sum(tails, axis=0, dtype=np.uint64), survivors=sites)

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
