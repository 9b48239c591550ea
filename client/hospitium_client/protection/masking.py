"""A site's part of HSA-1 as pure steps: state and message in, new state and answer out.

The caller writes the new state to disk **before** the answer leaves; only then do the promises
hold: a site masks one update per attempt, signs one set of survivors, releases one share per peer,
and never unmasks a round twice.

| phase | message | step | next phase |
| --- | --- | --- | --- |
| any | `Task` with a newer (round, attempt) | `ready` | READY |
| READY | `MaskRequest` | `mask` | MASKED |
| MASKED | `ConfirmRequest` | `confirm` | CONFIRMED |
| CONFIRMED | `UnmaskRequest` | `unmask` | IDLE, round spent |

Anything else is a protocol error that names both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives import constant_time

from hospitium_client.protection.site_state import Held, Phase, SiteState
from hospitium_common import pairing
from hospitium_common.errors import LocalProtocolError, PeerProtocolError
from hospitium_common.messages import (
    Ack,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Paired,
    PairOffers,
    Ready,
    ReadyHead,
    Shares,
    Task,
    UnmaskRequest,
)
from hospitium_common.secagg import shamir
from hospitium_common.secagg.context import (
    SHARE_BYTES,
    cohort_digest,
    model_digest,
    round_context,
    secret_commitment,
    seed_commitment,
    share_commitment,
    survivors_digest,
)
from hospitium_common.secagg.hashing import Label, PayloadHash, derive, is_signed_by, sign
from hospitium_common.secagg.masks import Mask, add_masks, keystream, masked_stretches
from hospitium_common.secagg.packing import pack_words
from hospitium_common.secagg.sealing import cipher_table, open_share, seal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hospitium_common.entropy import Entropy
    from hospitium_common.roster import Roster
    from hospitium_common.secagg.fixed_point import Words
    from hospitium_common.secagg.keys import SiteKeys
    from hospitium_common.secagg.policy import SecAggPolicy

FURTHEST_JUMP = 1 << 16
"""A coordinator may not push a site's ratchet further ahead than this many rounds."""


@dataclass(frozen=True, kw_only=True)
class Party:
    """Who this site is: its roster index, its keys, and the roster of the key epoch."""

    index: int
    keys: SiteKeys
    roster: Roster

    def __post_init__(self) -> None:
        if self.roster.sites.get(self.index) != self.keys.public():
            raise LocalProtocolError(
                f"expected this site's own keys at index {self.index} of the roster, got others"
            )


def pair_offers(party: Party, state: SiteState, entropy: Entropy) -> tuple[SiteState, PairOffers]:
    """Make an offer to every site with a higher index; the roots of earlier epochs are gone."""
    roots, offers = dict[int, bytes](), []
    for peer in sorted(party.roster.sites):
        if peer > party.index:
            secret = entropy(f"secagg/pair/{party.roster.epoch}/{party.index}/{peer}")
            roots[peer], made = pairing.offer(party.keys, party.roster, party.index, peer, secret)
            offers.append(made)
    fresh = SiteState.for_epoch(party.roster, roots, after=state)
    return fresh, PairOffers(offers=tuple(offers))


def accept_pair_offers(
    party: Party, state: SiteState, given: PairOffers
) -> tuple[SiteState, Paired]:
    """Take the offers of the sites with lower indices: of each exactly one.

    Raises:
        PeerProtocolError: an offer is forged, missing or there twice, or rounds have begun, so
            that the old roots would come back.
    """
    if state.roster_digest != party.roster.digest or state.ratchet_at > 0:
        raise PeerProtocolError("expected offers after a pair request for this roster", blame=0)
    roots = {peer: root for peer, root in state.roots.items() if peer > party.index}
    for one in given.offers:
        roots[one.sender] = pairing.accept(party.keys, party.roster, party.index, one)
    senders = sorted(one.sender for one in given.offers)
    lower = [peer for peer in sorted(party.roster.sites) if peer < party.index]
    if senders != lower:
        raise PeerProtocolError(
            f"expected one pair offer from each of the sites {lower}, got {senders}", blame=0
        )
    return replace(state, roots=roots), Paired(roster=party.roster.digest)


