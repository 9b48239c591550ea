"""Attacks that work on other secure aggregation, and fail here."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState, _unmask
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from hospitium_client.protection.masking import Party, accept_pair_offers, pair_offers
from hospitium_client.protection.site_state import SiteState
from hospitium_common.entropy import system_entropy
from hospitium_common.errors import ConfigError, LocalProtocolError, PeerProtocolError
from hospitium_common.messages import Message, PairOffers
from hospitium_common.roster import Roster
from hospitium_common.secagg.fixed_point import quantise
from hospitium_common.secagg.hashing import Label, derive
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.secagg.masks import Mask, add_masks
from hospitium_common.secagg.sealing import open_share
from hospitium_common.transcript import expand
from hospitium_simulations.whole_round import enrol
from tests.secagg_kit import QUANTISER, STUDY, Stage


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


# ---------------------------------------------------------------- small seeds (Flower's SecAgg+)


def folded(seed: bytes) -> int:
    """What Flower's generator makes of a seed: the exclusive or of its 32-bit words."""
    return int(np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")))


def our_mask(seed: bytes, size: int) -> bytes:
    words = np.zeros(size, np.uint32)
    add_masks(words, [Mask(derive(seed, Label.MASK_PAIR, b"body", bytes(32)), 1)])
    return words.tobytes()


def test_a_search_over_folded_seeds_opens_flowers_mask_and_not_ours() -> None:
    """Toy size: 12 unknown bits of the fold. All 32 of them are hours, not years."""
    secret_words = np.frombuffer(bytes(range(100, 132)), "<u4").copy()
    secret_words[0] ^= folded(secret_words.tobytes()) ^ 0xABC
    seed, size = secret_words.tobytes(), 6
    assert folded(seed) == 0xABC
    update = np.array([5, 4, 3, 2, 1, 0])
    theirs = (update + pseudo_rand_gen(seed, 1 << 32, [(size,)])[0]) % (1 << 32)
    ours = np.frombuffer(our_mask(seed, size), np.uint32)
    found_theirs, found_ours = [], []
    for guess in range(1 << 12):
        candidate = guess.to_bytes(4, "little") + bytes(28)
        mask = pseudo_rand_gen(candidate, 1 << 32, [(size,)])[0]
        if np.array_equal((theirs - mask) % (1 << 32), update):
            found_theirs.append(guess)
        if our_mask(candidate, size) == ours.tobytes():
            found_ours.append(guess)
    assert found_theirs == [0xABC]
    assert found_ours == []


def test_every_bit_of_a_seed_changes_our_mask_while_flowers_forgets_most() -> None:
    seed = bytes(range(32))
    ours, theirs = {our_mask(seed, 4)}, {pseudo_rand_gen(seed, 1 << 32, [(4,)])[0].tobytes()}
    for bit in range(256):
        other = bytearray(seed)
        other[bit // 8] ^= 1 << (bit % 8)
        ours.add(our_mask(bytes(other), 4))
        theirs.add(pseudo_rand_gen(bytes(other), 1 << 32, [(4,)])[0].tobytes())
    assert len(ours) == 257
    assert len(theirs) == 33


def test_flower_gives_both_shares_to_overlapping_lists_and_we_give_one() -> None:
    state = SecAggPlusState()
    state.threshold = 2
    state.rd_seed_share_dict = {2: b"share of the mask", 3: b"x"}
    state.sk1_share_dict = {2: b"share of the key", 3: b"y"}
    lists: Any = {Key.ACTIVE_NODE_ID_LIST: [2, 3], Key.DEAD_NODE_ID_LIST: [2]}
    given: Any = _unmask(state, lists)
    assert {b"share of the mask", b"share of the key"} <= set(given[Key.SHARE_LIST])

    stage = Stage()
    request = stage.to_unmask()
    held = stage.states[1].held
    assert held is not None
    released = stage.unmask_of(1, request)
    for peer, share in held.shares.items():
        assert [share[:32] in released.encode(), share[32:] in released.encode()] == [True, False]
        assert released.shares[peer] == share[:32]
    assert stage.states[1].held is None


# ---------------------------------------------------------------- a server that rebuilds keys


class Heard:
    """A round of five sites, the last silent after READY: what passed the coordinator."""

    def __init__(self) -> None:
        self.stage = stage = Stage()
        self.roots = {i: dict(stage.states[i].roots) for i in stage.sites}
        messages: list[Message] = [stage.task]
        for site in stage.sites:
            answer = stage.ready_of(site)
            messages.append(answer)
            stage.run.on_ready(answer)
        self.held = {i: held for i in stage.sites if (held := stage.states[i].held) is not None}
        requests = stage.run.close_cohort()
        self.masked = {i: stage.masked_of(i, request) for i, request in requests.items() if i != 5}
        for masked in self.masked.values():
            stage.run.on_masked(masked)
        self.words = quantise(np.zeros(47, np.float32), QUANTISER, stage.policy, bytes(32))[0]
        confirmation = stage.run.close_survivors()
        acks = [stage.confirm_of(i, confirmation) for i in self.masked]
        for ack in acks:
            stage.run.on_ack(ack)
        unmasking = stage.run.unmask_request()
        shares = [stage.unmask_of(i, unmasking) for i in self.masked]
        for share in shares:
            stage.run.on_shares(share)
        self.transcript = stage.run.finish().transcript
        messages += [*requests.values(), *self.masked.values(), confirmation, *acks, unmasking]
        messages += shares
        self.bytes = b"".join(message.encode() for message in messages)
        self.bytes += self.transcript.encode()

    def without(self, site: int, seeds: dict[int, bytes], self_mask: bytes) -> bytes:
        """A site's masked vector after taking away the masks of these seeds."""
        words = np.frombuffer(self.masked[site].body, np.uint16).copy()
        cohort = self.masked[site].cohort
        masks = [(self_mask, Label.MASK_SELF, -1)]
        masks += [(seed, Label.MASK_PAIR, 1 if peer < site else -1) for peer, seed in seeds.items()]
        add_masks(words, expand(masks, b"body", cohort))
        return words.tobytes()


def test_no_message_holds_what_the_coordinator_would_need_to_rebuild_keys() -> None:
    """OpenFL's server holds what rebuilds every key; ours hears no key, root or live pair seed."""
    heard = Heard()
    survivors = set(heard.masked)
    for site, party in heard.stage.parties.items():
        keys = party.keys
        for private in (keys.sign, keys.exchange, keys.encapsulate):
            assert private.private_bytes_raw() not in heard.bytes
        for root in (*heard.roots[site].values(), *heard.stage.states[site].roots.values()):
            assert root not in heard.bytes
        for peer, seed in heard.held[site].seeds.items():
            assert seed not in heard.bytes
            if {site, peer} <= survivors:
                assert seed not in b"".join(heard.transcript.released.values())
        assert (heard.held[site].self_mask in heard.bytes) == (site in survivors)


def test_what_was_released_does_not_open_one_vector_but_the_pair_seeds_would() -> None:
    heard = Heard()
    released = heard.transcript.released
    for site in heard.masked:
        peers = heard.held[site].seeds
        known = {5: peers[5]}  # the table of the dropped site is open
        assert heard.without(site, known, released[site]) != heard.words.tobytes()
        assert heard.without(site, dict(peers), released[site]) == heard.words.tobytes()


# ---------------------------------------------------------------- one secret for all (APPFL)


def test_what_one_site_knows_does_not_open_the_mask_of_another_pair() -> None:
    """Site 1 tells the coordinator everything; sites 2 and 3 stay covered by their own seed."""
    heard = Heard()
    told = heard.held[1]
    theirs = heard.held[2].seeds[3]
    assert theirs == heard.held[3].seeds[2]
    assert theirs not in told.seeds.values()
    assert heard.roots[2][3] not in heard.roots[1].values()
    assert len({seed for held in heard.held.values() for seed in held.seeds.values()}) == 10
    known = {1: told.seeds[2], 5: heard.held[2].seeds[5]}
    opened = heard.without(2, known, heard.transcript.released[2])
    assert opened != heard.words.tobytes()
    for guess in (told.self_mask, *told.seeds.values(), *heard.roots[1].values()):
        seeds = {**known, 3: guess, 4: heard.held[2].seeds[4]}
        opened = heard.without(2, seeds, heard.transcript.released[2])
        assert opened != heard.words.tobytes()


def test_what_one_site_knows_does_not_open_a_share_sealed_for_another() -> None:
    heard = Heard()
    answer = heard.transcript.ready[2]
    bound = answer.head.self_mask_commitment, answer.head.table_key_commitment
    context, sealed = answer.head.context, answer.sealed_shares[3]
    state = heard.stage.states
    assert len(open_share(state[3].roots[2], context, (2, 3), bound, sealed)) == 64
    for root in (*state[1].roots.values(), *heard.roots[1].values(), heard.held[1].self_mask):
        with pytest.raises(PeerProtocolError, match="does not open"):
            open_share(root, context, (2, 3), bound, sealed)
