"""What each side of HSA-1 refuses, and whom it blames."""

from dataclasses import replace

import pytest

from hospitium_client.protection.masking import accept_pair_offers, pair_offers, ready
from hospitium_client.protection.site_state import SiteState
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import PairOffers, UnmaskRequest
from hospitium_server.unmasking import Unmasking
from tests.secagg_kit import Stage, resigned


def forged_task(s: Stage):
    s.ready_of(1, replace(s.task, signature=bytes(64)))


def task_with_another_model(s: Stage):
    s.ready_of(1, replace(s.task, model=b"other"))


def task_of_another_round_under_the_old_signature(s: Stage):
    s.ready_of(1, replace(s.task, round=2))


def task_for_strangers(s: Stage):
    s.ready_of(1, s.make_task(invited=[1, 2, 3, 99]))


def task_without_this_site(s: Stage):
    s.ready_of(1, s.make_task(invited=[2, 3, 4]))


def task_for_too_few(s: Stage):
    s.ready_of(1, s.make_task(invited=[1, 2]))


def task_replayed(s: Stage):
    s.ready_of(1)
    s.ready_of(1)


def task_that_jumps_far_ahead(s: Stage):
    s.ready_of(1, s.make_task(number=70_000))


def task_of_a_weaker_policy(s: Stage):
    weaker = replace(s.policy, weight_cap=10**6)
    ready(s.parties[1], s.states[1], weaker, s.task, s.federation.entropy)


def ready_from_a_stranger(s: Stage):
    answer = s.ready_of(2)
    s.run.on_ready(replace(answer, head=replace(answer.head, site=77)))


def ready_twice(s: Stage):
    answer = s.ready_of(2)
    s.run.on_ready(answer)
    s.run.on_ready(answer)


def ready_under_another_name(s: Stage):
    answer = s.ready_of(2)
    s.run.on_ready(replace(answer, head=replace(answer.head, site=3)))


def ready_with_a_changed_body(s: Stage):
    s.run.on_ready(replace(s.ready_of(2), table=bytes(32 * 4)))


def ready_that_leaves_a_peer_out(s: Stage):
    answer = s.ready_of(2)
    fewer = {k: v for k, v in answer.sealed_shares.items() if k != 5}
    s.run.on_ready(resigned(s, 2, answer, sealed_shares=fewer))


def ready_of_another_attempt(s: Stage):
    s.run.on_ready(s.ready_of(2, s.make_task(attempt=2)))


def mask_request_for_too_few(s: Stage):
    request = s.to_cohort()[1]
    s.masked_of(1, replace(request, heads=request.heads[:3]))


def mask_request_with_a_substituted_commitment(s: Stage):
    request = s.to_cohort()[1]
    heads = list(request.heads)
    heads[2] = replace(heads[2], self_mask_commitment=bytes(32))
    s.masked_of(1, replace(request, heads=tuple(heads)))


def mask_request_with_a_swapped_share(s: Stage):
    request = s.to_cohort()[1]
    shares = dict(request.sealed_shares)
    shares[3] = shares[4]
    s.masked_of(1, replace(request, sealed_shares=shares))


def mask_request_where_a_peer_has_another_seed(s: Stage):
    request = s.to_cohort()[1]
    s.masked_of(1, replace(request, seed_commitments={**request.seed_commitments, 4: bytes(16)}))


def mask_request_twice(s: Stage):
    request = s.to_cohort()[1]
    s.masked_of(1, request)
    s.masked_of(1, request)


def masked_by_somebody_else(s: Stage):
    answer = s.masked_of(2, s.to_cohort()[2])
    s.run.on_masked(replace(answer, site=3))


def masked_with_another_vector(s: Stage):
    answer = s.masked_of(2, s.to_cohort()[2])
    s.run.on_masked(replace(answer, body=bytes(len(answer.body))))


def masked_cut_short(s: Stage):
    answer = s.masked_of(2, s.to_cohort()[2])
    s.run.on_masked(replace(answer, body=answer.body[:-2]))


def masked_twice(s: Stage):
    answer = s.masked_of(2, s.to_cohort()[2])
    s.run.on_masked(answer)
    s.run.on_masked(answer)


def masked_for_an_old_round(s: Stage):
    old = s.masked_of(2, s.to_cohort()[2])
    s.task = s.make_task(number=2)
    s.run = Unmasking(roster=s.federation.roster, policy=s.policy, task=s.task)
    s.to_cohort()
    s.run.on_masked(old)


def confirm_request_without_this_site(s: Stage):
    request = s.to_survivors()
    fewer = {site: d for site, d in request.digests.items() if site != 1}
    s.confirm_of(1, replace(request, digests=fewer))


