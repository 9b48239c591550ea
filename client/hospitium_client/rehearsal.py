"""A dry run: one round with invented neighbours, all in memory, and one step of training.

What a real round would do here is done: data, session, protocol, ledger, model. But keys, ledger
and neighbours are made up for it and forgotten, and nothing is sent or booked.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.protection import masking
from hospitium_client.protection.ledger import Ledger
from hospitium_client.protection.site_state import SiteState
from hospitium_client.session import Session
from hospitium_client.training.device import PROCESSOR
from hospitium_client.work import SiteWork
from hospitium_common.entropy import system_entropy
from hospitium_common.errors import HospitiumError
from hospitium_common.federation import FederationRoster, Member
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
    Refusal,
    Shares,
    Task,
    UnmaskRequest,
    decode,
)
from hospitium_common.models import build, tensors_of
from hospitium_common.normalisation import Normalisation
from hospitium_common.schedule import STATISTICS_STAGE, protocol_round, secagg_policy
from hospitium_common.secagg.context import model_digest, round_context
from hospitium_common.secagg.fixed_point import dtype_of
from hospitium_common.secagg.hashing import Label, sign
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.secagg.quantiser import Quantiser

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from hospitium_client.data.records import Records
    from hospitium_client.policy import SitePolicy
    from hospitium_common.roster import Roster
    from hospitium_common.secagg.fixed_point import Words
    from hospitium_common.secagg.policy import SecAggPolicy
    from hospitium_common.study import Study

OWN = 1
M = TypeVar("M", bound=Message)


class _OneStep(Exception):  # noqa: N818 - not an error: enough was seen
    """Raised after the first step of training."""


def rehearse(
    study: Study,
    records: Records,
    policy: SitePolicy,
    folder: Path,
    device: torch.device = PROCESSOR,
) -> None:
    """Run one round and one step of training in an empty ``folder``, on the site's device.

    Raises:
        HospitiumError: what a real round would stumble over.
    """

    def one_step() -> None:
        raise _OneStep

    work = SiteWork(study, records, folder, smallest_count=policy.smallest_count, on_step=one_step)
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        _Rehearsal.of(study, work, policy, ledger).run()
    finally:
        ledger.close()
    statistics = work.tail_layout.statistics(work.statistics().tail)
    public = Normalisation.from_totals(statistics.features, study).encode()
    tensors = tensors_of(build(study))
    parameters = work.layout.flatten({name: tensors[name] for name in work.layout.names})
    try:
        work.train(1, parameters, public, system_entropy)
    except _OneStep:
        return
    raise HospitiumError("expected at least one step of training, got none: too few records?")


@dataclass(frozen=True, kw_only=True)
class _Rehearsal:
    """This site as a real session, all others as bare parties of the protocol."""

    session: Session
    request: PairRequest
    coordinator: Ed25519PrivateKey
    roster: Roster
    policy: SecAggPolicy
    others: dict[int, masking.Party]
    states: dict[int, SiteState]

    @classmethod
    def of(cls, study: Study, work: SiteWork, policy: SitePolicy, ledger: Ledger) -> _Rehearsal:
        """Invent a federation of the smallest size that the study allows."""
        sites = tuple(range(OWN, max(3, study.cohort.minimum_sites) + OWN))
        keys = {site: SiteKeys.generate() for site in sites}
        coordinator = Ed25519PrivateKey.generate()
        federation = FederationRoster(
            name="rehearsal", version=1, members=tuple(
                Member(index=site, name=f"site-{site}", title="invented", keys=key.public(),
                       node_key=f"site {site}".encode(), expires=2**62)
                for site, key in keys.items()
            ),
            coordinator=coordinator.public_key().public_bytes_raw(),
            governance=Ed25519PrivateKey.generate().public_key().public_bytes_raw(),
        )  # fmt: skip
        roster = federation.for_study(study.digest, 1, sites)
        session = Session(
            index=OWN, keys=keys[OWN], federation=federation, study=study, home=work.home,
            policy=policy.model_copy(update={"approved": frozenset((study.digest.hex(),))}),
            ledger=ledger, open_work=lambda: work, entropy=system_entropy,
        )  # fmt: skip
        others = {
            site: masking.Party(index=site, keys=keys[site], roster=roster) for site in sites[1:]
        }
        return cls(
            session=session, coordinator=coordinator, roster=roster, others=others,
            request=PairRequest(version=1, epoch=1, sites=sites, roster=roster.digest),
            policy=secagg_policy(study, work.tail_layout.length, protocol_round(STATISTICS_STAGE)),
            states=dict.fromkeys(others, SiteState()),
        )  # fmt: skip

    def run(self) -> None:
        """Pair, then go through the four exchanges of a round of statistics."""
        self._pair()
        answers = self._begin()
        masked = self._mask(answers)
        confirmation = ConfirmRequest(
            digests={site: one.digest for site, one in masked.items()},
            signatures={site: one.signature for site, one in masked.items()},
        )
        acks = {OWN: self._ask(confirmation, Ack)}
        for site, party in self.others.items():
            self.states[site], acks[site] = masking.confirm(
                party, self.states[site], self.policy, confirmation
            )
        self._ask(UnmaskRequest(acks={s: ack.signature for s, ack in acks.items()}), Shares)

    def _pair(self) -> None:
        given: list[PairOffer] = [*self._ask(self.request, PairOffers).offers]
        for site, party in self.others.items():
            self.states[site], offers = masking.pair_offers(
                party, self.states[site], system_entropy
            )
            given += offers.offers
        self._ask(_offers_to(OWN, given), Paired)
        for site, party in self.others.items():
            self.states[site], _ = masking.accept_pair_offers(
                party, self.states[site], _offers_to(site, given)
            )

    def _begin(self) -> dict[int, Ready]:
        task = Task(
            study=self.policy.study, purpose=Purpose.STATISTICS, attempt=1,
            round=protocol_round(STATISTICS_STAGE), invited=tuple(self.roster.sites),
            model_digest=model_digest(Purpose.STATISTICS, b"", b""), previous_result=bytes(64),
            quantiser=Quantiser(lengths=(), bounds=()), signature=bytes(64), model=b"", public=b"",
        )  # fmt: skip
        context = round_context(task, self.roster, self.policy)
        task = replace(task, signature=sign(self.coordinator, Label.TASK, context))
        answers = {OWN: self._ask(task, Ready)}
        for site, party in self.others.items():
            self.states[site], answers[site] = masking.ready(
                party, self.states[site], self.policy, task, system_entropy
            )
        return answers

    def _mask(self, answers: dict[int, Ready]) -> dict[int, Masked]:
        requests = {
            site: MaskRequest(
                heads=tuple(answers[one].head for one in sorted(answers)),
                signatures={one: answer.signature for one, answer in answers.items()},
                sealed_shares={
                    one: answer.sealed_shares[site]
                    for one, answer in answers.items() if one != site
                },
                seed_commitments={
                    one: answer.seed_commitments[site]
                    for one, answer in answers.items() if one != site
                },
            )
            for site in answers
        }  # fmt: skip
        masked = {OWN: self._ask(requests[OWN], Masked)}
        words = cast("Words", np.zeros(0, dtype_of(self.policy.ring_bits)))
        for site, party in self.others.items():
            self.states[site], masked[site] = masking.mask(
                party, self.states[site], self.policy, requests[site], words.copy(),
                np.zeros(self.policy.tail_len, np.uint64),
            )  # fmt: skip
        return masked

    def _ask(self, message: Message, kind: type[M]) -> M:
        with _Notes() as notes:
            answer = decode(self.session.handle(message.encode()))
        if isinstance(answer, kind):
            return answer
        word = answer.reason.name if isinstance(answer, Refusal) else type(answer).__name__
        raise HospitiumError(notes.text or f"{type(message).__name__}: got {word}")


def _offers_to(site: int, given: list[PairOffer]) -> PairOffers:
    return PairOffers(offers=tuple(offer for offer in given if offer.receiver == site))


class _Notes(logging.Handler):
    """Keeps what the session says in its log while it answers: its answer is one word."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        self._logger = logging.getLogger("hospitium_client.session")

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()

    def __enter__(self) -> _Notes:
        self._before = self._logger.propagate
        self._logger.propagate = False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._before