def check_task(party: Party, state: SiteState, policy: SecAggPolicy, task: Task) -> bytes:
    """Check a task before any work is done for it; return the round's context.

    Raises:
        PeerProtocolError: not signed by the coordinator for this study, roster and policy; a
            round that is spent or replayed; a cohort outside the policy.
    """
    context = round_context(task, party.roster, policy)
    if not is_signed_by(party.roster.coordinator, task.signature, Label.TASK, context):
        raise PeerProtocolError(
            f"round {task.round}: the task is not signed by the coordinator for this study, "
            "roster and policy",
            blame=0,
        )
    if task.model_digest != model_digest(task.purpose, task.model, task.public):
        raise PeerProtocolError(f"round {task.round}: the model is not the signed one", blame=0)
    if not set(task.invited) <= set(party.roster.sites) or party.index not in task.invited:
        raise PeerProtocolError("expected an invitation of enrolled sites, this one among them", 0)
    if not max(3, policy.m_min) <= len(task.invited) <= policy.n_max:
        raise PeerProtocolError(
            f"round {task.round}: expected {max(3, policy.m_min)} to {policy.n_max} invited "
            f"sites, got {len(task.invited)}",
            blame=0,
        )
    if task.round <= state.spent or (task.round, task.attempt) <= state.latest:
        raise PeerProtocolError(
            f"expected a newer round than {state.latest}, got {(task.round, task.attempt)}: "
            "replayed",
            blame=0,
        )
    if task.round - state.ratchet_at > FURTHEST_JUMP:
        raise PeerProtocolError(f"round {task.round} jumps too far ahead", blame=0)
    if not set(task.invited) <= {party.index, *state.roots}:
        raise PeerProtocolError("expected a pair root with every invited site; pair first", 0)
    return context


def ready(
    party: Party, state: SiteState, policy: SecAggPolicy, task: Task, entropy: Entropy
) -> tuple[SiteState, Ready]:
    """Commit to this attempt's masks and deal the shares of their seeds.

    **Guarantees:** every key here belongs to this attempt only, and the pair roots of earlier
    rounds are gone from the new state.
    """
    context = check_task(party, state, policy, task)
    me, label = party.index, f"secagg/{task.round}/{task.attempt}"
    roots = dict(state.roots)
    for _ in range(task.round - state.ratchet_at):
        roots = {peer: pairing.ratchet(root) for peer, root in roots.items()}
    peers = [peer for peer in task.invited if peer != me]
    seeds = {peer: derive(roots[peer], Label.PAIR_SEED, context) for peer in peers}
    self_mask, table_key = entropy(f"{label}/self-mask/{me}"), entropy(f"{label}/table-key/{me}")
    threshold = policy.threshold(len(task.invited))
    coefficients = keystream(entropy(f"{label}/shamir/{me}"), (threshold - 1) * 2 * SHARE_BYTES)
    shares = shamir.split(self_mask + table_key, threshold, task.invited, coefficients)
    commitments = (
        secret_commitment(context, me, self_mask, survived=True),
        secret_commitment(context, me, table_key, survived=False),
    )
    sealed = {
        peer: seal(
            roots[peer], context, (me, peer), commitments, shares[peer],
            entropy(f"{label}/nonce/{me}/{peer}")[:12],
        )
        for peer in peers
    }  # fmt: skip
    table = cipher_table(table_key, context, b"".join(seeds[peer] for peer in peers))
    seed_commitments = {p: seed_commitment(context, me, p, seeds[p]) for p in peers}
    share_commitments = {p: share_commitment(context, me, p, shares[p]) for p in task.invited}
    body = Ready.body_digest(table, seed_commitments, share_commitments, sealed)
    head = ReadyHead(
        context=context, site=me, self_mask_commitment=commitments[0],
        table_key_commitment=commitments[1], body_digest=body,
    )  # fmt: skip
    answer = Ready(
        head=head, signature=sign(party.keys.sign, Label.READY, *head.parts()), table=table,
        seed_commitments=seed_commitments, share_commitments=share_commitments,
        sealed_shares=sealed,
    )  # fmt: skip
    held = Held(
        context=context, invited=task.invited, seeds=seeds, self_mask=self_mask,
        shares={me: shares[me]},
    )  # fmt: skip
    fresh = replace(
        state, roots=roots, ratchet_at=task.round, latest=(task.round, task.attempt),
        phase=Phase.READY, held=held,
    )  # fmt: skip
    return fresh, answer


