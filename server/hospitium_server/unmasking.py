"""The coordinator's part of HSA-1: no I/O, one accumulator, and no way to look at one summand.

A round goes open → cohort → survivors → done. Whatever a site sends that does not fit is refused
with a `PeerProtocolError` that blames it; the round goes on without it while enough are left.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hospitium_common.errors import LocalProtocolError, PeerProtocolError
from hospitium_common.messages import (
    Ack,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Purpose,
    Ready,
    Shares,
    Task,
    UnmaskRequest,
)
from hospitium_common.secagg import shamir
from hospitium_common.secagg.context import (
    cohort_digest,
    half_commitment,
    model_digest,
    round_context,
    survivors_digest,
)
from hospitium_common.secagg.fixed_point import sum_to_reals
from hospitium_common.secagg.hashing import Label, is_signed_by, payload_digest, sign
from hospitium_common.secagg.masks import add_masks
from hospitium_common.secagg.packing import unpack_words
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_common.transcript import (
    Transcript,
    expand,
    result_digest,
    unmasking_keys,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from numpy.typing import NDArray

    from hospitium_common.roster import Roster
    from hospitium_common.secagg.fixed_point import Words
    from hospitium_common.secagg.policy import SecAggPolicy


@dataclass(frozen=True, kw_only=True)
class RoundSum:
    """All that a round reveals: the sum of the survivors' vectors, and integer totals."""

    vector: NDArray[np.float64]
    tail: NDArray[np.uint64]
    survivors: tuple[int, ...]
    transcript: Transcript


def signed_task(
    key: Ed25519PrivateKey, roster: Roster, policy: SecAggPolicy, *, purpose: Purpose,
    round_number: int, attempt: int, invited: Sequence[int], previous_result: bytes,
    quantiser: Quantiser, model: bytes | memoryview, public: bytes,
) -> Task:  # fmt: skip
    """Return the task of a round, signed over the round's whole context."""
    task = Task(
        study=policy.study, purpose=purpose, round=round_number, attempt=attempt,
        invited=tuple(sorted(invited)), model_digest=model_digest(purpose, model, public),
        previous_result=previous_result, quantiser=quantiser, signature=bytes(64),
        model=model, public=public,
    )  # fmt: skip
    signature = sign(key, Label.TASK, round_context(task, roster, policy))
    return replace(task, signature=signature)


