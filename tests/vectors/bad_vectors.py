"""What must be refused: at which step, with what to say, and whom to blame."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

from hospitium_client.protection import masking
from hospitium_common import pairing
from hospitium_common.messages import PairOffers, Ready, UnmaskRequest, decode
from hospitium_common.secagg.context import survivors_digest
from hospitium_common.secagg.hashing import Label, bitmap, payload_digest, sign
from hospitium_server.unmasking import signed_task
from tests.vectors.recording import POLICY, STUDY, recorded, seed
from tests.vectors.replay import QUANTISER, Enrolled, Replay, policy_of


def resigned(replay: Replay, answer: Ready, **changes) -> Ready:
    """A READY signed by its own site after changing it."""
    changed = replace(answer, **changes)
    body = Ready.body_digest(
        changed.table, changed.seed_commitments, changed.share_commitments, changed.sealed_shares
    )
    head = replace(changed.head, body_digest=body)
    key = replay.parties[head.site].keys.sign
    return replace(changed, head=head, signature=sign(key, Label.READY, *head.parts()))


def lying_table(replay: Replay, answer: Ready) -> Ready:
    return resigned(replay, answer, table=bytes(32) + answer.table[32:])


def lying_shares(replay: Replay, answer: Ready) -> Ready:
    """Consistent shares of another secret than the one committed to."""
    state, true = replay.states[answer.head.site], masking.secret_commitment

    def lie(context, dealer, secret, *, survived):
        return true(context, dealer, bytes(32) if survived else secret, survived=survived)

    with patch.object(masking, "secret_commitment", lie):
        party, policy, task = replay.parties[answer.head.site], replay.policy, replay.task
        return masking.ready(party, state, policy, task, replay.entropy)[1]


class Bad:
    """Collects vectors that must fail, and in what way."""

    def __init__(self, enrolled: Enrolled) -> None:
        self.enrolled, self.runs, self.vectors = enrolled, {}, []

    def run(self, name, invited, **changes) -> Replay:
        run, replay = recorded(self.enrolled, dict(self.enrolled.states), invited, **changes)
        self.runs[name] = run
        return replay

    def add(self, name, step, blame, says, *, run="honest", after=0, site=None, message=None,
            **more):  # fmt: skip
        vector = {"name": name, "run": run, "after": after, "step": step}
        if site is not None:
            vector["site"] = site
        if message is not None:
            vector["message"] = (message if isinstance(message, bytes) else message.encode()).hex()
        self.vectors.append(vector | more | {"blame": blame, "says": says})

    def sent(self, step, site, run="honest"):
        """What a site sent, or was sent, at a step."""
        for event in self.runs[run]["events"]:
            if event["step"] == step and event.get("site", site) == site:
                given = event.get("message") or event["messages"]
                return decode(bytes.fromhex(given if isinstance(given, str) else given[str(site)]))
        raise LookupError(step)


BEFORE_COHORT, COHORT, SURVIVORS, UNMASKING, END = 5, 6, 12, 18, 23
"""Events of an honest run of five sites up to these points."""


def bad(enrolled: Enrolled) -> dict:
    """Vectors that fail, each at its last step."""
    made, five = Bad(enrolled), (1, 2, 3, 4, 7)
    honest = made.run("honest", five)
    bad_tasks(made, honest)
    bad_bytes(made)
    bad_ready(made, honest)
    bad_masking(made, honest)
    bad_confirmation(made, honest)
    bad_unmasking(made)
    bad_records(made, honest)
    bad_pairing(made)
    return {"runs": made.runs, "vectors": made.vectors}


def bad_tasks(made: Bad, honest: Replay) -> None:
    task = honest.task

    def signed(policy=None, **changes):
        given = {
            "purpose": task.purpose, "round_number": 1, "attempt": 1, "invited": task.invited,
            "previous_result": bytes(64), "quantiser": QUANTISER, "model": task.model,
            "public": task.public,
        }  # fmt: skip
        roster = made.enrolled.roster
        return signed_task(
            made.enrolled.coordinator, roster, policy_of(STUDY, policy or POLICY), **given | changes
        )

    stranger = signed(invited=(1, 2, 3, 99))
    for name, message, says in (
        ("forged task", replace(task, signature=bytes(64)), "not signed by the coordinator"),
        ("task with another model", replace(task, model=b"other"), "model is not the signed one"),
        ("task of another round, old signature", replace(task, round=2), "not signed"),
        ("task for a stranger", stranger, "invitation of enrolled sites"),
        ("task without this site", signed(invited=(2, 3, 4)), "this one among them"),
        ("task below the site's minimum", signed(invited=(1, 2)), "expected 3 to 8 invited"),
        ("task that jumps too far", signed(round_number=70_000), "jumps too far"),
        ("task under a weaker policy", signed(POLICY | {"weight_cap": 10**6}), "not signed"),
        ("task under another ring", signed(POLICY | {"ring_bits": 32}), "not signed"),
    ):
        made.add(name, "ready", 0, says, site=1, message=message)
    made.add("task replayed", "ready", 0, "replayed", after=1, site=1, message=task)
    four = (1, 2, 3, 4)
    made.run("narrow", four, policy=POLICY | {"n_max": 4})
    wide = signed(POLICY | {"n_max": 4}, invited=(*four, 7))
    made.add("overflow: more sites than the ring has room for", "ready", 0,
             "expected 3 to 4 invited", run="narrow", site=1, message=wide)  # fmt: skip
    made.runs["narrow"]["events"] = []


def bad_bytes(made: Bad) -> None:
    masked = made.sent("mask", 2).encode()
    made.add("message cut short", "decode", None, "truncated", message=masked[:-1])
    made.add("message with a byte too many", "decode", None, "1 more bytes", message=masked + b"0")
    made.add("message of another version", "decode", None, "version 1", message=b"\2" + masked[1:])
    acks = UnmaskRequest(acks={1: bytes(64)}).encode()
    nobody = acks.replace(bitmap((1,)), bitmap((0,)))
    made.add("site 0 in a list", "decode", None, "sites 1 to 255", message=nobody)


def bad_ready(made: Bad, honest: Replay) -> None:
    answer = made.sent("ready", 2)
    fewer = {i: one for i, one in answer.sealed_shares.items() if i != 7}
    renamed = replace(answer, head=replace(answer.head, site=3))
    stranger = replace(answer, head=replace(answer.head, site=77))
    altered = replace(answer, table=bytes(len(answer.table)))
    add = made.add
    add("READY from a stranger", "on_ready", 77, "not invited", message=stranger)
    add("READY twice", "on_ready", 2, "twice", after=2, message=answer)
    add("READY under another name", "on_ready", 3, "not signed", message=renamed)
    add("READY with an altered table", "on_ready", 2, "not what it signed", message=altered)
    add("READY that leaves a peer out", "on_ready", 2, "not name every site",
        message=resigned(honest, answer, sealed_shares=fewer))  # fmt: skip
    other = replace(answer.head, context=seed("another context"))
    key = honest.parties[2].keys.sign
    add("READY for another round", "on_ready", 2, "not signed for this round",
        message=replace(answer, head=other,
                        signature=sign(key, Label.READY, *other.parts())))  # fmt: skip
    add("too few sites ready", "close_cohort", None, "at least 4 ready sites, got 3", after=3)


def bad_masking(made: Bad, honest: Replay) -> None:
    add, request, answer = made.add, made.sent("close_cohort", 1), made.sent("mask", 2)
    at = {"after": COHORT, "site": 1}
    heads = list(request.heads)
    heads[2] = replace(heads[2], self_mask_commitment=bytes(32))
    shares = {**request.sealed_shares, 3: request.sealed_shares[4]}
    seeds = {**request.seed_commitments, 4: bytes(16)}
    add("cohort below the threshold", "mask", 0, "at least 4 of the invited", **at,
        message=replace(request, heads=request.heads[:3]))  # fmt: skip
    add("duplicate site in the cohort", "mask", 0, "this site in it once", **at,
        message=replace(request, heads=(heads[0], *request.heads)))  # fmt: skip
    add("substituted commitment", "mask", 0, "did not sign its READY", **at,
        message=replace(request, heads=tuple(heads)))  # fmt: skip
    add("one share used for two dealers", "mask", 3, "does not open", **at,
        message=replace(request, sealed_shares=shares))  # fmt: skip
    add("peer with another pair seed", "mask", 4, "derives another pair seed", **at,
        message=replace(request, seed_commitments=seeds))  # fmt: skip
    add("mask asked for twice", "mask", 0, "in phase MASKED", after=COHORT + 1, site=1,
        message=request)  # fmt: skip

    def signed(body=answer.body, tail=answer.tail, context=answer.context):
        digest = payload_digest(Label.PAYLOAD, body, tail)
        key = honest.parties[2].keys.sign
        signature = sign(key, Label.MASKED, context, answer.cohort, 2, digest)
        return replace(
            answer, context=context, digest=digest, signature=signature, body=body, tail=tail
        )

    for name, message, blame, says in (
        ("masked vector under another name", replace(answer, site=3), 3, "not signed by it"),
        ("masked vector altered on the way", replace(answer, body=bytes(18)), 2, "not the one"),
        ("masked vector signed too short", signed(body=answer.body[:-2]), 2, "9 ring elements"),
        ("tail signed too short", signed(tail=answer.tail[:-8]), 2, "tail has a wrong length"),
        ("masked vector of another round", signed(context=bytes(32)), 2, "another round"),
    ):
        add(name, "on_masked", blame, says, after=COHORT, message=message)
    add("masked vector twice", "on_masked", 2, "twice", after=COHORT + 2, message=answer)
    add("too few sites masked", "close_survivors", None, "at least 4 masked sites, got 3",
        after=COHORT + 3)  # fmt: skip


def bad_confirmation(made: Bad, honest: Replay) -> None:
    add, request, ack = made.add, made.sent("close_survivors", 1), made.sent("confirm", 2)
    at = {"after": SURVIVORS, "site": 1}

    def only(*sites):
        return replace(request, digests={i: request.digests[i] for i in sites})

    add("survivors without this site", "confirm", 0, "this site among them", **at,
        message=only(2, 3, 4, 7))  # fmt: skip
    add("survivors below the threshold", "confirm", 0, "at least 4 survivors", **at,
        message=only(1, 2, 3))  # fmt: skip
    add("another vector than this site's", "confirm", 0, "own masked vector", **at,
        message=replace(request, digests={**request.digests, 1: bytes(64)}))  # fmt: skip
    add("digest that its site did not sign", "confirm", 0, "did not sign the digest", **at,
        message=replace(request, digests={**request.digests, 3: bytes(64)}))  # fmt: skip
    add("equivocation: overlapping survivor lists", "confirm", 0, "in phase CONFIRMED",
        after=SURVIVORS + 1, site=1, message=only(1, 2, 3, 4))  # fmt: skip
    add("confirmation of another list", "on_ack", 2, "did not confirm these", after=SURVIVORS,
        message=replace(ack, signature=bytes(64)))  # fmt: skip
    add("too few sites confirmed", "unmask_request", None, "at least 4 confirmed sites, got 3",
        after=SURVIVORS + 3)  # fmt: skip
    unmasking = made.sent("unmask_request", 1)
    add(
        "too few confirmations shown",
        "unmask",
        0,
        "expected 4 confirmations",
        after=UNMASKING,
        site=1,
        message=replace(unmasking, acks={i: unmasking.acks[i] for i in (1, 2, 3)}),
    )
    fewer = only(1, 2, 3, 4).digests
    root = survivors_digest(made.sent("mask", 1).context, made.sent("mask", 1).cohort, fewer)
    acks = {i: sign(honest.parties[i].keys.sign, Label.ACK, root) for i in (1, 2, 3, 4)}
    add("equivocation: confirmations of another list", "unmask", 0, "expected 4 confirmations",
        after=UNMASKING, site=1, message=UnmaskRequest(acks=acks))  # fmt: skip


def bad_unmasking(made: Bad) -> None:
    add, request, shares = made.add, made.sent("unmask_request", 1), made.sent("unmask", 2)
    add("shares asked for twice", "unmask", 0, "in phase IDLE", after=UNMASKING + 1, site=1,
        message=request)  # fmt: skip
    add("a spent round once more", "ready", 0, "replayed", after=END, site=1,
        message=decode(bytes.fromhex(made.runs["honest"]["task"])))  # fmt: skip
    add("shares for some peers only", "on_shares", 2, "not one share for each", after=UNMASKING,
        message=replace(shares, shares={4: shares.shares[4]}))  # fmt: skip
    add("shares nobody asked for", "on_shares", 99, "unasked for", after=UNMASKING,
        message=replace(shares, site=99))  # fmt: skip
    add("shares twice", "on_shares", 2, "twice", after=UNMASKING + 2, message=shares)
    add("too few shares", "finish", None, "at least 4 released shares, got 3", after=END - 2)

    def zeroed(_, answer):
        return replace(answer, shares={**answer.shares, 3: bytes(32)})

    four = (1, 2, 3, 4)
    made.run("two holders give wrong shares", four, forge={
        ("unmask", 1): zeroed, ("unmask", 2): zeroed,
    })  # fmt: skip
    made.run("seed-table lie", four, forge={("ready", 2): lying_table}, lost={"mask": (2,)})
    made.run("dealer lie", four, forge={("ready", 2): lying_shares})
    for run, blame, says in (
        ("two holders give wrong shares", 3, "expected 3 shares that fit its commitments, got 2"),
        ("seed-table lie", 2, "table of pair seeds"),
        ("dealer lie", 2, "shares of something else"),
    ):
        add(run, "finish", blame, says, run=run, after=len(made.runs[run]["events"]))


def bad_records(made: Bad, honest: Replay) -> None:
    three = made.run("three", (1, 2, 3))
    true, end = three.coordinator.finish().transcript, len(made.runs["three"]["events"])
    at = {"run": "three", "after": end}
    table = bytes(len(true.ready[2].table))
    altered = {**true.ready, 2: replace(true.ready[2], table=table)}
    for name, transcript, says in (
        ("announced result is another sum", replace(true, result=bytes(64)), "is not the sum"),
        ("transcript with an altered table", replace(true, ready=altered), "not the one it signed"),
        ("transcript with too few confirmations", replace(true, acks={}), "3 confirmations, got 0"),
    ):
        made.add(name, "audit", 0, says, **at, message=transcript)
    fewer = {i: true.digests[i] for i in (1, 2)}
    made.add("update left out of the sum", "check_inclusion", 0, "confirmations", **at, site=3,
             message=replace(true, digests=fewer))  # fmt: skip


def bad_pairing(made: Bad) -> None:
    parties, roster = made.enrolled.parties, made.enrolled.roster

    def offer(sender, key):
        _, given = pairing.offer(parties[key].keys, roster, sender, 3, seed(f"again {sender}"))
        return given

    first, second, swapped = offer(1, 1), offer(2, 2), offer(1, 4)
    damaged = first.sealed[:-1] + bytes([first.sealed[-1] ^ 1])
    key = parties[1].keys.sign
    signature = sign(key, Label.PAIR_SIGNATURE, roster.digest, 1, 3, damaged)
    unopenable = replace(first, sealed=damaged, signature=signature)
    for name, offers, blame, says in (
        ("substituted key: an offer under another's name", (swapped, second), 1, "not signed"),
        ("pair offer that does not open", (unopenable, second), 1, "does not open"),
        ("pair offer missing", (first,), 0, "expected one pair offer"),
        ("pair offer there twice", (first, second, first), 0, "expected one pair offer"),
    ):
        made.add(name, "accept_pair_offers", blame, says, site=3,
                 message=PairOffers(offers=offers))  # fmt: skip
    made.add("substituted keys in the roster", "check_roster", 0, "governance", swapped=[1, 2])