def confirm_request_with_an_altered_vector(s: Stage):
    request = s.to_survivors()
    s.confirm_of(1, replace(request, digests={**request.digests, 1: bytes(64)}))


def confirm_request_with_an_unsigned_digest(s: Stage):
    request = s.to_survivors()
    s.confirm_of(1, replace(request, digests={**request.digests, 3: bytes(64)}))


def confirm_request_for_too_few(s: Stage):
    request = s.to_survivors()
    fewer = {site: request.digests[site] for site in (1, 2, 3)}
    s.confirm_of(1, replace(request, digests=fewer))


def two_survivor_lists(s: Stage):
    """The attack on SecAgg+: one list for shares of the mask, another for shares of the key."""
    request = s.to_survivors()
    s.confirm_of(1, request)
    fewer = {site: request.digests[site] for site in (1, 2, 3, 4)}
    s.confirm_of(1, replace(request, digests=fewer))


def unmask_request_without_enough_confirmations(s: Stage):
    request = s.to_unmask()
    few = {site: request.acks[site] for site in (1, 2, 3)}
    s.unmask_of(1, replace(request, acks=few))


def unmask_request_with_confirmations_of_another_list(s: Stage):
    """Sites 2 to 5 confirmed one list; site 1 was shown another and must not release a thing."""
    request = s.to_survivors()
    fewer = replace(request, digests={site: request.digests[site] for site in (1, 2, 3, 4)})
    acks = {site: s.confirm_of(site, request).signature for site in (2, 3, 4, 5)}
    s.confirm_of(1, fewer)

    s.unmask_of(1, UnmaskRequest(acks=acks))


def shares_asked_for_twice(s: Stage):
    request = s.to_unmask()
    s.unmask_of(1, request)
    s.unmask_of(1, request)


def the_same_round_once_more(s: Stage):
    s.unmask_of(1, s.to_unmask())
    s.ready_of(1, s.make_task(attempt=2))


def shares_for_some_only(s: Stage):
    answer = s.unmask_of(2, s.to_unmask())
    s.run.on_shares(replace(answer, shares={4: answer.shares[4]}))


def shares_from_an_unconfirmed_site(s: Stage):
    answer = s.unmask_of(2, s.to_unmask())
    s.run.on_shares(replace(answer, site=99))


def ack_for_another_list(s: Stage):
    request = s.to_survivors()
    answer = s.confirm_of(2, request)
    s.run.on_ack(replace(answer, signature=bytes(64)))


def offers_from_a_swapped_key(s: Stage):
    """The attack on Flower's relayed keys: the coordinator puts its own offer in the middle."""

    entropy = s.federation.entropy
    s.states[1], made = pair_offers(s.parties[1], s.states[1], entropy)
    s.states[3], _ = pair_offers(s.parties[3], s.states[3], entropy)
    offer = next(o for o in made.offers if o.receiver == 3)
    swapped = replace(offer, sealed=offer.sealed[:-1] + bytes([offer.sealed[-1] ^ 1]))
    accept_pair_offers(s.parties[3], s.states[3], PairOffers(offers=(swapped,)))


def offers_with_one_missing(s: Stage):

    s.states[3], _ = pair_offers(s.parties[3], s.states[3], s.federation.entropy)
    accept_pair_offers(s.parties[3], s.states[3], PairOffers(offers=()))


REFUSED = {
    forged_task: 0,
    task_with_another_model: 0,
    task_of_another_round_under_the_old_signature: 0,
    task_for_strangers: 0,
    task_without_this_site: 0,
    task_for_too_few: 0,
    task_replayed: 0,
    task_that_jumps_far_ahead: 0,
    task_of_a_weaker_policy: 0,
    ready_from_a_stranger: 77,
    ready_twice: 2,
    ready_under_another_name: 3,
    ready_with_a_changed_body: 2,
    ready_that_leaves_a_peer_out: 2,
    ready_of_another_attempt: 2,
    mask_request_for_too_few: 0,
    mask_request_with_a_substituted_commitment: 0,
    mask_request_with_a_swapped_share: 3,
    mask_request_where_a_peer_has_another_seed: 4,
    mask_request_twice: 0,
    masked_by_somebody_else: 3,
    masked_with_another_vector: 2,
    masked_cut_short: 2,
    masked_twice: 2,
    masked_for_an_old_round: 2,
    confirm_request_without_this_site: 0,
    confirm_request_with_an_altered_vector: 0,
    confirm_request_with_an_unsigned_digest: 0,
    confirm_request_for_too_few: 0,
    two_survivor_lists: 0,
    unmask_request_without_enough_confirmations: 0,
    unmask_request_with_confirmations_of_another_list: 0,
    shares_asked_for_twice: 0,
    the_same_round_once_more: 0,
    shares_for_some_only: 2,
    shares_from_an_unconfirmed_site: 99,
    ack_for_another_list: 2,
    offers_from_a_swapped_key: 1,
    offers_with_one_missing: 0,
}


