"""Attacks that work on other secure aggregation, and fail here."""

from dataclasses import replace

import pytest

from hospitium_client.protection.masking import Party, accept_pair_offers, pair_offers
from hospitium_client.protection.site_state import SiteState
from hospitium_common.entropy import system_entropy
from hospitium_common.errors import ConfigError, LocalProtocolError, PeerProtocolError
from hospitium_common.messages import PairOffers
from hospitium_common.roster import Roster
from hospitium_common.secagg.keys import SiteKeys
from hospitium_simulations.whole_round import enrol
from tests.secagg_kit import STUDY


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


def test_a_roster_that_governance_did_not_sign_is_refused():
    federation = enrol(STUDY, range(1, 4))
    roster = federation.roster
    with pytest.raises(PeerProtocolError, match="expected 1 governance signatures, got 0"):
        roster.check([bytes(32)])
    trusted = roster.signatures[0][0]
    swapped = dict(roster.sites)
    swapped[1], swapped[2] = swapped[2], swapped[1]
    forged = Roster(
        study=roster.study, epoch=roster.epoch, coordinator=roster.coordinator, sites=swapped,
        signatures=roster.signatures,
    )  # fmt: skip
    roster.check([trusted])
    with pytest.raises(PeerProtocolError):
        forged.check([trusted])
