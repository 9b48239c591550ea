"""A federation stopped at any stage of a round, for tests of secure aggregation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hospitium_client.protection.masking import confirm, mask, ready, unmask
from hospitium_common.messages import Masked, Purpose, Ready, Shares, Task
from hospitium_common.secagg.fixed_point import quantise
from hospitium_common.secagg.hashing import Label, sign
from hospitium_common.secagg.policy import RingBits, SecAggPolicy
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_server.unmasking import Unmasking, signed_task
from hospitium_simulations.whole_round import enrol

STUDY = bytes(range(32))
QUANTISER = Quantiser(lengths=(40, 7), bounds=(0.05, 0.5))
ROTATED = Quantiser(lengths=(40, 7), bounds=(0.05, 0.5), rotation=bytes(32), mixed=(True, False))


def policy_of(bits: RingBits = 16, tail: int = 3, minimum: int = 3, largest: int = 12):
    return SecAggPolicy(
        study=STUDY, ring_bits=bits, n_max=largest, m_min=minimum, weight_cap=100, tail_len=tail
    )


def updates_for(sites, seed: int = 1):
    generator = np.random.default_rng(seed)
    return {i: generator.normal(0, 0.01, 47).astype(np.float32) for i in sites}


def tails_for(sites):
    return {i: np.array([i, 2**64 - i, 5], np.uint64) for i in sites}


class Stage:
    """A federation stopped at a stage, with what each side sent so far."""

    def __init__(self, sites: int = 5) -> None:
        self.policy, self.federation = policy_of(), enrol(STUDY, range(1, sites + 1))
        self.parties, self.states = self.federation.parties, self.federation.states
        self.sites = list(self.parties)
        self.task = self.make_task()
        self.run = Unmasking(roster=self.federation.roster, policy=self.policy, task=self.task)

    def make_task(self, number: int = 1, attempt: int = 1, **changes) -> Task:
        given = {
            "purpose": Purpose.TRAIN, "round_number": number, "attempt": attempt,
            "invited": self.sites, "previous_result": bytes(64), "quantiser": QUANTISER,
            "model": b"model", "public": b"",
        }  # fmt: skip
        return signed_task(
            self.federation.coordinator, self.federation.roster, self.policy, **given | changes
        )

    def ready_of(self, site: int, task: Task | None = None) -> Ready:
        self.states[site], answer = ready(
            self.parties[site], self.states[site], self.policy, task or self.task,
            self.federation.entropy,
        )  # fmt: skip
        return answer

    def to_cohort(self):
        for site in self.sites:
            self.run.on_ready(self.ready_of(site))
        return self.run.close_cohort()

    def masked_of(self, site: int, request) -> Masked:
        words, _ = quantise(np.zeros(47, np.float32), QUANTISER, self.policy, bytes(32))
        self.states[site], answer = mask(
            self.parties[site], self.states[site], self.policy, request, words,
            np.zeros(3, np.uint64),
        )  # fmt: skip
        return answer

    def to_survivors(self):
        for site, request in self.to_cohort().items():
            self.run.on_masked(self.masked_of(site, request))
        return self.run.close_survivors()

    def confirm_of(self, site: int, request):
        party, state = self.parties[site], self.states[site]
        self.states[site], answer = confirm(party, state, self.policy, request)
        return answer

    def to_unmask(self):
        request = self.to_survivors()
        for site in self.sites:
            self.run.on_ack(self.confirm_of(site, request))
        return self.run.unmask_request()

    def unmask_of(self, site: int, request) -> Shares:
        party, state = self.parties[site], self.states[site]
        self.states[site], answer = unmask(party, state, self.policy, request)
        return answer


def resigned(stage: Stage, site: int, answer: Ready, **changes) -> Ready:
    """A READY that its own site signed after changing it: a malicious site."""
    changed = replace(answer, **changes)
    body = Ready.body_digest(
        changed.table, changed.seed_commitments, changed.share_commitments, changed.sealed_shares
    )
    head = replace(changed.head, body_digest=body)
    key = stage.parties[site].keys.sign
    return replace(changed, head=head, signature=sign(key, Label.READY, *head.parts()))