@pytest.mark.parametrize("attack", REFUSED, ids=lambda attack: attack.__name__)
def test_is_refused_and_blamed(attack):
    stage = Stage()
    with pytest.raises(PeerProtocolError) as caught:
        attack(stage)
    assert caught.value.blame == REFUSED[attack]


def test_a_dealer_who_lies_in_its_seed_table_is_named_and_nothing_is_unmasked():
    stage = Stage()
    for site in stage.sites:
        answer = stage.ready_of(site)
        if site == 2:
            table = bytes(32) + answer.table[32:]
            answer = resigned(stage, 2, answer, table=table)
        stage.run.on_ready(answer)
    for site, request in stage.run.close_cohort().items():
        if site != 2:  # the liar drops out, and its table is opened
            stage.run.on_masked(stage.masked_of(site, request))
    confirmation = stage.run.close_survivors()
    for site in confirmation.digests:
        stage.run.on_ack(stage.confirm_of(site, confirmation))
    unmasking = stage.run.unmask_request()
    for site in unmasking.acks:
        stage.run.on_shares(stage.unmask_of(site, unmasking))
    with pytest.raises(PeerProtocolError, match="table of pair seeds") as caught:
        stage.run.finish()
    assert caught.value.blame == 2


def test_of_every_peer_one_kind_of_share_leaves_and_never_both():
    stage = Stage()
    requests = stage.to_cohort()
    for site, request in requests.items():
        answer = stage.masked_of(site, request)
        if site != 5:
            stage.run.on_masked(answer)
    confirmation = stage.run.close_survivors()
    for site in confirmation.digests:
        stage.run.on_ack(stage.confirm_of(site, confirmation))
    held = stage.states[1].held.shares
    released = stage.unmask_of(1, stage.run.unmask_request()).shares
    for peer, share in released.items():
        half = held[peer][32:] if peer == 5 else held[peer][:32]
        other = held[peer][:32] if peer == 5 else held[peer][32:]
        assert share == half != other


def test_lists_that_name_a_survivor_as_dropped_get_no_shares():
    stage = Stage()
    request = stage.to_survivors()
    lists = [request, replace(request, digests={i: request.digests[i] for i in (1, 2, 3, 4)})]
    for site in range(1, 5):
        ack = stage.confirm_of(site, lists[site % 2])
        if lists[site % 2] is request:
            stage.run.on_ack(ack)
    with pytest.raises(PeerProtocolError, match="expected at least 4 confirmed sites, got 2"):
        stage.run.unmask_request()


@pytest.mark.parametrize("dealer", [2, 5])
def test_one_dealer_of_wrong_shares_is_blamed_and_not_its_holders(dealer):
    stage = Stage()
    request = stage.to_unmask()
    for site in stage.sites:
        answer = stage.unmask_of(site, request)
        stage.run.on_shares(replace(answer, shares={**answer.shares, dealer: bytes(32)}))
    assert not stage.run.has_enough_shares
    with pytest.raises(PeerProtocolError) as refused:
        stage.run.finish()
    assert refused.value.blame == dealer


def offer_there_twice(stage: Stage) -> PairOffers:
    offers = [
        pair_offers(stage.parties[site], SiteState(), stage.federation.entropy)[1].offers
        for site in (1, 2)
    ]
    mine = [offer for made in offers for offer in made if offer.receiver == 3]
    return PairOffers(offers=(*mine, mine[0]))


def test_pair_offers_come_once_each_and_never_bring_old_roots_back():
    stage = Stage()
    party, entropy = stage.parties[3], stage.federation.entropy
    twice = offer_there_twice(stage)
    fresh, _ = pair_offers(party, stage.states[3], entropy)
    assert sorted(fresh.roots) == [4, 5]
    with pytest.raises(PeerProtocolError, match=r"each of the sites \[1, 2\], got \[1, 1, 2\]"):
        accept_pair_offers(party, fresh, twice)
    paired, _ = accept_pair_offers(party, fresh, PairOffers(offers=twice.offers[:2]))
    assert sorted(paired.roots) == [1, 2, 4, 5]
    stage.ready_of(3)
    with pytest.raises(PeerProtocolError, match="after a pair request"):
        accept_pair_offers(party, stage.states[3], PairOffers(offers=twice.offers[:2]))
