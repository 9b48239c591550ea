"""HSA-1 as a whole: the exact sum over the announced survivors, or an abort revealing nothing."""

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hospitium_client.protection.masking import confirm, mask, ready, unmask
from hospitium_client.protection.site_state import SiteState
from hospitium_common.codec import encode_parts
from hospitium_common.entropy import seeded_entropy
from hospitium_common.errors import LocalProtocolError, PeerProtocolError
from hospitium_common.messages import Purpose, decode
from hospitium_common.secagg.context import survivors_digest
from hospitium_common.secagg.fixed_point import quantise, sum_to_reals
from hospitium_common.secagg.hashing import Label, payload_digest, sign
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_common.transcript import Transcript, audit, check_inclusion
from hospitium_server.unmasking import Unmasking, signed_task
from hospitium_simulations.whole_round import FinishedRound, Silence, enrol, pair, run_round
from tests.secagg_kit import QUANTISER, ROTATED, STUDY, policy_of, tails_for, updates_for

FULL = os.environ.get("HOSPITIUM_HYPOTHESIS") == "full"


def integer_sum(updates, survivors, policy, round_number, entropy, quantiser):
    """What the ring elements of the survivors add up to, masks left out."""
    total = 0
    for i in survivors:
        words, _ = quantise(updates[i], quantiser, policy, entropy(f"dither/{round_number}/{i}"))
        total = total + words.astype(np.int64)
    modulus = 1 << policy.ring_bits
    return (total % modulus).astype(np.uint16 if policy.ring_bits == 16 else np.uint32)


def what_is_missing(policy, sites, cohort, survivors, confirmed, shares):
    """Why a round with these losses must stop, or None if it must not."""
    floor, threshold = policy.floor(sites), policy.threshold(sites)
    for count, least, what in (
        (len(cohort), floor, "ready sites"),
        (len(survivors), floor, "masked sites"),
        (len(confirmed), floor, "confirmed sites"),
        (len(shares), threshold, "released shares"),
    ):
        if count < least:
            return f"expected at least {least} {what}, got {count}; nothing was revealed"
    return None


