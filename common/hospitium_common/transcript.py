"""What is left of a round for those who want to check it.

The transcript holds no update: commitments, signed digests, confirmations, and the released seeds
of masks that are gone. With the signed masked vectors beside it anyone recomputes the integer sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Masked, Ready, Task, decode
from hospitium_common.secagg.context import (
    cohort_digest,
    round_context,
    secret_commitment,
    seed_commitment,
    survivors_digest,
)
from hospitium_common.secagg.hashing import Label, derive, is_signed_by, payload_digest
from hospitium_common.secagg.masks import Mask, add_masks
from hospitium_common.secagg.packing import unpack_words
from hospitium_common.secagg.sealing import cipher_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from hospitium_common.roster import Roster
    from hospitium_common.secagg.policy import SecAggPolicy


def result_digest(words: NDArray[Any], tail: NDArray[np.uint64]) -> bytes:
    """Digest of the announced integer sum; the next task names it as the previous result."""
    return payload_digest(Label.RESULT, words.view(np.uint8).data, tail.view(np.uint8).data)


def announced(results: Sequence[bytes]) -> bytes:
    """Return what the next task names: a round's result, or one digest over those of its groups."""
    return results[0] if len(results) == 1 else payload_digest(Label.RESULT, *results)


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One finished round. ``task`` is without model and public figures; its digest binds them.

    ``digests`` maps a survivor to the digest of its masked vector and its signature on it;
    ``released`` maps a member of the cohort to the one secret of it that was rebuilt.
    """

    task: Task
    roster_digest: bytes
    ready: Mapping[int, Ready]
    digests: Mapping[int, tuple[bytes, bytes]]
    acks: Mapping[int, bytes]
    released: Mapping[int, bytes]
    result: bytes

    def encode(self) -> bytes:
        """Return the transcript as bytes."""
        return encode_parts(
            self.task.encode(),
            self.roster_digest,
            encode_parts(*(self.ready[site].encode() for site in sorted(self.ready))),
            encode_parts(*(encode_parts(s, *self.digests[s]) for s in sorted(self.digests))),
            encode_parts(*(encode_parts(s, self.acks[s]) for s in sorted(self.acks))),
            encode_parts(*(encode_parts(s, self.released[s]) for s in sorted(self.released))),
            self.result,
        )

    @classmethod
    def decode(cls, data: bytes) -> Transcript:
        """Read what ``encode`` wrote.

        Raises:
            PeerProtocolError: the bytes are something else.
        """
        reader = Reader(data)
        task = decode(reader.bytes())
        roster_digest = reader.bytes(32)
        ready = [decode(row) for row in _rows(reader)]
        digests: dict[int, tuple[bytes, bytes]] = {}
        acks: dict[int, bytes] = {}
        released: dict[int, bytes] = {}
        for row in _rows(reader):
            inner = Reader(row)
            site = inner.integer()
            digests[site] = (inner.bytes(64), inner.bytes(64))
        for table, length in ((acks, 64), (released, 32)):
            for row in _rows(reader):
                inner = Reader(row)
                site = inner.integer()
                table[site] = inner.bytes(length)
        result = reader.bytes(64)
        reader.finish()
        heads = [one for one in ready if isinstance(one, Ready)]
        if not isinstance(task, Task) or len(heads) != len(ready):
            raise PeerProtocolError("expected a transcript, got other messages")
        transcript = cls(
            task=task, roster_digest=roster_digest, ready={r.head.site: r for r in heads},
            digests=digests, acks=acks, released=released, result=result,
        )  # fmt: skip
        if transcript.encode() != data:
            raise PeerProtocolError("expected a transcript in its one form, got another order")
        return transcript


def check_inclusion(
    transcript: Transcript, roster: Roster, policy: SecAggPolicy, site: int, digest: bytes
) -> None:
    """Check that a site's own masked vector was in a sum that enough sites confirmed.

    Raises:
        PeerProtocolError: it was not, or the transcript contradicts itself.
    """
    _check_signatures(transcript, roster, policy)
    if transcript.digests.get(site, (b"",))[0] != digest:
        raise PeerProtocolError(f"site {site}: its vector is not in the announced sum", blame=0)


def audit(
    transcript: Transcript, roster: Roster, policy: SecAggPolicy, masked: Iterable[Masked]
) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """Recompute the integer sum from the signed masked vectors and the released seeds.

    Returns the sum of the ring elements ``[size]`` and of the tails ``[tail_len]``.

    Raises:
        PeerProtocolError: the announced result is not that sum, or something is not signed.
    """
    cohort = _check_signatures(transcript, roster, policy)
    words: NDArray[Any] | None = None
    tail = np.zeros(policy.tail_len, np.uint64)
    seen = set()
    for one in masked:
        if transcript.digests.get(one.site, (b"",))[0] != payload_digest(
            Label.PAYLOAD, one.body, one.tail
        ):
            raise PeerProtocolError(f"site {one.site}: another vector was signed", blame=0)
        if len(one.tail) != tail.nbytes:
            raise PeerProtocolError(f"site {one.site}: its tail has a wrong length", one.site)
        vector = unpack_words(one.body, policy.ring_bits, transcript.task.quantiser.size)
        words = vector if words is None else np.add(words, vector)
        tail = tail + np.frombuffer(one.tail, np.uint64)
        seen.add(one.site)
    if words is None or seen != set(transcript.digests):
        raise PeerProtocolError("expected the masked vector of every survivor, once", blame=0)
    masks = unmasking_keys(transcript, roster, policy)
    add_masks(words, expand(masks, b"body", cohort))
    add_masks(tail, expand(masks, b"tail", cohort))
    if policy.ring_bits == 24:
        words &= np.uint32(0xFFFFFF)
    if result_digest(words, tail) != transcript.result:
        raise PeerProtocolError("the announced result is not the sum of the vectors", blame=0)
    return words, tail


def unmasking_keys(
    transcript: Transcript, roster: Roster, policy: SecAggPolicy
) -> list[tuple[bytes, bytes, int]]:
    """Return (seed, label, sign) of every mask that is left in the sum of the survivors.

    Raises:
        PeerProtocolError: a secret or a table does not fit its dealer's commitment.
    """
    context = round_context(transcript.task, roster, policy)
    masks: list[tuple[bytes, bytes, int]] = []
    for site in sorted(transcript.ready):
        survived, secret = site in transcript.digests, transcript.released.get(site, b"")
        head = transcript.ready[site].head
        expected = head.self_mask_commitment if survived else head.table_key_commitment
        if secret_commitment(context, site, secret, survived=survived) != expected:
            raise PeerProtocolError(
                f"site {site}: it dealt shares of something else than it committed to", site
            )
        if survived:
            masks.append((secret, Label.MASK_SELF, -1))
            continue
        peers = [peer for peer in transcript.task.invited if peer != site]
        sealed = transcript.ready[site].table
        table = cipher_table(secret, context, sealed)
        for survivor in sorted(transcript.digests):
            at = peers.index(survivor) * 32
            seed = table[at : at + 32]
            committed = transcript.ready[survivor].seed_commitments[site]
            if seed_commitment(context, site, survivor, seed) != committed:
                raise PeerProtocolError(
                    f"site {site}: the table of pair seeds it left behind is wrong", site
                )
            masks.append((seed, Label.MASK_PAIR, 1 if survivor > site else -1))
    return masks


def expand(masks: Iterable[tuple[bytes, bytes, int]], part: bytes, cohort: bytes) -> list[Mask]:
    """Turn seeds into the masks of one part (body or tail) for one cohort."""
    return [
        Mask(derive(seed, label, part, cohort), 1 if sign > 0 else -1)
        for seed, label, sign in masks
    ]


def _rows(reader: Reader) -> list[bytes]:
    inner, rows = Reader(reader.part()), []
    while not inner.at_end:
        rows.append(inner.bytes())
    return rows


def _check_signatures(transcript: Transcript, roster: Roster, policy: SecAggPolicy) -> bytes:
    """Check everything that is signed, and that enough survivors confirmed; return the cohort."""
    for fault in signature_faults(transcript, roster, policy):
        raise fault
    context = round_context(transcript.task, roster, policy)
    return cohort_digest(context, [answer.head for answer in transcript.ready.values()])


def signature_faults(
    transcript: Transcript, roster: Roster, policy: SecAggPolicy
) -> Iterator[PeerProtocolError]:
    """Yield everything that is not signed by whom it names, or that too few sites confirmed."""
    task = transcript.task
    context = round_context(task, roster, policy)
    if transcript.roster_digest != roster.digest or not is_signed_by(
        roster.coordinator, task.signature, Label.TASK, context
    ):
        yield PeerProtocolError("the transcript is not of a task for this roster and study", 0)
    if not set(transcript.ready) <= set(task.invited) <= set(roster.sites):
        yield PeerProtocolError("expected a cohort of invited, enrolled sites, got others", 0)
        return
    for site, answer in transcript.ready.items():
        if not is_signed_by(
            roster.sites[site].sign, answer.signature, Label.READY, *answer.head.parts()
        ):
            yield PeerProtocolError(f"site {site}: its READY head is not signed by it", 0)
        elif answer.head.context != context or not answer.is_whole(task.invited):
            yield PeerProtocolError(f"site {site}: its READY is not the one it signed", 0)
    cohort = cohort_digest(context, [answer.head for answer in transcript.ready.values()])
    for site, (digest, signature) in transcript.digests.items():
        if site not in transcript.ready or not is_signed_by(
            roster.sites[site].sign, signature, Label.MASKED, context, cohort, site, digest
        ):
            yield PeerProtocolError(f"site {site}: its digest is not signed by it", 0)
    digests = {site: digest for site, (digest, _) in transcript.digests.items()}
    root = survivors_digest(context, cohort, digests)
    confirmed = sum(
        site in digests
        and site in transcript.ready
        and is_signed_by(roster.sites[site].sign, signature, Label.ACK, root)
        for site, signature in transcript.acks.items()
    )
    threshold, floor = policy.threshold(len(task.invited)), policy.floor(len(task.invited))
    if confirmed < threshold:
        yield PeerProtocolError(f"expected {threshold} confirmations, got {confirmed}", blame=0)
    if len(digests) < floor:
        yield PeerProtocolError(f"expected {floor} survivors, got {len(digests)}", blame=0)
