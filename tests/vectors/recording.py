"""Runs one attempt of one round and writes down what a vector file keeps of it."""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_common import pairing
from hospitium_common.codec import encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Purpose
from hospitium_common.roster import Roster
from hospitium_common.secagg.keys import SiteKeys
from hospitium_server.unmasking import signed_task
from tests.vectors.replay import QUANTISER, Enrolled, Replay, policy_of

STUDY = hashlib.sha256(b"a study").digest()
POLICY = {"ring_bits": 16, "n_max": 8, "m_min": 3, "weight_cap": 1000, "tail_len": 2}


def seed(text: str, size: int = 32) -> bytes:
    return hashlib.shake_256(text.encode()).digest(size)


def enrolled_of(indices) -> tuple[dict, list[str]]:
    """Enrol sites under seeded keys and pair them; return the parties, and the offers."""
    governance = Ed25519PrivateKey.from_private_bytes(seed("governance"))
    coordinator = Ed25519PrivateKey.from_private_bytes(seed("coordinator"))
    keys = {
        i: SiteKeys.decode(encode_parts(
            seed(f"sign {i}"), seed(f"exchange {i}"), seed(f"encapsulate {i}", 64)
        ))
        for i in indices
    }  # fmt: skip
    roster = Roster(
        study=STUDY, epoch=1, coordinator=coordinator.public_key().public_bytes_raw(),
        sites={i: keys[i].public() for i in indices},
    ).signed_by(governance)  # fmt: skip
    roots, offers = {}, []
    for i in indices:
        for j in indices:
            if i < j:
                root, offer = pairing.offer(keys[i], roster, i, j, seed(f"pair {i} {j}"))
                roots[f"{i}-{j}"] = root.hex()
                offers.append(offer.encode().hex())
    return {
        "study": STUDY.hex(), "epoch": 1, "coordinator_key": seed("coordinator").hex(),
        "governance_public": governance.public_key().public_bytes_raw().hex(),
        "governance_signatures": [[p.hex(), s.hex()] for p, s in roster.signatures],
        "roster_digest": roster.digest.hex(),
        "site_keys": {str(i): keys[i].encode().hex() for i in indices}, "pair_roots": roots,
    }, offers  # fmt: skip


def recorded(
    enrolled: Enrolled, states, invited, *, number=1, attempt=1, policy=None, lost=None,
    previous=bytes(64), forge=None,
):  # fmt: skip
    """Run one attempt; return what a vector file keeps of it, and how far it came.

    ``lost`` maps a step to the sites whose answers do not arrive; ``forge`` maps (step, site) to
    a function of the replay and the honest answer that makes another one.
    """
    policy, lost, forge = policy or POLICY, lost or {}, forge or {}
    task = signed_task(
        enrolled.coordinator, enrolled.roster, policy_of(STUDY, policy), purpose=Purpose.TRAIN,
        round_number=number, attempt=attempt, invited=invited, previous_result=previous,
        quantiser=QUANTISER, model=b"the model", public=b"public figures",
    )  # fmt: skip
    generator = np.random.default_rng(number)
    updates = {i: generator.normal(0, 0.02, 9).astype(np.float32) for i in invited}
    run = {
        "policy": policy, "entropy_seed": seed(f"entropy {number} {attempt} {invited}").hex(),
        "updates": {str(i): update.tobytes().hex() for i, update in updates.items()},
        "task": task.encode().hex(), "events": [],
    }  # fmt: skip
    replay, events = Replay(enrolled, run, states), run["events"]
    for step, close in (
        ("ready", "close_cohort"), ("mask", "close_survivors"), ("confirm", "unmask_request"),
        ("unmask", None),
    ):  # fmt: skip
        for site in sorted(replay.requests):
            before = replay.states[site]
            answer = replay.at_site(step, site, replay.requests[site])
            replay.states[site] = before
            change = forge.get((step, site))
            event = {"step": step, "site": site}
            if change:
                answer, event["forged"] = change(replay, answer), True
            event["message"] = answer.encode().hex()
            if site in lost.get(step, ()):
                event["lost"] = True
            events.append(event)
            replay.event(event)
        if close is None:
            break
        try:
            made = replay.at_coordinator(close)
        except PeerProtocolError:
            return run, replay
        told = {str(i): message.encode().hex() for i, message in made.items()}
        same = len(set(told.values())) == 1
        event = {"step": close, "messages": next(iter(told.values())) if same else told}
        events.append(event)
        replay.requests = made
    return run, replay
