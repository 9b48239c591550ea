"""Replays secure aggregation from the bytes of a vector, through the code of both sides.

A *run* is one attempt of one round: the signed task and a list of events. An event is a message
from a site (`ready`, `mask`, `confirm`, `unmask`, perhaps lost on the way) or from the coordinator
(`close_cohort`, `close_survivors`, `unmask_request`), in the order in which they happened. Every
message is computed again and must be byte for byte the one in the file; what travels on is the
file's. A `forged` message is not what honest code sends, and is delivered as it is.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.protection import masking
from hospitium_client.protection.masking import Party
from hospitium_client.protection.site_state import SiteState
from hospitium_common.entropy import seeded_entropy
from hospitium_common.messages import decode
from hospitium_common.roster import Roster
from hospitium_common.secagg.fixed_point import quantise
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_server.unmasking import Unmasking

TAKES = {"ready": "on_ready", "mask": "on_masked", "confirm": "on_ack", "unmask": "on_shares"}
QUANTISER = Quantiser(lengths=(6, 3), bounds=(0.05, 0.5))


class Enrolled:
    """The parties of a vector file: keys, roster, and states right after pairing."""

    def __init__(self, given: dict) -> None:
        self.coordinator = Ed25519PrivateKey.from_private_bytes(
            bytes.fromhex(given["coordinator_key"])
        )
        keys = {int(i): SiteKeys.decode(bytes.fromhex(k)) for i, k in given["site_keys"].items()}
        self.roster = Roster(
            study=bytes.fromhex(given["study"]), epoch=given["epoch"],
            coordinator=self.coordinator.public_key().public_bytes_raw(),
            sites={i: keys[i].public() for i in keys},
            signatures=tuple(
                (bytes.fromhex(p), bytes.fromhex(s)) for p, s in given["governance_signatures"]
            ),
        )  # fmt: skip
        assert self.roster.digest.hex() == given["roster_digest"]
        self.parties = {i: Party(index=i, keys=keys[i], roster=self.roster) for i in keys}
        self.governance = bytes.fromhex(given["governance_public"])
        roots = {
            tuple(int(i) for i in pair.split("-")): bytes.fromhex(root)
            for pair, root in given["pair_roots"].items()
        }
        self.states = {
            i: SiteState(
                roster_digest=self.roster.digest,
                roots={j: roots[min(i, j), max(i, j)] for j in keys if j != i},
            )
            for i in keys
        }


def policy_of(study: bytes, given: dict) -> SecAggPolicy:
    return SecAggPolicy(study=study, **given)


def update_of(run: dict, site: int):
    """A site's update ``[9]``, and its tail of two words: weight and a count."""
    values = np.frombuffer(bytes.fromhex(run["updates"][str(site)]), np.float32)
    return values, np.array([site, 2**64 - site], np.uint64)


class Replay:
    """One run, event by event."""

    def __init__(self, enrolled: Enrolled, run: dict, states: dict[int, SiteState]) -> None:
        self.run, self.parties, self.states = run, enrolled.parties, states
        self.policy = policy_of(enrolled.roster.study, run["policy"])
        self.entropy = seeded_entropy(bytes.fromhex(run["entropy_seed"]))
        self.task = decode(bytes.fromhex(run["task"]))
        self.coordinator = Unmasking(
            roster=enrolled.roster, policy=self.policy, task=self.task, threads=1
        )
        self.requests = dict.fromkeys(self.task.invited, self.task)
        self.masked = {}

    def at_site(self, step: str, site: int, request):
        """Let a site take one step; return its answer and leave its new state."""
        party, state = self.parties[site], self.states[site]
        if step == "ready":
            made = masking.ready(party, state, self.policy, request, self.entropy)
        elif step == "mask":
            values, tail = update_of(self.run, site)
            dither = self.entropy(f"dither/{self.task.round}/{site}")
            words, _ = quantise(values, self.task.quantiser, self.policy, dither)
            made = masking.mask(party, state, self.policy, request, words, tail)
        elif step == "confirm":
            made = masking.confirm(party, state, self.policy, request)
        else:
            made = masking.unmask(party, state, self.policy, request)
        self.states[site], answer = made
        return answer

    def at_coordinator(self, step: str):
        """Let the coordinator make its next requests."""
        made = getattr(self.coordinator, step)()
        if step == "close_cohort":
            return made
        named = made.digests if step == "close_survivors" else made.acks
        return dict.fromkeys(named, made)

    def event(self, event: dict) -> None:
        """Compute one message, compare it with the file's, and deliver the file's."""
        step = event["step"]
        if step not in TAKES:
            made = self.at_coordinator(step)
            given = event["messages"]
            one_for_all = isinstance(given, str)
            told = {i: bytes.fromhex(given if one_for_all else given[str(i)]) for i in made}
            assert {i: message.encode() for i, message in made.items()} == told, step
            assert one_for_all or len(given) == len(made)
            self.requests = {i: decode(data) for i, data in told.items()}
            return
        site, data = event["site"], bytes.fromhex(event["message"])
        answer = self.at_site(step, site, self.requests[site])
        assert event.get("forged") or answer.encode() == data, (step, site)
        if not event.get("lost"):
            sent = decode(data)
            getattr(self.coordinator, TAKES[step])(sent)
            if step == "mask":
                self.masked[site] = sent

    def up_to(self, count: int | None = None) -> Replay:
        """Replay the first so many events; all of them by default."""
        for event in self.run["events"][:count]:
            self.event(event)
        return self