def mask(
    party: Party,
    state: SiteState,
    policy: SecAggPolicy,
    request: MaskRequest,
    words: Words,
    tail: NDArray[np.uint64],
    *,
    threads: int = 1,
) -> tuple[SiteState, Masked]:
    """Mask the update ``words`` (changed in place) and ``tail`` for exactly this cohort.

    **Guarantees:** the mask seeds are gone from the new state; without them nothing in the
    answer can be told from uniformly random words.
    """
    held = _held(state, Phase.READY, "MaskRequest")
    cohort = _check_cohort(party, held, policy, request)
    shares = _open_shares(party, state, held, request)
    digest_of_cohort = cohort_digest(held.context, request.heads)
    if tail.shape != (policy.tail_len,):
        raise LocalProtocolError(f"expected a tail of {policy.tail_len} words, got {tail.shape}")
    tail, digested = tail.copy(), PayloadHash(Label.PAYLOAD, 2)
    masks = _masks(party.index, held, cohort, b"body", digest_of_cohort) if len(words) else []
    digested.begin(len(words) * policy.ring_bits // 8)
    for done in masked_stretches(words, masks, threads):
        if policy.ring_bits != 24:
            digested.update(pack_words(done, policy.ring_bits))
    body = pack_words(words, policy.ring_bits)
    if policy.ring_bits == 24:
        digested.update(body)
    add_masks(tail, _masks(party.index, held, cohort, b"tail", digest_of_cohort))
    tail_bytes = tail.tobytes()
    digested.begin(len(tail_bytes))
    digested.update(tail_bytes)
    digest = digested.digest()
    signature = sign(
        party.keys.sign, Label.MASKED, held.context, digest_of_cohort, party.index, digest
    )
    answer = Masked(
        context=held.context, cohort=digest_of_cohort, site=party.index, digest=digest,
        signature=signature, body=body, tail=tail_bytes,
    )  # fmt: skip
    kept = Held(
        context=held.context, invited=held.invited, cohort=cohort,
        cohort_digest=digest_of_cohort, digest=digest, shares=shares,
    )  # fmt: skip
    return replace(state, phase=Phase.MASKED, held=kept), answer


def confirm(
    party: Party, state: SiteState, policy: SecAggPolicy, request: ConfirmRequest
) -> tuple[SiteState, Ack]:
    """Sign the survivors: once per attempt, and only with this site's own digest among them."""
    held = _held(state, Phase.MASKED, "ConfirmRequest")
    survivors = tuple(sorted(request.digests))
    if party.index not in survivors or not set(survivors) <= set(held.cohort):
        raise PeerProtocolError("expected survivors of this cohort, this site among them", blame=0)
    if len(survivors) < policy.floor(len(held.invited)):
        raise PeerProtocolError(
            f"expected at least {policy.floor(len(held.invited))} survivors, got "
            f"{len(survivors)}; nothing is unmasked below that",
            blame=0,
        )
    if request.digests[party.index] != held.digest:
        raise PeerProtocolError("expected this site's own masked vector, got another", blame=0)
    for site in survivors:
        # This site's own digest was compared with what it signed.
        if site != party.index and not is_signed_by(
            party.roster.sites[site].sign, request.signatures.get(site, b""), Label.MASKED,
            held.context, held.cohort_digest, site, request.digests[site],
        ):  # fmt: skip
            raise PeerProtocolError(f"site {site} did not sign the digest named for it", blame=0)
    root = survivors_digest(held.context, held.cohort_digest, request.digests)
    kept = replace(held, survivors=survivors, survivors_digest=root)
    signature = sign(party.keys.sign, Label.ACK, root)
    return replace(state, phase=Phase.CONFIRMED, held=kept), Ack(
        site=party.index, signature=signature
    )


def unmask(
    party: Party, state: SiteState, policy: SecAggPolicy, request: UnmaskRequest
) -> tuple[SiteState, Shares]:
    """Release one share per member of the cohort, once enough sites confirmed the same survivors.

    **Guarantees:** of each peer either the share of its self-mask (it survived) or of its table
    key (it dropped) leaves, never both, whatever the coordinator asks; the round is spent.
    """
    held = _held(state, Phase.CONFIRMED, "UnmaskRequest")
    threshold = policy.threshold(len(held.invited))
    confirmed = (
        site
        for site, signature in request.acks.items()
        if site in held.survivors
        and is_signed_by(party.roster.sites[site].sign, signature, Label.ACK, held.survivors_digest)
    )
    enough = len(tuple(islice(confirmed, threshold)))
    if enough < threshold:
        raise PeerProtocolError(
            f"expected {threshold} confirmations of the same survivors, got {enough}; "
            "nothing is unmasked",
            blame=0,
        )
    released = {
        peer: held.shares[peer][:SHARE_BYTES]
        if peer in held.survivors
        else held.shares[peer][SHARE_BYTES:]
        for peer in held.cohort
    }
    done = replace(state, phase=Phase.IDLE, held=None, spent=state.latest[0])
    return done, Shares(site=party.index, shares=released)


def _masks(
    me: int, held: Held, cohort: Sequence[int], part: bytes, digest_of_cohort: bytes
) -> list[Mask]:
    """Return the masks of one part, body or tail: this site's own, and one with every peer."""
    masks = [Mask(derive(held.self_mask, Label.MASK_SELF, part, digest_of_cohort), 1)]
    for peer in cohort:
        if peer != me:
            key = derive(held.seeds[peer], Label.MASK_PAIR, part, digest_of_cohort)
            masks.append(Mask(key, 1 if me < peer else -1))
    return masks


def _held(state: SiteState, phase: Phase, message: str) -> Held:
    if state.phase is not phase or state.held is None:
        raise PeerProtocolError(
            f"got {message} in phase {state.phase.name}, which belongs to {phase.name}", blame=0
        )
    return state.held


def _check_cohort(
    party: Party, held: Held, policy: SecAggPolicy, request: MaskRequest
) -> tuple[int, ...]:
    cohort = tuple(head.site for head in request.heads)
    if list(cohort) != sorted(set(cohort)) or party.index not in cohort:
        raise PeerProtocolError("expected a cohort in order, this site in it once", blame=0)
    if not set(cohort) <= set(held.invited) or len(cohort) < policy.floor(len(held.invited)):
        raise PeerProtocolError(
            f"expected at least {policy.floor(len(held.invited))} of the invited sites, got "
            f"{len(cohort)}",
            blame=0,
        )
    for head in request.heads:
        if head.context != held.context:
            raise PeerProtocolError(
                f"site {head.site} works on another round, model, roster or policy", blame=0
            )
        if not is_signed_by(
            party.roster.sites[head.site].sign, request.signatures.get(head.site, b""),
            Label.READY, *head.parts(),
        ):  # fmt: skip
            raise PeerProtocolError(f"site {head.site} did not sign its READY head", blame=0)
    return cohort


def _open_shares(
    party: Party, state: SiteState, held: Held, request: MaskRequest
) -> dict[int, bytes]:
    shares = {party.index: held.shares[party.index]}
    for head in request.heads:
        peer = head.site
        if peer == party.index:
            continue
        ours = seed_commitment(held.context, party.index, peer, held.seeds[peer])
        if not constant_time.bytes_eq(request.seed_commitments.get(peer, b""), ours):
            raise PeerProtocolError(
                f"site {peer} derives another pair seed: one of the two was restored from a "
                "backup; both must pair again",
                blame=peer,
            )
        shares[peer] = open_share(
            state.roots[peer], held.context, (peer, party.index), _commitments(head),
            request.sealed_shares.get(peer, b""),
        )  # fmt: skip
    return shares


def _commitments(head: ReadyHead) -> tuple[bytes, bytes]:
    return head.self_mask_commitment, head.table_key_commitment
