"""What every key, commitment and signature of a round is bound to; and the commitments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hospitium_common.codec import encode_parts
from hospitium_common.secagg.hashing import SUITE, Label, bitmap, payload_digest, tagged_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hospitium_common.messages import ReadyHead, Task
    from hospitium_common.roster import Roster
    from hospitium_common.secagg.policy import SecAggPolicy

SHARE_BYTES = 32
COMMITMENT_BYTES = 16


def round_context(task: Task, roster: Roster, policy: SecAggPolicy) -> bytes:
    """Return the context of a round: two sides that differ in anything have different ones."""
    return tagged_hash(
        Label.CONTEXT, SUITE, policy.study, roster.digest, policy.digest, roster.epoch,
        task.round, task.attempt, task.model_digest, task.previous_result,
        task.quantiser.digest, task.quantiser.size, bitmap(task.invited),
    )  # fmt: skip


def model_digest(purpose: int, model: bytes | memoryview, public: bytes) -> bytes:
    """Digest of what the coordinator sends along: purpose, model and public figures."""
    return tagged_hash(Label.MODEL, purpose, payload_digest(Label.MODEL, model, public))


def seed_commitment(context: bytes, one: int, other: int, seed: bytes) -> bytes:
    """Both ends of a pair commit to the seed before masking, so that disagreement shows early."""
    low, high = min(one, other), max(one, other)
    return tagged_hash(Label.SEED_COMMITMENT, context, low, high, seed)[:COMMITMENT_BYTES]


def share_commitment(context: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """Commit to the two halves of a share apart: only one of them is ever released."""
    self_mask = share[:SHARE_BYTES]
    table_key = share[SHARE_BYTES:]
    return half_commitment(context, dealer, holder, self_mask, survived=True) + half_commitment(
        context, dealer, holder, table_key, survived=False
    )


def half_commitment(
    context: bytes, dealer: int, holder: int, half: bytes, *, survived: bool
) -> bytes:
    """Commit to a share of the self-mask seed (dealer survived) or of the table key (dropped)."""
    label = Label.SHARE_OF_SELF_MASK if survived else Label.SHARE_OF_TABLE_KEY
    return tagged_hash(label, context, dealer, holder, half)[:COMMITMENT_BYTES]


def secret_commitment(context: bytes, dealer: int, secret: bytes, *, survived: bool) -> bytes:
    """Commit to the self-mask seed, or to the key of the table of pair seeds."""
    label = Label.SELF_MASK_COMMITMENT if survived else Label.TABLE_KEY_COMMITMENT
    return tagged_hash(label, context, dealer, secret)


def cohort_digest(context: bytes, heads: Iterable[ReadyHead]) -> bytes:
    """Digest of the cohort: the READY heads in order of their sites."""
    ordered = sorted(heads, key=lambda head: head.site)
    return tagged_hash(Label.COHORT, context, *(encode_parts(*head.parts()) for head in ordered))


def survivors_digest(context: bytes, cohort: bytes, digests: Mapping[int, bytes]) -> bytes:
    """What an ACK signs: the survivors and the digests of their masked vectors."""
    rows = [encode_parts(site, digests[site]) for site in sorted(digests)]
    return tagged_hash(Label.ACK_ROOT, context, cohort, *rows)
