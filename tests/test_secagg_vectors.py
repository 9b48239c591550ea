"""Known answers: rounds that must come out byte for byte, and messages that must be refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hospitium_client.protection.masking import accept_pair_offers
from hospitium_client.protection.site_state import SiteState
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import PairOffer, PairOffers, decode
from hospitium_common.transcript import Transcript, audit, check_inclusion
from tests.vectors.replay import TAKES, Enrolled, Replay

VECTORS = Path(__file__).parent / "vectors"
GOOD = json.loads((VECTORS / "secagg_good.json").read_text())
BAD = json.loads((VECTORS / "secagg_bad.json").read_text())


def named(vectors):
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


@named(GOOD["vectors"])
def test_both_sides_say_byte_for_byte_what_the_vector_says(vector):
    enrolled = Enrolled(GOOD["enrolled"])
    states = dict(enrolled.states)
    for run in vector["runs"]:
        replay = Replay(enrolled, run, states).up_to()
        if "sum" not in run:
            with pytest.raises(PeerProtocolError, match="nothing was revealed"):
                replay.at_coordinator("close_survivors")
            continue
        total, expected = replay.coordinator.finish(), run["sum"]
        encoded = total.transcript.encode()
        assert {
            "survivors": list(total.survivors),
            "vector": total.vector.tobytes().hex(),
            "tail": total.tail.tobytes().hex(),
            "result": total.transcript.result.hex(),
            "transcript_sha256": hashlib.sha256(encoded).hexdigest(),
        } == expected
        transcript = Transcript.decode(encoded)
        audit(transcript, enrolled.roster, replay.policy, replay.masked.values())
        for site, masked in replay.masked.items():
            check_inclusion(transcript, enrolled.roster, replay.policy, site, masked.digest)


def test_pair_offers_lead_to_the_roots_of_the_vector():
    enrolled = Enrolled(GOOD["enrolled"])
    offers = [PairOffer.decode(bytes.fromhex(offer)) for offer in GOOD["pair_offers"]]
    assert len(offers) == len(GOOD["enrolled"]["pair_roots"])
    for site, party in enrolled.parties.items():
        known = enrolled.states[site].roots
        state = SiteState(
            roster_digest=enrolled.roster.digest,
            roots={peer: root for peer, root in known.items() if peer > site},
        )
        mine = PairOffers(offers=tuple(one for one in offers if one.receiver == site))
        state, _ = accept_pair_offers(party, state, mine)
        assert state.roots == known


def test_the_good_vectors_cover_ring_widths_losses_and_cohorts():
    runs = [run for vector in GOOD["vectors"] for run in vector["runs"]]
    events = [event for run in runs for event in run["events"]]
    assert len(GOOD["vectors"]) >= 8
    assert {run["policy"]["ring_bits"] for run in runs} == {16, 24, 32}
    assert {event["step"] for event in events if event.get("lost")} == set(TAKES)
    assert {len(run["updates"]) for run in runs} >= {3, 4, 5, 7}


def take_the_step_that_fails(enrolled, replay, vector):
    step, message = vector["step"], bytes.fromhex(vector.get("message", ""))
    roster, policy = enrolled.roster, replay.policy
    if step == "decode":
        decode(message)
    elif step in TAKES:
        replay.at_site(step, vector["site"], decode(message))
    elif step in TAKES.values():
        getattr(replay.coordinator, step)(decode(message))
    elif step == "audit":
        audit(Transcript.decode(message), roster, policy, replay.masked.values())
    elif step == "check_inclusion":
        site = vector["site"]
        digest = replay.masked[site].digest
        check_inclusion(Transcript.decode(message), roster, policy, site, digest)
    elif step == "accept_pair_offers":
        site = vector["site"]
        later = {peer: r for peer, r in enrolled.states[site].roots.items() if peer > site}
        state = replace(enrolled.states[site], roots=later)
        accept_pair_offers(enrolled.parties[site], state, decode(message))
    elif step == "check_roster":
        one, other = vector["swapped"]
        sites = {**roster.sites, one: roster.sites[other], other: roster.sites[one]}
        replace(roster, sites=sites).check([enrolled.governance])
    else:
        getattr(replay.coordinator, step)()


@named(BAD["vectors"])
def test_is_refused_at_this_step_with_this_blame(vector):
    enrolled = Enrolled(BAD["enrolled"])
    enrolled.roster.check([enrolled.governance])
    run = BAD["runs"][vector["run"]]
    replay = Replay(enrolled, run, dict(enrolled.states)).up_to(vector["after"])
    with pytest.raises(PeerProtocolError) as refused:
        take_the_step_that_fails(enrolled, replay, vector)
    assert vector["says"] in str(refused.value)
    assert refused.value.blame == vector["blame"]


def test_the_bad_vectors_are_many_and_their_names_differ():
    names = [vector["name"] for vector in BAD["vectors"]]
    assert len(set(names)) == len(names) >= 25


def test_the_vector_files_stay_small():
    for name in ("secagg_good.json", "secagg_bad.json"):
        assert (VECTORS / name).stat().st_size < 600_000
