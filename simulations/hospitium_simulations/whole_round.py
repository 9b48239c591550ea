"""The whole of HSA-1 for n parties in memory: the executable specification.

Read `run_round` from top to bottom and you have read the protocol. Every message passes through its
bytes, exactly as on a network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.protection.masking import (
    Party,
    accept_pair_offers,
    confirm,
    mask,
    pair_offers,
    ready,
    unmask,
)
from hospitium_client.protection.site_state import SiteState
from hospitium_common.entropy import Entropy, system_entropy
from hospitium_common.messages import (
    Ack,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Message,
    PairOffer,
    PairOffers,
    Purpose,
    Ready,
    Shares,
    Task,
    UnmaskRequest,
    decode,
)
from hospitium_common.roster import Roster
from hospitium_common.secagg.fixed_point import quantise
from hospitium_common.secagg.keys import SiteKeys
from hospitium_server.unmasking import RoundSum, Unmasking, signed_task

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from hospitium_common.secagg.policy import SecAggPolicy
    from hospitium_common.secagg.quantiser import Quantiser

M = TypeVar("M", bound=Message)


def over_the_wire(message: M, kind: type[M]) -> M:
    """Encode and decode, as a network would."""
    arrived = decode(message.encode())
    assert isinstance(arrived, kind)  # noqa: S101 - the kind byte that was just written
    return arrived


@dataclass(kw_only=True)
class Federation:
    """Enrolled and paired sites, and the coordinator's key."""

    roster: Roster
    coordinator: Ed25519PrivateKey
    parties: dict[int, Party]
    states: dict[int, SiteState]
    entropy: Entropy = system_entropy


@dataclass(kw_only=True)
class Silence:
    """Sites that fall silent, by the message that they fail to send."""

    ready: Collection[int] = ()
    masked: Collection[int] = ()
    ack: Collection[int] = ()
    shares: Collection[int] = ()


@dataclass(kw_only=True)
class FinishedRound:
    """What came out, and what an auditor would keep."""

    total: RoundSum
    masked: dict[int, Masked] = field(default_factory=dict)
    clipped: dict[int, int] = field(default_factory=dict)


def enrol(
    study: bytes, indices: Sequence[int], epoch: int = 1, entropy: Entropy = system_entropy
) -> Federation:
    """Make keys and a roster signed by a governance key, and pair every two sites."""
    governance, coordinator = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys = {index: SiteKeys.generate() for index in indices}
    roster = Roster(
        study=study,
        epoch=epoch,
        coordinator=coordinator.public_key().public_bytes_raw(),
        sites={index: keys[index].public() for index in indices},
    ).signed_by(governance)
    roster.check([governance.public_key().public_bytes_raw()])
    parties = {i: Party(index=i, keys=keys[i], roster=roster) for i in indices}
    federation = Federation(
        roster=roster, coordinator=coordinator, parties=parties,
        states={i: SiteState() for i in indices}, entropy=entropy,
    )  # fmt: skip
    pair(federation)
    return federation


def pair(federation: Federation) -> None:
    """Exchange the pair offers of a key epoch, relayed by the coordinator."""
    states = federation.states
    given: list[PairOffer] = []
    for index, party in federation.parties.items():
        states[index], offers = pair_offers(party, states[index], federation.entropy)
        given += over_the_wire(offers, PairOffers).offers
    for index, party in federation.parties.items():
        mine = PairOffers(offers=tuple(offer for offer in given if offer.receiver == index))
        states[index], _ = accept_pair_offers(party, states[index], over_the_wire(mine, PairOffers))


def run_round(
    federation: Federation,
    policy: SecAggPolicy,
    quantiser: Quantiser,
    updates: Mapping[int, NDArray[np.float32]],
    tails: Mapping[int, NDArray[np.uint64]],
    *,
    round_number: int,
    attempt: int = 1,
    previous_result: bytes = bytes(64),
    silence: Silence | None = None,
    keep_masked: bool = True,
) -> FinishedRound:
    """Run the four exchanges of one round and return the sum over the survivors.

    Raises:
        PeerProtocolError: too few sites are left; nothing was revealed.
    """
    silent, states, parties = silence or Silence(), federation.states, federation.parties
    task = signed_task(
        federation.coordinator, federation.roster, policy, purpose=Purpose.TRAIN,
        round_number=round_number, attempt=attempt, invited=sorted(updates),
        previous_result=previous_result, quantiser=quantiser, model=b"", public=b"",
    )  # fmt: skip
    coordinator = Unmasking(roster=federation.roster, policy=policy, task=task)

    # A: the task goes out; commitments and sealed shares come back.
    for i in task.invited:
        arrived = over_the_wire(task, Task)
        states[i], answer = ready(parties[i], states[i], policy, arrived, federation.entropy)
        if i not in silent.ready:
            coordinator.on_ready(over_the_wire(answer, Ready))

    # B: the cohort is fixed only now; each member masks its update for exactly this cohort.
    result: dict[int, Masked] = {}
    clipped: dict[int, int] = {}
    for i, request in coordinator.close_cohort().items():
        dither = federation.entropy(f"dither/{round_number}/{i}")
        words, clipped[i] = quantise(updates[i], quantiser, policy, dither)
        states[i], masked = mask(
            parties[i], states[i], policy, over_the_wire(request, MaskRequest), words, tails[i]
        )
        if i not in silent.masked:
            coordinator.on_masked(over_the_wire(masked, Masked))
            if keep_masked:  # an auditor does; a coordinator keeps nothing but the sum
                result[i] = masked

    # C: everyone signs the same survivors.
    confirmation = over_the_wire(coordinator.close_survivors(), ConfirmRequest)
    for i in sorted(confirmation.digests):
        if i not in silent.ack:
            states[i], ack = confirm(parties[i], states[i], policy, confirmation)
            coordinator.on_ack(over_the_wire(ack, Ack))

    # D: with enough confirmations shown, each site gives one share per member of the cohort.
    unmasking = over_the_wire(coordinator.unmask_request(), UnmaskRequest)
    for i in sorted(unmasking.acks):
        if i not in silent.shares:
            states[i], shares = unmask(parties[i], states[i], policy, unmasking)
            coordinator.on_shares(over_the_wire(shares, Shares))
    return FinishedRound(total=coordinator.finish(), masked=result, clipped=clipped)
