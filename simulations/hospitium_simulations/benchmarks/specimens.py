"""One valid specimen of every message and file, how to read it, and what to do with it then."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hospitium_client.protection import masking
from hospitium_client.protection.receipts import Receipt
from hospitium_client.protection.site_state import SiteState
from hospitium_common.codec import Reader, encode_parts
from hospitium_common.messages import (
    Ack,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Message,
    Paired,
    PairOffer,
    PairOffers,
    PairRequest,
    Purpose,
    Ready,
    Reason,
    Refusal,
    Shares,
    Task,
    UnmaskRequest,
    decode,
)
from hospitium_common.normalisation import Normalisation, ranges
from hospitium_common.roster import Roster
from hospitium_common.secagg.context import round_context
from hospitium_common.secagg.hashing import Label, payload_digest, sign
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_common.study import load_study
from hospitium_common.transcript import (
    Transcript,
    audit,
    check_inclusion,
    signature_faults,
)
from hospitium_server.unmasking import Unmasking, signed_task
from hospitium_simulations.whole_round import enrol

if TYPE_CHECKING:
    from collections.abc import Callable

STUDY = bytes(range(32))
POLICY = SecAggPolicy(study=STUDY, ring_bits=16, n_max=4, m_min=3, weight_cap=9, tail_len=2)
QUANTISER = Quantiser(lengths=(5, 2), bounds=(1.0, 0.5))
ROTATED = Quantiser(lengths=(5, 2), bounds=(1.0, 0.5), rotation=STUDY, mixed=(True, False))
SCENARIO = Path(__file__).parents[1] / "scenarios" / "stays.toml"
SITES = (1, 2, 3, 4)


def _encodes_to(value: Any, data: bytes) -> bool:
    return bool(value.encode() == data)


def _leave(_: object) -> None:
    """Nothing stands behind this decoder."""


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """Valid bytes, their decoder, whether a value is those bytes, and the code behind it."""

    name: str
    data: bytes
    read: Callable[[bytes], Any]
    use: Callable[[Any], None] = _leave
    is_same: Callable[[Any, bytes], bool] = _encodes_to


class _Round:
    """A round of four sites, with the states of both sides before every message."""

    def __init__(self) -> None:
        self.federation = enrol(STUDY, SITES)
        self.unpaired = {i: SiteState() for i in SITES}
        self.offers = self._offers()
        self.states = dict(self.federation.states)
        self.task = signed_task(
            self.federation.coordinator, self.federation.roster, POLICY, purpose=Purpose.TRAIN,
            round_number=1, attempt=1, invited=SITES, previous_result=bytes(64),
            quantiser=QUANTISER, model=b"model", public=b"public",
        )  # fmt: skip
        self.at: dict[str, tuple[Unmasking, dict[int, SiteState]]] = {}
        self.sent: dict[str, dict[int, Any]] = {}
        run = Unmasking(roster=self.federation.roster, policy=POLICY, task=self.task)
        self._keep("ready", run)
        self._step("ready", dict.fromkeys(SITES, self.task), run.on_ready)
        self.mask_requests = run.close_cohort()
        self._keep("mask", run)
        self._step("mask", self.mask_requests, run.on_masked)
        self.confirmation = run.close_survivors()
        self._keep("confirm", run)
        self._step("confirm", dict.fromkeys(SITES, self.confirmation), run.on_ack)
        self.unmasking = run.unmask_request()
        self._keep("unmask", run)
        self._step("unmask", dict.fromkeys(SITES, self.unmasking), run.on_shares)
        self.transcript = run.finish().transcript

    def _offers(self) -> PairOffers:
        made: list[PairOffer] = []
        for site in SITES:
            party = self.federation.parties[site]
            self.unpaired[site], offers = masking.pair_offers(
                party, SiteState(), self.federation.entropy
            )
            made += offers.offers
        return PairOffers(offers=tuple(one for one in made if one.receiver == 3))

    def _keep(self, stage: str, run: Unmasking) -> None:
        self.at[stage] = _copied(run), dict(self.states)

    def _step(self, stage: str, requests: dict[int, Any], take: Callable[[Any], None]) -> None:
        self.sent[stage] = {}
        for site, request in requests.items():
            self.states[site], answer = self.answer(stage, site, request)
            self.sent[stage][site] = answer
            take(answer)

    def answer(self, stage: str, site: int, request: Any) -> tuple[SiteState, Message]:
        """Let a site take one step from the state that it had at this stage."""
        party, state = self.federation.parties[site], self.at[stage][1][site]
        match stage:
            case "ready":
                return masking.ready(party, state, POLICY, request, self.federation.entropy)
            case "mask":
                words, tail = np.zeros(QUANTISER.size, np.uint16), np.zeros(2, np.uint64)
                return masking.mask(party, state, POLICY, request, words, tail)
            case "confirm":
                return masking.confirm(party, state, POLICY, request)
            case _:
                return masking.unmask(party, state, POLICY, request)

    # What a malicious party does with bytes that decode: sign them, and hand them over.

    def use_offers(self, given: PairOffers) -> None:
        party, roster = self.federation.parties[3], self.federation.roster
        masking.accept_pair_offers(party, self.unpaired[3], PairOffers(offers=tuple(
            replace(one, signature=sign(
                self.federation.parties[one.sender].keys.sign, Label.PAIR_SIGNATURE,
                roster.digest, one.sender, one.receiver, one.sealed,
            )) if one.sender in SITES else one
            for one in given.offers
        )))  # fmt: skip

    def use_task(self, given: Task) -> None:
        context = round_context(given, self.federation.roster, POLICY)
        signature = sign(self.federation.coordinator, Label.TASK, context)
        if given.round < 1 << 10:  # the ratchet of a far jump takes seconds, and is tested
            self.answer("ready", 1, replace(given, signature=signature))

    def use_ready(self, given: Ready) -> None:
        tables = given.seed_commitments, given.share_commitments, given.sealed_shares
        head = replace(given.head, body_digest=Ready.body_digest(given.table, *tables))
        key = self.federation.parties[2].keys.sign
        signed = replace(given, head=head, signature=sign(key, Label.READY, *head.parts()))
        run = _copied(self.at["ready"][0])
        run.on_ready(signed)
        for site in (1, 3, 4):
            run.on_ready(self.sent["ready"][site])
        requests = run.close_cohort()
        _, states = self.at["mask"]
        for site in set(requests) - {2}:
            party, words = self.federation.parties[site], np.zeros(QUANTISER.size, np.uint16)
            masking.mask(party, states[site], POLICY, requests[site], words, np.zeros(2, np.uint64))

    def use_masked(self, given: Masked) -> None:
        digest = payload_digest(Label.PAYLOAD, given.body, given.tail)
        key = self.federation.parties[2].keys.sign
        signature = sign(key, Label.MASKED, given.context, given.cohort, given.site, digest)
        run = _copied(self.at["mask"][0])
        run.on_masked(replace(given, digest=digest, signature=signature))

    def use_ack(self, given: Ack) -> None:
        _copied(self.at["confirm"][0]).on_ack(given)

    def use_shares(self, given: Shares) -> None:
        run = _copied(self.at["unmask"][0])
        run.on_shares(given)
        for site in set(SITES) - {given.site}:
            run.on_shares(self.sent["unmask"][site])
        run.finish()

    def use_transcript(self, given: Transcript) -> None:
        roster, masked = self.federation.roster, self.sent["mask"]
        for _ in signature_faults(given, roster, POLICY):  # an audit lists them all
            pass
        check_inclusion(given, roster, POLICY, 1, masked[1].digest)
        audit(given, roster, POLICY, masked.values())


RECEIPT = Receipt(
    site=2, round=32, attempt=1, roster=bytes(32), context=bytes(32), digest=bytes(64),
    previous_result=bytes(64),
)  # fmt: skip


def _copied(run: Unmasking) -> Unmasking:
    other = copy.copy(run)
    for name, value in vars(run).items():
        if isinstance(value, dict | np.ndarray):
            setattr(other, name, copy.copy(value))
    return other


def _message(message: Message, use: Callable[[Any], None] = _leave) -> Specimen:
    return Specimen(name=type(message).__name__, data=message.encode(), read=decode, use=use)


def _parts_of(data: bytes) -> list[bytes]:
    reader, parts = Reader(data), []
    while not reader.at_end:
        parts.append(reader.bytes())
    return parts


def specimens() -> list[Specimen]:
    """Return every message and file with a decoder."""
    made = _Round()
    study = load_study(SCENARIO)
    features = len(ranges(study))
    normalisation = Normalisation(
        means=np.arange(features, dtype=np.float64), deviations=np.ones(features)
    )

    def only(kind: type[Message], use: Callable[[Any], None]) -> Callable[[Message], None]:
        return lambda message: use(message) if isinstance(message, kind) else None

    def to_site(stage: str, kind: type[Message]) -> Callable[[Message], None]:
        return only(kind, lambda message: made.answer(stage, 1, message) and None)

    return [
        _message(PairRequest(version=1, epoch=1, sites=(1, 2, 3), roster=bytes(32))),
        _message(made.offers, only(PairOffers, made.use_offers)),
        _message(Paired(roster=bytes(32))),
        _message(made.task, only(Task, made.use_task)),
        _message(made.sent["ready"][2], only(Ready, made.use_ready)),
        _message(made.mask_requests[1], to_site("mask", MaskRequest)),
        _message(made.sent["mask"][2], only(Masked, made.use_masked)),
        _message(made.confirmation, to_site("confirm", ConfirmRequest)),
        _message(made.sent["confirm"][2], only(Ack, made.use_ack)),
        _message(made.unmasking, to_site("unmask", UnmaskRequest)),
        _message(made.sent["unmask"][2], only(Shares, made.use_shares)),
        _message(Refusal(reason=Reason.BUDGET, blame=2)),
        Specimen(
            name="Transcript", data=made.transcript.encode(), read=Transcript.decode,
            use=made.use_transcript,
        ),
        Specimen(name="Roster", data=made.federation.roster.encode(), read=Roster.decode),
        Specimen(name="Receipt", data=RECEIPT.encode(), read=Receipt.decode),
        Specimen(
            name="SiteState", data=made.at["mask"][1][1].encode(), read=SiteState.decode,
            is_same=lambda state, _: SiteState.decode(state.encode()) == state,
        ),
        Specimen(
            name="SiteKeys", data=made.federation.parties[1].keys.encode(), read=SiteKeys.decode
        ),
        Specimen(name="Quantiser", data=QUANTISER.encode(), read=Quantiser.decode),
        Specimen(name="Quantiser, rotated", data=ROTATED.encode(), read=Quantiser.decode),
        Specimen(
            name="Normalisation", data=normalisation.encode(),
            read=lambda data: Normalisation.decode(data, study),
        ),
        Specimen(
            name="Reader", data=encode_parts(b"", 7, b"abc", bytes(40)), read=_parts_of,
            is_same=lambda parts, data: encode_parts(*parts) == data,
        ),
    ]  # fmt: skip