@dataclass(kw_only=True)
class Unmasking:
    """One attempt of one round."""

    roster: Roster
    policy: SecAggPolicy
    task: Task
    threads: int = 1
    excluded: dict[int, str] = field(default_factory=dict)
    _ready: dict[int, Ready] = field(default_factory=dict)
    _cohort: tuple[int, ...] = ()
    _cohort_digest: bytes = b""
    _sum: Any = None
    _tail: Any = None
    _masked: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    _survivors: tuple[int, ...] = ()
    _survivors_digest: bytes = b""
    _acks: dict[int, bytes] = field(default_factory=dict)
    _shares: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        invited = len(self.task.invited)
        self.context = round_context(self.task, self.roster, self.policy)
        self.threshold = self.policy.threshold(invited)
        self.floor = self.policy.floor(invited)

    def on_ready(self, answer: Ready) -> None:
        """Take a site's commitments.

        Raises:
            PeerProtocolError: not invited, twice, unsigned, for another context, malformed.
        """
        site, invited = answer.head.site, self.task.invited
        if self._cohort:
            raise LocalProtocolError("got READY after the cohort was closed")
        if site not in invited or site in self._ready:
            raise PeerProtocolError(f"site {site}: not invited, or READY twice", site)
        if answer.head.context != self.context or not self._signed(
            site, answer.signature, Label.READY, *answer.head.parts()
        ):
            raise PeerProtocolError(f"site {site}: its READY is not signed for this round", site)
        if not answer.is_whole(invited):
            raise PeerProtocolError(
                f"site {site}: its READY is not what it signed, or does not name every site", site
            )
        self._ready[site] = answer

    def close_cohort(self) -> dict[int, MaskRequest]:
        """Fix the cohort to those who are ready; return each member's request.

        Two sites whose commitments to their common seed differ are not put together: the one
        that disagrees with most is left out (the first of them, where several do).

        Raises:
            PeerProtocolError: too few sites are left.
        """
        cohort = set(self._ready)
        while True:
            disagreements = {
                one: sum(
                    self._ready[one].seed_commitments[other]
                    != self._ready[other].seed_commitments[one]
                    for other in cohort - {one}
                )
                for one in sorted(cohort)
            }
            worst = max(disagreements, key=lambda one: disagreements[one], default=None)
            if worst is None or disagreements[worst] == 0:
                break
            self.excluded[worst] = "its pair seeds differ from those of others"
            cohort.discard(worst)
        self._demand_floor(len(cohort), "ready")
        self._cohort = tuple(sorted(cohort))
        heads = tuple(self._ready[site].head for site in self._cohort)
        self._cohort_digest = cohort_digest(self.context, heads)
        signatures = {site: self._ready[site].signature for site in self._cohort}
        return {
            site: MaskRequest(
                heads=heads,
                signatures=signatures,
                sealed_shares={
                    peer: self._ready[peer].sealed_shares[site]
                    for peer in self._cohort
                    if peer != site
                },
                seed_commitments={
                    peer: self._ready[peer].seed_commitments[site]
                    for peer in self._cohort
                    if peer != site
                },
            )
            for site in self._cohort
        }

    def on_masked(self, answer: Masked) -> None:
        """Add a masked vector to the accumulator; the vector itself is not kept."""
        site, size = answer.site, self.task.quantiser.size
        if site not in self._cohort or site in self._masked or self._survivors:
            raise PeerProtocolError(f"site {site}: not in the cohort, or MASKED twice", site)
        if (answer.context, answer.cohort) != (self.context, self._cohort_digest):
            raise PeerProtocolError(f"site {site}: MASKED for another round or cohort", site)
        signed = (answer.context, answer.cohort, site, answer.digest)
        if not self._signed(site, answer.signature, Label.MASKED, *signed):
            raise PeerProtocolError(f"site {site}: its MASKED is not signed by it", site)
        if payload_digest(Label.PAYLOAD, answer.body, answer.tail) != answer.digest:
            raise PeerProtocolError(f"site {site}: its vector is not the one it signed", site)
        if len(answer.tail) != 8 * self.policy.tail_len:
            raise PeerProtocolError(f"site {site}: its tail has a wrong length", site)
        try:
            words = unpack_words(answer.body, self.policy.ring_bits, size)
        except PeerProtocolError as error:
            raise PeerProtocolError(f"site {site}: {error}", site) from error
        tail = np.frombuffer(answer.tail, np.uint64)
        if self._sum is None:
            self._sum, self._tail = words, tail.copy()
        else:
            np.add(self._sum, words, out=self._sum)
            np.add(self._tail, tail, out=self._tail)
        self._masked[site] = (answer.digest, answer.signature)

    def close_survivors(self) -> ConfirmRequest:
        """Fix the survivors to those whose vectors are in the sum; everyone is told the same."""
        self._demand_floor(len(self._masked), "masked")
        self._survivors = tuple(sorted(self._masked))
        digests = {site: self._masked[site][0] for site in self._survivors}
        signatures = {site: self._masked[site][1] for site in self._survivors}
        self._survivors_digest = survivors_digest(self.context, self._cohort_digest, digests)
        return ConfirmRequest(digests=digests, signatures=signatures)

    def on_ack(self, answer: Ack) -> None:
        """Take a site's confirmation of the survivors."""
        site = answer.site
        if site not in self._survivors or not self._signed(
            site, answer.signature, Label.ACK, self._survivors_digest
        ):
            raise PeerProtocolError(f"site {site}: it did not confirm these survivors", site)
        self._acks[site] = answer.signature

    def unmask_request(self) -> UnmaskRequest:
        """Return the confirmations, which every site wants to see before it releases a share."""
        self._demand_floor(len(self._acks), "confirmed")
        return UnmaskRequest(acks=dict(self._acks))

    def on_shares(self, answer: Shares) -> None:
        """Take one site's shares; one that does not fit its dealer's commitment is not used.

        A single share cannot tell whether dealer or holder is at fault: `finish` blames the
        dealer of whom too few shares fit.
        """
        holder = answer.site
        if holder not in self._acks or holder in self._shares:
            raise PeerProtocolError(f"site {holder}: shares unasked for, or twice", holder)
        if set(answer.shares) != set(self._cohort):
            raise PeerProtocolError(f"site {holder}: not one share for each member", holder)
        self._shares[holder] = {
            dealer: share
            for dealer, share in answer.shares.items()
            if self._share_fits(dealer, holder, share)
        }

    @property
    def has_enough_shares(self) -> bool:
        """Whether the sum can be unmasked."""
        return all(len(self._holders_of(dealer)) >= self.threshold for dealer in self._cohort)

    def finish(self) -> RoundSum:
        """Rebuild the seeds, take the masks away, and return the sum with its transcript.

        Raises:
            PeerProtocolError: too few shares, or a dealer's secret does not fit its commitment.
        """
        self._demand(len(self._shares), self.threshold, "released shares")
        released = {dealer: self._rebuild(dealer) for dealer in self._cohort}
        transcript = Transcript(
            task=self._header_of_task(),
            roster_digest=self.roster.digest,
            ready={site: self._ready[site] for site in self._cohort},
            digests={site: self._masked[site] for site in self._survivors},
            acks=dict(self._acks),
            released=released,
            result=b"",
        )
        masks = unmasking_keys(transcript, self.roster, self.policy)
        add_masks(self._sum, expand(masks, b"body", self._cohort_digest), self.threads)
        add_masks(self._tail, expand(masks, b"tail", self._cohort_digest))
        words: Words = self._sum
        if self.policy.ring_bits == 24:
            words &= np.uint32(0xFFFFFF)
        return RoundSum(
            vector=sum_to_reals(words, self.task.quantiser, self.policy),
            tail=self._tail,
            survivors=self._survivors,
            transcript=replace(transcript, result=result_digest(words, self._tail)),
        )

    def _holders_of(self, dealer: int) -> list[int]:
        return [holder for holder in sorted(self._shares) if dealer in self._shares[holder]]

    def _rebuild(self, dealer: int) -> bytes:
        holders = self._holders_of(dealer)[: self.threshold]
        if len(holders) < self.threshold:
            raise PeerProtocolError(
                f"site {dealer}: expected {self.threshold} shares that fit its commitments, got "
                f"{len(holders)}; leave it out of the next round",
                dealer,
            )
        return shamir.combine({h: self._shares[h][dealer] for h in holders})

    def _header_of_task(self) -> Task:
        return replace(self.task, model=b"", public=b"")

    def _share_fits(self, dealer: int, holder: int, share: bytes) -> bool:
        survived = dealer in self._survivors
        committed = self._ready[dealer].share_commitments[holder]
        expected = committed[:16] if survived else committed[16:]
        return half_commitment(self.context, dealer, holder, share, survived=survived) == expected

    def _signed(self, site: int, signature: bytes, label: bytes, *parts: int | bytes) -> bool:
        return is_signed_by(self.roster.sites[site].sign, signature, label, *parts)

    def _demand_floor(self, count: int, what: str) -> None:
        self._demand(count, self.floor, f"{what} sites")

    def _demand(self, count: int, least: int, what: str) -> None:
        if count < least:
            raise PeerProtocolError(
                f"round {self.task.round}, attempt {self.task.attempt}: expected at least {least} "
                f"{what}, got {count}; nothing was revealed"
            )