class Disorder:
    """A network that loses, reorders and repeats messages, and a site that hears things twice."""

    def __init__(self, federation, policy, chance, quantiser):
        self.federation, self.policy, self.chance = federation, policy, chance
        self.quantiser = quantiser
        self.states = federation.states

    def at_sites(self, requests, step, early=()):
        """Deliver requests in any order, some of them twice, and after others out of turn."""
        answers = []
        for site in self.shuffled(requests):
            party, request = self.federation.parties[site], decode(requests[site].encode())
            for too_early, message in early:
                with pytest.raises(PeerProtocolError, match="in phase"):
                    too_early(party, self.states[site], self.policy, message)
            self.states[site], answer = step(party, self.states[site], request)
            if self.chance.random() < 0.3:
                with pytest.raises(PeerProtocolError, match=r"in phase|replayed") as refused:
                    step(party, self.states[site], request)
                assert refused.value.blame == 0
            answers.append((site, answer))
        return answers

    def at_coordinator(self, answers, take, lost, *, once=True):
        """Let answers arrive in any order, some of them twice."""
        for site, answer in self.shuffled([a for a in answers if a[0] not in lost]):
            arrived = decode(answer.encode())
            take(arrived)
            if self.chance.random() < 0.3:
                if once:
                    with pytest.raises(PeerProtocolError, match="twice") as refused:
                        take(arrived)
                    assert refused.value.blame == site
                else:
                    take(arrived)

    def shuffled(self, items):
        items = list(items)
        self.chance.shuffle(items)
        return items

    def run(self, updates, tails, number, lost):
        federation, policy, entropy = self.federation, self.policy, self.federation.entropy
        task = signed_task(
            federation.coordinator, federation.roster, policy, purpose=Purpose.TRAIN,
            round_number=number, attempt=1, invited=sorted(updates), previous_result=bytes(64),
            quantiser=self.quantiser, model=b"", public=b"",
        )  # fmt: skip
        coordinator = Unmasking(roster=federation.roster, policy=policy, task=task)

        def make_ready(party, state, request):
            return ready(party, state, policy, request, entropy)

        def make_mask(party, state, request):
            dither = entropy(f"dither/{number}/{party.index}")
            words, _ = quantise(updates[party.index], self.quantiser, policy, dither)
            return mask(party, state, policy, request, words, tails[party.index])

        def make_ack(party, state, request):
            return confirm(party, state, policy, request)

        def make_shares(party, state, request):
            return unmask(party, state, policy, request)

        answers = self.at_sites(dict.fromkeys(updates, task), make_ready)
        self.at_coordinator(answers, coordinator.on_ready, lost["ready"])
        requests = coordinator.close_cohort()
        answers = self.at_sites(requests, make_mask)
        self.at_coordinator(answers, coordinator.on_masked, lost["masked"])
        masked = {site: answer for site, answer in answers if site not in lost["masked"]}
        confirmation = coordinator.close_survivors()
        late = [answer for site, answer in answers if site in lost["masked"]]
        for answer in late:
            with pytest.raises(PeerProtocolError, match="not in the cohort"):
                coordinator.on_masked(answer)
        to_confirm = dict.fromkeys(set(confirmation.digests) - set(lost["ack"]), confirmation)
        answers = self.at_sites(to_confirm, make_ack)
        self.at_coordinator(answers, coordinator.on_ack, (), once=False)
        unmasking = coordinator.unmask_request()
        answers = self.at_sites(
            dict.fromkeys(unmasking.acks, unmasking), make_shares, early=[(confirm, confirmation)]
        )
        self.at_coordinator(answers, coordinator.on_shares, lost["shares"])
        return FinishedRound(total=coordinator.finish(), masked=masked, clipped={})


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
    quantiser = data.draw(st.sampled_from([QUANTISER, ROTATED]), "quantiser")
    minimum = data.draw(st.integers(3, count), "minimum cohort")
    most = data.draw(st.sampled_from([0, 1, count // 2]), "most lost at a stage")
    lost = {
        stage: data.draw(st.sets(st.sampled_from(indices), max_size=most), stage)
        for stage in ("ready", "masked", "ack", "shares")
    }
    entropy = seeded_entropy(data.draw(st.binary(min_size=4, max_size=4), "seed"))
    federation = enrol(STUDY, indices, entropy=entropy)
    policy, updates = policy_of(bits, minimum=minimum), updates_for(indices)
    cohort = set(indices) - lost["ready"]
    survivors = cohort - lost["masked"]
    confirmed = survivors - lost["ack"]
    missing = what_is_missing(
        policy, count, cohort, survivors, confirmed, confirmed - lost["shares"]
    )
    number = data.draw(st.integers(1, 40), "round")
    in_order = data.draw(st.booleans(), "in order")
    chance = data.draw(st.randoms(use_true_random=False), "order of arrival")
    try:
        if in_order:
            done = run_round(
                federation, policy, quantiser, updates, tails_for(indices), round_number=number,
                silence=Silence(**lost),
            )  # fmt: skip
        else:
            disorder = Disorder(federation, policy, chance, quantiser)
            done = disorder.run(updates, tails_for(indices), number, lost)
    except PeerProtocolError as error:
        assert missing is not None
        assert missing in str(error)
        assert error.blame is None
        return
    assert missing is None
    assert set(done.total.survivors) == survivors
    expected = integer_sum(updates, survivors, policy, number, entropy, quantiser)
    np.testing.assert_array_equal(done.total.vector, sum_to_reals(expected, quantiser, policy))
    assert done.total.tail.tolist() == [
        sum(survivors), (2**64 - sum(survivors)) % 2**64, 5 * len(survivors),
    ]  # fmt: skip
    transcript = Transcript.decode(done.total.transcript.encode())
    audit(transcript, federation.roster, policy, [done.masked[site] for site in survivors])
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


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_one_masked_vector_is_uniform(bits):
    """Chi-square over byte values, 255 degrees of freedom: false alarm about once in 10^6."""
    federation, policy = enrol(STUDY, range(1, 4)), policy_of(bits)
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


def test_a_quantiser_of_an_impossible_length_is_refused():
    pairs = [encode_parts(2**63, np.float64(1.0).tobytes()) for _ in range(2)]
    with pytest.raises(PeerProtocolError, match="expected at most"):
        Quantiser.decode(encode_parts(2, *pairs))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_updates_that_are_not_finite_are_never_sent(odd):
    values = np.array([1.0, odd, 0.0], np.float32)
    quantiser = Quantiser(lengths=(3,), bounds=(1.0,))
    with pytest.raises(LocalProtocolError, match="finite"):
        quantise(values, quantiser, policy_of(), bytes(32))


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
    with pytest.raises(PeerProtocolError, match="expected 3 confirmations, got 2"):
        fewer = {site: transcript.acks[site] for site in (1, 2)}
        audit(replace(transcript, acks=fewer), roster, policy, vectors)
    with pytest.raises(PeerProtocolError, match="not the one it signed"):
        answer = replace(transcript.ready[2], table=bytes(len(transcript.ready[2].table)))
        altered = {**transcript.ready, 2: answer}
        audit(replace(transcript, ready=altered), roster, policy, vectors)
    with pytest.raises(PeerProtocolError, match="not in the announced sum"):
        check_inclusion(transcript, roster, policy, 1, bytes(64))


def test_a_signed_tail_of_a_wrong_length_is_blamed_by_the_auditor():
    """A site and the coordinator collude: everything is signed, but nothing adds up."""
    federation, policy, sites = enrol(STUDY, range(1, 4)), policy_of(), range(1, 4)
    done = run_round(
        federation, policy, QUANTISER, updates_for(sites), tails_for(sites), round_number=1
    )
    transcript, keys = done.total.transcript, {i: federation.parties[i].keys.sign for i in sites}
    odd = replace(done.masked[2], tail=bytes(23))
    digest = payload_digest(Label.PAYLOAD, odd.body, odd.tail)
    signature = sign(keys[2], Label.MASKED, odd.context, odd.cohort, 2, digest)
    digests = {**transcript.digests, 2: (digest, signature)}
    root = survivors_digest(odd.context, odd.cohort, {i: d for i, (d, _) in digests.items()})
    acks = {i: sign(keys[i], Label.ACK, root) for i in sites}
    with pytest.raises(PeerProtocolError, match="tail has a wrong length") as refused:
        audit(
            replace(transcript, digests=digests, acks=acks), federation.roster, policy,
            [done.masked[1], odd, done.masked[3]],
        )  # fmt: skip
    assert refused.value.blame == 2


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), kind=st.integers(0, 14))
def test_any_bytes_decode_to_a_message_or_a_declared_error(data, kind):
    try:
        message = decode(bytes((1, kind)) + data)
    except PeerProtocolError:
        return
    assert decode(message.encode()) == message
