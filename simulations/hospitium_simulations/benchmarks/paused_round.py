"""A round of secure aggregation, stopped at the step that is to be measured.

The steps are those of sites and coordinator. To get there quickly pair roots are drawn instead of
exchanged, and only the sites whose messages are needed say anything.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.protection import masking
from hospitium_client.protection.masking import Party
from hospitium_client.protection.site_state import SiteState
from hospitium_common.entropy import system_entropy
from hospitium_common.messages import (
    ConfirmRequest,
    Masked,
    MaskRequest,
    Purpose,
    Task,
    UnmaskRequest,
    decode,
)
from hospitium_common.roster import Roster
from hospitium_common.secagg.context import cohort_digest
from hospitium_common.secagg.fixed_point import quantise
from hospitium_common.secagg.hashing import Label, payload_digest, sign, tagged_hash
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_server.unmasking import Unmasking, signed_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

STUDY = bytes(range(32))
TAIL = 64


class PausedRound:
    """``sites`` sites that agreed on a cohort for vectors ``[size]`` in a ring of 16 bits."""

    def __init__(self, *, sites: int, size: int) -> None:
        self.sites = range(1, sites + 1)
        coordinator = Ed25519PrivateKey.generate()
        keys = {i: SiteKeys.generate() for i in self.sites}
        roster = Roster(
            study=STUDY, epoch=1, coordinator=coordinator.public_key().public_bytes_raw(),
            sites={i: keys[i].public() for i in self.sites},
        )  # fmt: skip
        self.policy = SecAggPolicy(
            study=STUDY, ring_bits=16, n_max=200, m_min=3, weight_cap=1000, tail_len=TAIL
        )
        self.quantiser = Quantiser(lengths=(size,), bounds=(1.0,))
        self.parties = {i: Party(index=i, keys=keys[i], roster=roster) for i in self.sites}
        self.fresh = {
            i: SiteState(roster_digest=roster.digest, roots={
                j: tagged_hash(b"drawn", min(i, j), max(i, j)) for j in self.sites if j != i
            })
            for i in self.sites
        }  # fmt: skip
        self.task = signed_task(
            coordinator, roster, self.policy, purpose=Purpose.TRAIN, round_number=1, attempt=1,
            invited=self.sites, previous_result=bytes(64), quantiser=self.quantiser, model=b"",
            public=b"",
        )  # fmt: skip
        self.run = Unmasking(roster=roster, policy=self.policy, task=self.task)
        self.states: dict[int, SiteState] = {}
        self.confirmed: dict[int, SiteState] = {}
        for i in self.sites:
            self.states[i], answer = masking.ready(
                self.parties[i], self.fresh[i], self.policy, self.task, system_entropy
            )
            self.run.on_ready(answer)
        self.requests = self.run.close_cohort()

    def masked_upload(
        self, update: NDArray[np.float32], threads: int = 1, *, rotated: bool = False
    ) -> bytes:
        """Site 1's whole step: encode, check the cohort, mask, digest, sign, and to bytes."""
        quantiser = self.quantiser
        if rotated:
            quantiser = replace(quantiser, rotation=STUDY, mixed=(True,))
        dither = system_entropy("dither")
        words, _ = quantise(update, quantiser, self.policy, dither, threads=threads)
        _, answer = masking.mask(
            self.parties[1], self.states[1], self.policy, self.requests[1], words,
            np.zeros(TAIL, np.uint64), threads=threads,
        )  # fmt: skip
        return answer.encode()

    def small_messages(self, repeats: int) -> tuple[float, int]:
        """Return site 1's fastest processor time for a round, and its bytes up.

        The masked vector and tail do not count among the bytes.
        """
        confirmation, unmasking = self._to_unmask_request(self.sites)
        party, policy = self.parties[1], self.policy
        told = [m.encode() for m in (self.task, self.requests[1], confirmation, unmasking)]
        best, sent = float("inf"), 0
        for _ in range(repeats):
            start = time.process_time()
            task, request, survivors, confirmed = (decode(data) for data in told)
            assert isinstance(task, Task)  # noqa: S101 - what was encoded above
            assert isinstance(request, MaskRequest)  # noqa: S101 - what was encoded above
            assert isinstance(survivors, ConfirmRequest)  # noqa: S101 - what was encoded above
            assert isinstance(confirmed, UnmaskRequest)  # noqa: S101 - what was encoded above
            _, ready = masking.ready(party, self.fresh[1], policy, task, system_entropy)
            state, masked = self._mask(1, request)
            state, ack = masking.confirm(party, state, policy, survivors)
            _, shares = masking.unmask(party, state, policy, confirmed)
            sent = sum(len(message.encode()) for message in (ready, masked, ack, shares))
            best = min(best, time.process_time() - start)
        return best, sent - self.quantiser.size * 2 - 8 * TAIL

    def unmasking(self, dropped: int) -> Callable[[], object]:
        """Return the coordinator's work on the shares, the last ``dropped`` sites being gone."""
        survivors = self.sites[: len(self.sites) - dropped]
        _, request = self._to_unmask_request(survivors)
        answers = [
            masking.unmask(self.parties[i], self.confirmed[i], self.policy, request)[1]
            for i in survivors
        ]

        def step() -> object:
            run = _copied(self.run)
            for answer in answers:
                run.on_shares(answer)
            return run.finish()

        return step

    def arriving_vectors(self) -> Callable[[], None]:
        """Return the arrival of every site's masked vector, one after the other."""
        body, tail = bytes(2 * self.quantiser.size), bytes(8 * TAIL)
        digest = payload_digest(Label.PAYLOAD, body, tail)
        context = self.task_context

        def message_of(site: int) -> bytes:
            key, cohort = self.parties[site].keys.sign, self.cohort_digest
            return Masked(
                context=context, cohort=cohort, site=site, digest=digest, body=body, tail=tail,
                signature=sign(key, Label.MASKED, context, cohort, site, digest),
            ).encode()  # fmt: skip

        def arrive() -> None:
            for site in self.sites:
                message = decode(message_of(site))
                assert isinstance(message, Masked)  # noqa: S101 - what was encoded above
                self.run.on_masked(message)

        return arrive

    @property
    def task_context(self) -> bytes:
        """The context of this round."""
        return self.requests[1].heads[0].context

    @property
    def cohort_digest(self) -> bytes:
        """The digest of this round's cohort."""
        return cohort_digest(self.task_context, self.requests[1].heads)

    def _mask(self, site: int, request: MaskRequest) -> tuple[SiteState, Masked]:
        words, tail = np.zeros(self.quantiser.size, np.uint16), np.zeros(TAIL, np.uint64)
        return masking.mask(
            self.parties[site], self.states[site], self.policy, request, words, tail
        )

    def _to_unmask_request(self, survivors: Sequence[int]) -> tuple[ConfirmRequest, UnmaskRequest]:
        masked: dict[int, SiteState] = {}
        for i in survivors:
            masked[i], answer = self._mask(i, self.requests[i])
            self.run.on_masked(answer)
        confirmation = self.run.close_survivors()
        for i in survivors:
            self.confirmed[i], ack = masking.confirm(
                self.parties[i], masked[i], self.policy, confirmation
            )
            self.run.on_ack(ack)
        return confirmation, self.run.unmask_request()


def _copied(run: Unmasking) -> Unmasking:
    other = copy.copy(run)
    for name, value in vars(run).items():
        if isinstance(value, dict | np.ndarray):
            setattr(other, name, copy.copy(value))
    return other
