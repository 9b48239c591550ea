"""Whole rounds of secure aggregation: the exact integer sum, or a blamed refusal."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hospitium_client.protection.masking import confirm, mask, ready, unmask
from hospitium_common.entropy import seeded_entropy, system_entropy
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Purpose, Task, decode
from hospitium_common.secagg.fixed_point import Quantiser, quantise, sum_to_reals
from hospitium_common.secagg.policy import RingBits, SecAggPolicy
from hospitium_common.secagg.transcript import audit, check_inclusion
from hospitium_server.unmasking import Unmasking, signed_task
from hospitium_simulations.whole_round import Federation, Silence, enrol, run_round

STUDY = bytes(range(32))
SIZE = 40


def policy_of(bits: RingBits = 16) -> SecAggPolicy:
    return SecAggPolicy(study=STUDY, ring_bits=bits, n_max=10, m_min=3, weight_cap=100, tail_len=2)


def quantiser() -> Quantiser:
    return Quantiser(lengths=(SIZE,), bounds=(1.0,))


def inputs(sites: int) -> tuple[dict[int, NDArray[np.float32]], dict[int, NDArray[np.uint64]]]:
    updates = {i: np.full(SIZE, i / 20, np.float32) for i in range(1, sites + 1)}
    tails = {i: np.array([i, 100 * i], np.uint64) for i in range(1, sites + 1)}
    return updates, tails


@settings(max_examples=25, deadline=None)
@given(data=st.data(), bits=st.sampled_from([16, 24, 32]), sites=st.integers(3, 7))
def test_a_round_gives_the_exact_sum_over_its_survivors_or_nothing(
    data: st.DataObject, bits: RingBits, sites: int
) -> None:
    policy, (updates, tails) = policy_of(bits), inputs(sites)
    some = st.sets(st.integers(1, sites), max_size=2)
    silence = Silence(
        ready=data.draw(some), masked=data.draw(some), ack=data.draw(some), shares=data.draw(some)
    )
    dither = seeded_entropy(b"test")
    federation = enrol(STUDY, range(1, sites + 1), entropy=dither)
    survivors = set(updates) - set(silence.ready) - set(silence.masked)
    acked = survivors - set(silence.ack)
    floor = policy.floor(sites)
    enough = len(acked) >= floor and len(acked - set(silence.shares)) >= policy.threshold(sites)
    if not enough:
        with pytest.raises(PeerProtocolError):
            run_round(
                federation, policy, quantiser(), updates, tails, round_number=1, silence=silence
            )
        return
    done = run_round(
        federation, policy, quantiser(), updates, tails, round_number=1, silence=silence
    )
    assert set(done.total.survivors) == survivors
    assert done.total.tail.tolist() == [sum(survivors), 100 * sum(survivors)]
    words = [quantise(updates[i], quantiser(), policy, dither(f"dither/1/{i}")) for i in survivors]
    total: Any = np.sum([one for one, _ in words], axis=0, dtype=words[0][0].dtype)
    if bits == 24:
        total &= np.uint32(0xFFFFFF)
    assert np.array_equal(done.total.vector, sum_to_reals(total, quantiser(), policy))
    masked = [done.masked[i] for i in done.total.survivors]
    audit(done.total.transcript, federation.roster, policy, masked)
    for one in masked:
        check_inclusion(done.total.transcript, federation.roster, policy, one.site, one.digest)


def started(federation: Federation, sites: int) -> tuple[Unmasking, Task]:
    task = signed_task(
        federation.coordinator, federation.roster, policy_of(), purpose=Purpose.TRAIN,
        round_number=1, attempt=1, invited=range(1, sites + 1), previous_result=bytes(64),
        quantiser=quantiser(), model=b"", public=b"",
    )  # fmt: skip
    coordinator = Unmasking(roster=federation.roster, policy=policy_of(), task=task)
    for i in task.invited:
        federation.states[i], answer = ready(
            federation.parties[i], federation.states[i], policy_of(), task, system_entropy
        )
        coordinator.on_ready(answer)
    return coordinator, task


def masked_by_all(federation: Federation, coordinator: Unmasking, sites: int) -> None:
    updates, tails = inputs(sites)
    for i, request in coordinator.close_cohort().items():
        words, _ = quantise(updates[i], quantiser(), policy_of(), bytes(32))
        federation.states[i], answer = mask(
            federation.parties[i], federation.states[i], policy_of(), request, words, tails[i]
        )
        coordinator.on_masked(answer)


def test_a_site_signs_one_set_of_survivors_only() -> None:
    federation = enrol(STUDY, range(1, 6))
    coordinator, _ = started(federation, 5)
    masked_by_all(federation, coordinator, 5)
    request = coordinator.close_survivors()
    state, _ = confirm(federation.parties[1], federation.states[1], policy_of(), request)
    fewer = replace(request, digests={i: d for i, d in request.digests.items() if i != 5})
    with pytest.raises(PeerProtocolError) as refused:
        confirm(federation.parties[1], state, policy_of(), fewer)
    assert refused.value.blame == 0


def test_lists_that_name_a_survivor_as_dropped_get_no_shares() -> None:
    federation = enrol(STUDY, range(1, 6))
    coordinator, _ = started(federation, 5)
    masked_by_all(federation, coordinator, 5)
    request = coordinator.close_survivors()
    lists = [request, replace(request, digests={i: request.digests[i] for i in (1, 2, 3, 4)})]
    for site in range(1, 5):
        shown = lists[site % 2]
        federation.states[site], ack = confirm(
            federation.parties[site], federation.states[site], policy_of(), shown
        )
        if shown is request:
            coordinator.on_ack(ack)
    with pytest.raises(PeerProtocolError):
        coordinator.unmask_request()


def test_a_replayed_task_is_refused() -> None:
    federation = enrol(STUDY, range(1, 4))
    _, task = started(federation, 3)
    with pytest.raises(PeerProtocolError, match="replayed"):
        ready(federation.parties[1], federation.states[1], policy_of(), task, system_entropy)


@pytest.mark.parametrize("dealer", [2, 5])
def test_one_dealer_of_wrong_shares_is_blamed_and_not_its_holders(dealer: int) -> None:
    federation = enrol(STUDY, range(1, 6))
    coordinator, _ = started(federation, 5)
    masked_by_all(federation, coordinator, 5)
    request = coordinator.close_survivors()
    for i in range(1, 6):
        federation.states[i], ack = confirm(
            federation.parties[i], federation.states[i], policy_of(), request
        )
        coordinator.on_ack(ack)
    for i in range(1, 6):
        _, shares = unmask(
            federation.parties[i], federation.states[i], policy_of(), coordinator.unmask_request()
        )
        coordinator.on_shares(replace(shares, shares={**shares.shares, dealer: bytes(32)}))
    assert not coordinator.has_enough_shares
    with pytest.raises(PeerProtocolError) as refused:
        coordinator.finish()
    assert refused.value.blame == dealer


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), kind=st.integers(0, 14))
def test_any_bytes_decode_to_a_message_or_a_declared_error(data: bytes, kind: int) -> None:
    try:
        message = decode(bytes((1, kind)) + data)
    except PeerProtocolError:
        return
    assert decode(message.encode()) == message
