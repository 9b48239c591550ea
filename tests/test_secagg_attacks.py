"""Attacks that work on other secure aggregation, and fail here."""

from dataclasses import replace

import numpy as np
import pytest

from hospitium_client.protection.masking import Party, accept_pair_offers, mask, pair_offers, ready
from hospitium_client.protection.site_state import SiteState
from hospitium_common.entropy import system_entropy
from hospitium_common.errors import ConfigError, LocalProtocolError, PeerProtocolError
from hospitium_common.messages import PairOffers, Purpose
from hospitium_common.roster import Roster
from hospitium_common.secagg.fixed_point import Quantiser
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_server.unmasking import Unmasking, signed_task
from hospitium_simulations.whole_round import enrol

STUDY = bytes(32)


def test_a_roster_with_a_swapped_key_is_not_signed_and_not_accepted() -> None:
    federation = enrol(STUDY, range(1, 4))
    governance = [federation.roster.signatures[0][0]]
    swapped = {**federation.roster.sites, 2: SiteKeys.generate().public()}
    with pytest.raises(PeerProtocolError, match="governance"):
        replace(federation.roster, sites=swapped).check(governance)
    with pytest.raises(LocalProtocolError):
        Party(
            index=2,
            keys=federation.parties[2].keys,
            roster=replace(federation.roster, sites=swapped),
        )


def test_one_key_at_two_indices_is_refused() -> None:
    public = SiteKeys.generate().public()
    with pytest.raises(ConfigError, match="twice"):
        Roster(study=STUDY, epoch=1, coordinator=bytes(32), sites={1: public, 2: public})


def test_a_pair_offer_made_by_the_coordinator_is_refused_and_blamed() -> None:
    federation = enrol(STUDY, range(1, 4))
    _, made = pair_offers(federation.parties[1], SiteState(), system_entropy)
    mine = next(offer for offer in made.offers if offer.receiver == 3)
    forged = PairOffers(offers=(replace(mine, signature=bytes(64)),))
    state, _ = pair_offers(federation.parties[3], SiteState(), system_entropy)
    with pytest.raises(PeerProtocolError) as refused:
        accept_pair_offers(federation.parties[3], state, forged)
    assert refused.value.blame == 1


def test_one_masked_vector_of_zeros_is_uniform() -> None:
    """Chi-square over 256 byte values; a sound generator fails once in a million runs."""
    federation = enrol(STUDY, range(1, 4))
    policy = SecAggPolicy(study=STUDY, ring_bits=16, n_max=5, m_min=3, weight_cap=1, tail_len=1)
    size = 200_000
    task = signed_task(
        federation.coordinator, federation.roster, policy, purpose=Purpose.TRAIN, round_number=1,
        attempt=1, invited=(1, 2, 3), previous_result=bytes(64),
        quantiser=Quantiser(lengths=(size,), bounds=(1.0,)), model=b"", public=b"",
    )  # fmt: skip
    coordinator = Unmasking(roster=federation.roster, policy=policy, task=task)
    for i in task.invited:
        federation.states[i], answer = ready(
            federation.parties[i], federation.states[i], policy, task, system_entropy
        )
        coordinator.on_ready(answer)
    request = coordinator.close_cohort()[1]
    zeros, tail = np.zeros(size, np.uint16), np.zeros(1, np.uint64)
    _, masked = mask(federation.parties[1], federation.states[1], policy, request, zeros, tail)
    counts = np.bincount(np.frombuffer(masked.body, np.uint8), minlength=256)
    expected = 2 * size / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 377.1  # quantile 1 - 1e-6 at 255 degrees of freedom
