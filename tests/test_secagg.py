"""HSA-1 as a whole: the exact sum over the announced survivors, or an abort that reveals nothing."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hospitium_client.protection.masking import (
    accept_pair_offers,
    confirm,
    mask,
    pair_offers,
    ready,
    unmask,
)
from hospitium_client.protection.site_state import SiteState
from hospitium_common.entropy import seeded_entropy
from hospitium_common.errors import LocalProtocolError, PeerProtocolError
from hospitium_common.messages import (
    Masked,
    PairOffers,
    Purpose,
    Ready,
    Shares,
    Task,
    UnmaskRequest,
)
from hospitium_common.roster import Roster
from hospitium_common.secagg.context import round_context
from hospitium_common.secagg.fixed_point import Quantiser, quantise, sum_to_reals
from hospitium_common.secagg.hashing import Label, sign
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_common.secagg.transcript import Transcript, audit, check_inclusion
from hospitium_server.unmasking import Unmasking, signed_task
from hospitium_simulations.whole_round import Silence, enrol, pair, run_round

STUDY = bytes(range(32))
FULL = os.environ.get("HOSPITIUM_HYPOTHESIS") == "full"
REFERENCE = (
    Path(os.environ.get("HOSPITIUM_DATA", Path(__file__).parents[2] / "shared" / "data")).parent
    / "design"
    / "protocol_reference.py"
)


def policy_of(bits: int = 16, tail: int = 3, minimum: int = 3, largest: int = 12) -> SecAggPolicy:
    return SecAggPolicy(
        study=STUDY, ring_bits=bits, n_max=largest, m_min=minimum, weight_cap=100, tail_len=tail
    )


QUANTISER = Quantiser(lengths=(40, 7), bounds=(0.05, 0.5))


def updates_for(sites, seed: int = 1):
    generator = np.random.default_rng(seed)
    return {i: generator.normal(0, 0.01, 47).astype(np.float32) for i in sites}


def tails_for(sites):
    return {i: np.array([i, 2**64 - i, 5], np.uint64) for i in sites}


def integer_sum(updates, survivors, policy, round_number, entropy):
    """What the ring elements of the survivors add up to, masks left out."""
    total = 0
    for i in survivors:
        words, _ = quantise(updates[i], QUANTISER, policy, entropy(f"dither/{round_number}/{i}"))
        total = total + words.astype(np.int64)
    modulus = 1 << policy.ring_bits
    return (total % modulus).astype(np.uint16 if policy.ring_bits == 16 else np.uint32)


@settings(
    max_examples=2000 if FULL else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_every_round_gives_the_exact_sum_over_its_survivors_or_reveals_nothing(data):
    count = data.draw(st.integers(3, 9), "sites")
    indices = sorted(data.draw(st.sets(st.integers(1, 255), min_size=count, max_size=count)))
    bits = data.draw(st.sampled_from([16, 24, 32]), "ring bits")
    minimum = data.draw(st.integers(3, count), "minimum cohort")
    lost = {
        stage: data.draw(st.sets(st.sampled_from(indices), max_size=count // 2), stage)
        for stage in ("ready", "masked", "ack", "shares")
    }
    entropy = seeded_entropy(data.draw(st.binary(min_size=4, max_size=4), "seed"))
    federation = enrol(STUDY, indices, entropy=entropy)
    policy, updates = policy_of(bits, minimum=minimum), updates_for(indices)
    cohort = set(indices) - lost["ready"]
    survivors = cohort - lost["masked"]
    confirmed = survivors - lost["ack"]
    floor = policy.floor(count)
    enough = min(len(cohort), len(survivors), len(confirmed)) >= floor and len(
        confirmed - lost["shares"]
    ) >= policy.threshold(count)
    number = data.draw(st.integers(1, 40), "round")
    try:
        done = run_round(
            federation, policy, QUANTISER, updates, tails_for(indices), round_number=number,
            silence=Silence(**lost),
        )  # fmt: skip
    except PeerProtocolError as error:
        assert not enough
        assert "nothing was revealed" in str(error)
        return
    assert enough
    assert set(done.total.survivors) == survivors
    expected = integer_sum(updates, survivors, policy, number, entropy)
    np.testing.assert_array_equal(done.total.vector, sum_to_reals(expected, QUANTISER, policy))
    assert done.total.tail.tolist() == [
        sum(survivors), (2**64 - sum(survivors)) % 2**64, 5 * len(survivors),
    ]  # fmt: skip
    transcript = Transcript.decode(done.total.transcript.encode())
    audit(transcript, federation.roster, policy, done.masked.values())
    for site in survivors:
        check_inclusion(transcript, federation.roster, policy, site, done.masked[site].digest)


def test_rounds_follow_each_other_and_states_survive_being_written_down():
    federation, policy = enrol(STUDY, range(1, 6)), policy_of()
    for number in (1, 2, 5):
        federation.states = {i: SiteState.decode(s.encode()) for i, s in federation.states.items()}
        done = run_round(
            federation, policy, QUANTISER, updates_for(range(1, 6), number), tails_for(range(1, 6)),
            round_number=number,
        )  # fmt: skip
        assert done.total.survivors == (1, 2, 3, 4, 5)
    assert all(state.spent == 5 and state.held is None for state in federation.states.values())


def test_a_failed_attempt_is_followed_by_another_over_the_same_words():
    federation, policy = enrol(STUDY, range(1, 6)), policy_of()
    updates, tails = updates_for(range(1, 6)), tails_for(range(1, 6))
    with pytest.raises(PeerProtocolError, match="expected at least 4 masked sites, got 3"):
        run_round(
            federation, policy, QUANTISER, updates, tails, round_number=1,
            silence=Silence(masked=(1, 2)),
        )  # fmt: skip
    done = run_round(federation, policy, QUANTISER, updates, tails, round_number=1, attempt=2)
    assert done.total.survivors == (1, 2, 3, 4, 5)


def test_new_pair_roots_after_some_sites_missed_rounds_agree_again():
    federation, policy = enrol(STUDY, range(1, 6)), policy_of()
    updates, tails = updates_for(range(1, 6)), tails_for(range(1, 6))
    run_round(
        federation, policy, QUANTISER, updates, tails, round_number=3, silence=Silence(masked=(2,))
    )
    pair(federation)
    done = run_round(federation, policy, QUANTISER, updates, tails, round_number=4)
    assert done.total.survivors == (1, 2, 3, 4, 5)


def test_a_site_restored_from_a_backup_is_left_out_and_the_round_goes_on():
    federation, policy = enrol(STUDY, range(1, 7)), policy_of()
    updates, tails = updates_for(range(1, 7)), tails_for(range(1, 7))
    backup = federation.states[3]
    run_round(federation, policy, QUANTISER, updates, tails, round_number=1)
    wrong_root = {peer: bytes(32) for peer in backup.roots}
    federation.states[3] = replace(backup, roots=wrong_root)
    done = run_round(federation, policy, QUANTISER, updates, tails, round_number=2)
    assert done.total.survivors == (1, 2, 4, 5, 6)


def test_one_masked_vector_is_uniform():
    """Chi-square over byte values, 255 degrees of freedom: false alarm about once in 10^6."""
    federation, policy = enrol(STUDY, range(1, 4)), policy_of(32)
    wide = Quantiser(lengths=(200_000,), bounds=(1.0,))
    updates = {i: np.zeros(200_000, np.float32) for i in range(1, 4)}
    done = run_round(federation, policy, wide, updates, tails_for(range(1, 4)), round_number=1)
    counts = np.bincount(np.frombuffer(done.masked[1].body, np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 377


def test_ring_elements_of_the_largest_cohort_never_wrap():
    for bits in (16, 24, 32):
        policy, quantiser = policy_of(bits), Quantiser(lengths=(3,), bounds=(1.0,))
        values = np.array([9.0, -9.0, 0.5], np.float32)
        total, clipped = np.zeros(3, np.int64), 0
        for site in range(policy.n_max):
            words, beyond = quantise(values, quantiser, policy, bytes([site]) * 32)
            total, clipped = total + words.astype(np.int64), clipped + beyond
        words = (total % (1 << bits)).astype(np.uint16 if bits == 16 else np.uint32)
        reals = sum_to_reals(words, quantiser, policy) / policy.n_max
        assert clipped == 2 * policy.n_max
        np.testing.assert_allclose(reals, [1, -1, 0.5], atol=2e-3)


def test_rounding_is_unbiased():
    """Mean of 40,000 roundings within 5 standard errors: false alarm about once in 10^6."""
    policy, quantiser = policy_of(16), Quantiser(lengths=(40_000,), bounds=(1.0,))
    values = np.full(40_000, 0.123456, np.float32)
    words, _ = quantise(values, quantiser, policy, b"k" * 32)
    errors = sum_to_reals(words, quantiser, policy) - values
    step = 1.0 / ((2**15 - 1) // policy.n_max - 1)
    assert np.abs(errors).max() < step
    assert abs(errors.mean()) < 5 * 0.5 * step / 200


def test_updates_that_are_not_finite_are_never_sent():
    values = np.array([1.0, np.nan, 0.0], np.float32)
    quantiser = Quantiser(lengths=(3,), bounds=(1.0,))
    with pytest.raises(LocalProtocolError, match="finite"):
        quantise(values, quantiser, policy_of(), bytes(32))


# ---------------------------------------------------------------- what must be refused, and blamed


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
    with pytest.raises(PeerProtocolError) as caught:
        attack(Stage())
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


def test_an_auditor_notices_another_result_and_a_missing_vector():
    federation, policy = enrol(STUDY, range(1, 5)), policy_of()
    done = run_round(
        federation, policy, QUANTISER, updates_for(range(1, 5)), tails_for(range(1, 5)),
        round_number=1,
    )  # fmt: skip
    transcript, roster = done.total.transcript, federation.roster
    vectors = list(done.masked.values())
    with pytest.raises(PeerProtocolError, match="is not the sum"):
        audit(replace(transcript, result=bytes(64)), roster, policy, vectors)
    with pytest.raises(PeerProtocolError, match="every survivor"):
        audit(transcript, roster, policy, vectors[1:])
    with pytest.raises(PeerProtocolError, match="another vector was signed"):
        audit(transcript, roster, policy, [replace(vectors[0], tail=bytes(24)), *vectors[1:]])
    with pytest.raises(PeerProtocolError, match="not in the announced sum"):
        check_inclusion(transcript, roster, policy, 1, bytes(64))


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"no {REFERENCE}")
def test_contexts_and_shares_are_byte_for_byte_those_of_the_reference():
    spec = importlib.util.spec_from_file_location("protocol_reference", REFERENCE)
    reference = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = reference
    spec.loader.exec_module(reference)
    federation, policy = enrol(STUDY, range(1, 5)), policy_of()
    ours = federation.roster
    theirs = reference.Roster(
        STUDY, 1, ours.coordinator, {i: ours.sites[i].parts() for i in ours.sites}
    )
    assert ours.digest == theirs.hash
    pinned = reference.Policy(
        study=STUDY, ring_bits=16, n_max=12, m_min=3, weight_cap=100, tail_len=3
    )
    assert policy.digest == pinned.digest()
    quant = reference.Quant(tuple(zip(QUANTISER.lengths, QUANTISER.bounds, strict=True)))
    assert QUANTISER.digest == quant.digest()
    task = signed_task(
        federation.coordinator, ours, policy, purpose=Purpose.TRAIN, round_number=3, attempt=2,
        invited=[1, 2, 4], previous_result=bytes(64), quantiser=QUANTISER, model=b"", public=b"",
    )  # fmt: skip
    their_task = reference.Task(3, 2, (1, 2, 4), task.model_digest, bytes(64), quant)
    context = round_context(task, ours, policy)
    assert context == their_task.ctx(theirs, pinned)
    answer = ready(federation.parties[1], federation.states[1], policy, task, federation.entropy)[1]
    head = answer.head
    assert reference.verify(ours.sites[1].sign, answer.signature, b"hsa1/ready", *head.parts())
    assert policy.threshold(10) == pinned.threshold(10) == 7
