"""A site's side of a study: sealed bytes in, sealed bytes out.

The only module that puts work, ledger and mask together. Whatever goes wrong, the answer is one
word; the details stay in the site's own log.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hospitium_client.protection import masking
from hospitium_client.protection.ledger import Kind, Ledger, Spend
from hospitium_client.protection.receipts import Receipt, keep_receipt
from hospitium_client.protection.site_state import SiteState
from hospitium_client.training.accounting import is_within
from hospitium_client.work import Contribution, SiteWork
from hospitium_common.codec import Reader, encode_parts
from hospitium_common.durable import write_durably
from hospitium_common.errors import (
    BudgetExceeded,
    DataRejected,
    HospitiumError,
    LocalProtocolError,
    NotApproved,
    PeerProtocolError,
)
from hospitium_common.messages import (
    ConfirmRequest,
    MaskRequest,
    Message,
    PairOffers,
    PairRequest,
    Purpose,
    Reason,
    Refusal,
    Task,
    UnmaskRequest,
    decode,
)
from hospitium_common.metrics import TailLayout, note_clipped
from hospitium_common.models import build, shared_layout
from hospitium_common.schedule import check_task, rotation_seed, secagg_policy, training_round
from hospitium_common.secagg.fixed_point import quantise, step_sizes
from hospitium_common.secagg.masks import usable_threads
from hospitium_common.secagg.quantiser import Quantiser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hospitium_client.policy import SitePolicy
    from hospitium_common.entropy import Entropy
    from hospitium_common.federation import FederationRoster
    from hospitium_common.privacy import SpendEvent
    from hospitium_common.secagg.keys import SiteKeys
    from hospitium_common.secagg.policy import SecAggPolicy
    from hospitium_common.study import Study

log = logging.getLogger(__name__)

REASONS: tuple[tuple[type[HospitiumError], Reason], ...] = (
    (PeerProtocolError, Reason.PROTOCOL),
    (NotApproved, Reason.NOT_APPROVED),
    (BudgetExceeded, Reason.BUDGET),
    (DataRejected, Reason.DATA),
)


MOST_STATISTICS = 4
"""Rounds of statistics that a study gets: one, and some that the coordinator lost."""


class Session:
    """One site in one study.

    ``home`` is a private directory; it holds the protocol state and the update under way.
    ``federation`` is the roster that the site pinned: a key epoch takes its keys from there.
    ``open_work`` reads the data, and is called only for a study that the policy allows.

    **Guarantees:** state and spend are on disk before the answer that depends on them leaves;
    the same request gets the same answer again; no answer but `Masked` carries anything computed
    from data, and that one is masked.
    """

    def __init__(
        self,
        *,
        index: int,
        keys: SiteKeys,
        federation: FederationRoster,
        study: Study,
        policy: SitePolicy,
        home: Path,
        ledger: Ledger,
        open_work: Callable[[], SiteWork],
        entropy: Entropy,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._index, self._keys, self._federation = index, keys, federation
        self._study, self._policy, self._home = study, policy, home
        self._ledger, self._open_work, self._entropy = ledger, open_work, entropy
        self._work: SiteWork | None = None
        self._kept: _Kept | None = None
        self._tail_words = TailLayout.of(study, shared_layout(study, build(study))).length
        self._state, self._last = self._restore()

    def handle(self, request: bytes) -> bytes:
        """Answer one message; never raises for anything that a peer or the data did."""
        digest = hashlib.sha256(request).digest()
        if self._last is not None and self._last[0] == digest:
            return self._last[1]
        try:
            state, answer = self._answer(decode(request))
            reply = answer.encode()
            self._save(state, digest, reply)
        except HospitiumError as error:
            log.warning("site %d refuses: %s", self._index, error)
            reason = next((r for kind, r in REASONS if isinstance(error, kind)), None)
            blame = error.blame if isinstance(error, PeerProtocolError) else None
            return Refusal(reason=reason or Reason.LOCAL_FAULT, blame=blame).encode()
        except Exception as error:  # the data side may raise anything, and its text may hold data
            log.error("site %d: %s in its own code", self._index, type(error).__name__)
            log.debug("details for this site's administrator", exc_info=True)
            return Refusal(reason=Reason.LOCAL_FAULT, blame=None).encode()
        return reply

    def _answer(self, message: Message) -> tuple[SiteState, Message]:
        if isinstance(message, PairRequest):
            return self._begin_epoch(message)
        state, party = self._state, self._party()
        if isinstance(message, PairOffers):
            return masking.accept_pair_offers(party, state, message)
        if isinstance(message, Task):
            return self._begin(message)
        if isinstance(message, MaskRequest):
            return self._mask(message)
        policy = self._round_policy(state.latest[0])
        if isinstance(message, ConfirmRequest):
            return masking.confirm(party, state, policy, message)
        if isinstance(message, UnmaskRequest):
            return masking.unmask(party, state, policy, message)
        raise PeerProtocolError(f"expected a request, got {type(message).__name__}", blame=0)

    def _begin_epoch(self, request: PairRequest) -> tuple[SiteState, Message]:
        """Take the epoch's sites from the coordinator, and their keys from the pinned roster."""
        federation, fewest = self._federation, max(3, self._study.cohort.minimum_sites)
        for wrong, reason in (
            (
                request.version != federation.version,
                f"expected roster version {federation.version}, got {request.version}",
            ),
            (
                request.epoch <= self._state.epoch,
                f"expected a key epoch after {self._state.epoch}, got {request.epoch}",
            ),
            (
                self._index not in request.sites or len(request.sites) < fewest,
                f"expected at least {fewest} sites, this one among them, got {len(request.sites)}",
            ),
        ):
            if wrong:
                raise PeerProtocolError(f"pairing: {reason}", blame=0)
        roster = federation.for_study(self._study.digest, request.epoch, request.sites)
        if roster.digest != request.roster:
            raise PeerProtocolError("pairing: expected the keys of the pinned roster", blame=0)
        party = masking.Party(index=self._index, keys=self._keys, roster=roster)
        return masking.pair_offers(party, self._state, self._entropy)

    def _party(self) -> masking.Party:
        """Return who this site is in the key epoch under way.

        Raises:
            PeerProtocolError: none is under way, or a site of it was revoked since.
        """
        state = self._state
        if not state.sites:
            raise PeerProtocolError("expected a pair request before anything else", blame=0)
        roster = self._federation.for_study(self._study.digest, state.epoch, state.sites)
        if roster.digest != state.roster_digest:
            raise PeerProtocolError("expected to pair again: the roster has changed", blame=0)
        return masking.Party(index=self._index, keys=self._keys, roster=roster)

    def _begin(self, task: Task) -> tuple[SiteState, Message]:
        """Check everything, do the work, book it, keep the result; then say READY."""
        if task.study != self._study.digest:
            raise NotApproved("expected the study that this session was opened for, got another")
        self._policy.check(self._study)
        check_task(task, self._index, self._study)
        policy = self._round_policy(task.round)
        state, answer = masking.ready(self._party(), self._state, policy, task, self._entropy)
        key = hashlib.sha256(encode_parts(task.round, task.model_digest)).digest()
        kept = self._read_kept()
        if kept is None or kept.key != key:
            contribution = self._contribution(task)
        else:  # a new attempt of the same round: no second training, no second spend
            contribution = kept.contribution
        if task.purpose is Purpose.TRAIN and self._study.noise_is_distributed:
            # At every attempt: the coordinator may send another quantiser with each.
            self._opened_work().check_share(
                training_round(task.round, self._study), task.public,
                step_sizes(task.quantiser, policy),
            )  # fmt: skip
        self._keep(
            _Kept(
                key=key, round=task.round, quantiser=task.quantiser, contribution=contribution,
                previous_result=task.previous_result,
            )
        )  # fmt: skip
        return state, answer

    def _opened_work(self) -> SiteWork:
        if self._work is None:
            self._work = self._open_work()
        return self._work

    def _contribution(self, task: Task) -> Contribution:
        work, layout = self._opened_work(), self._opened_work().layout
        if task.purpose is not Purpose.TRAIN:
            self._check_count(task)
        if task.purpose is Purpose.STATISTICS:
            contribution = work.statistics()
            self._book(task, "statistics", None, 0.0)
            return contribution
        if len(task.model) != 4 * layout.size:
            raise PeerProtocolError(
                f"expected a model of {layout.size} numbers, got {len(task.model) // 4}", blame=0
            )
        parameters = np.frombuffer(task.model, np.float32)
        if task.purpose is Purpose.EVALUATE:
            contribution = work.evaluate(parameters, task.public)
            self._book(task, "evaluation", None, 0.0)
            return contribution
        if task.quantiser.lengths != layout.lengths:
            raise PeerProtocolError("expected a quantiser for this study's model", blame=0)
        if task.quantiser.rotation not in (b"", rotation_seed(self._study, task.round)):
            raise PeerProtocolError("expected the rotation of this study and round", blame=0)
        number = training_round(task.round, self._study)
        if self._study.is_private:
            event, delta = work.plan(task.public).event, work.delta(task.public)
            # Booked before training: whatever happens from here on, it counts as spent.
            self._book(task, "training", event, delta)
        else:
            self._book(task, "training", None, 0.0)
        entropy = self._entropy
        return work.train(
            number, parameters, task.public, lambda label: entropy(f"{label}/{task.round}")
        )

    def _check_count(self, task: Task) -> None:
        """Figures leave without noise, so a study gets them a few times only.

        Raises:
            BudgetExceeded: it had its share.
            NotApproved: it wants an evaluation before this site has trained for it.
        """
        spends = [one for one in self._ledger.spends() if one.study == self._study.digest]
        kind = "statistics" if task.purpose is Purpose.STATISTICS else "evaluation"
        before = {one.round for one in spends if one.kind == kind} - {task.round}
        most = MOST_STATISTICS if kind == "statistics" else self._policy.most_evaluations
        if len(before) >= most:
            raise BudgetExceeded(f"expected at most {most} rounds of {kind}, got one more")
        if kind == "evaluation" and all(one.kind != "training" for one in spends):
            raise NotApproved("expected an evaluation after this site has trained, got one before")

    def _book(self, task: Task, kind: Kind, event: SpendEvent | None, delta: float) -> None:
        limit = self._study.privacy.epsilon

        def covers(events: Sequence[SpendEvent]) -> bool:
            return limit is not None and is_within(events, delta, limit)

        self._ledger.book(
            Spend(study=self._study.digest, round=task.round, kind=kind, event=event), covers
        )

    def _mask(self, request: MaskRequest) -> tuple[SiteState, Message]:
        number = self._state.latest[0]
        kept = self._read_kept()
        if kept is None or kept.round != number:
            raise LocalProtocolError(f"round {number}: expected a result to mask, found none")
        policy = self._round_policy(number)
        # The dither belongs to the round, not to the attempt: a new attempt masks the same words.
        dither = self._entropy(f"quantiser/dither/{number}")
        words, clipped = quantise(
            kept.contribution.vector, kept.quantiser, policy, dither,
            wraps=self._study.noise_is_distributed, threads=usable_threads(),
        )  # fmt: skip
        tail = kept.contribution.tail
        if clipped:
            tail = note_clipped(tail, clipped)
        party = self._party()
        state, answer = masking.mask(
            party, self._state, policy, request, words, tail, threads=usable_threads()
        )
        receipt = Receipt(
            site=self._index, round=number, attempt=self._state.latest[1],
            roster=party.roster.digest, context=answer.context, digest=answer.digest,
            previous_result=kept.previous_result,
        )  # fmt: skip
        keep_receipt(self._home / "receipts", receipt)
        return state, answer

    def _round_policy(self, round_number: int) -> SecAggPolicy:
        return secagg_policy(self._study, self._tail_words, round_number)

    def _restore(self) -> tuple[SiteState, tuple[bytes, bytes] | None]:
        """Read what was on disk when the site last answered."""
        if not self._exchange.exists():
            return SiteState(), None
        reader = Reader(self._exchange.read_bytes())
        state, digest, reply = SiteState.decode(reader.bytes()), reader.bytes(32), reader.bytes()
        reader.finish()
        return state, (digest, reply)

    def _save(self, state: SiteState, digest: bytes, reply: bytes) -> None:
        write_durably(self._exchange, encode_parts(state.encode(), digest, reply))
        self._state, self._last = state, (digest, reply)

    def _read_kept(self) -> _Kept | None:
        if self._kept is None and self._kept_file.exists():
            self._kept = _Kept.decode(self._kept_file.read_bytes())
        return self._kept

    def _keep(self, kept: _Kept) -> None:
        write_durably(self._kept_file, kept.encode())
        self._kept = kept

    @property
    def _exchange(self) -> Path:
        return self._home / "exchange.bin"

    @property
    def _kept_file(self) -> Path:
        return self._home / "contribution.bin"


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """The result of a round's work, on disk until the next round: a new attempt masks it again."""

    key: bytes
    round: int
    quantiser: Quantiser
    contribution: Contribution
    previous_result: bytes

    def encode(self) -> bytes:
        vector, tail = self.contribution.vector, self.contribution.tail
        return encode_parts(
            self.key, self.round, self.quantiser.encode(), vector.tobytes(), tail.tobytes(),
            self.previous_result,
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> _Kept:
        reader = Reader(data)
        key, number = reader.bytes(32), reader.integer()
        quantiser = Quantiser.decode(reader.bytes())
        vector = np.frombuffer(reader.bytes(), np.float32)
        tail = np.frombuffer(reader.bytes(), np.uint64)
        previous = reader.bytes(64)
        reader.finish()
        return cls(
            key=key, round=number, quantiser=quantiser, previous_result=previous,
            contribution=Contribution(vector=vector, tail=tail),
        )  # fmt: skip
