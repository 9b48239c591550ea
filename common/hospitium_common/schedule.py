"""Which round of the protocol does what, and with which ring: both sides follow from the study.

Round 1 adds up statistics, round r + 1 is training round r, evaluations come after the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hospitium_common.errors import PeerProtocolError
from hospitium_common.secagg.policy import SecAggPolicy

if TYPE_CHECKING:
    from hospitium_common.study import Study

STATISTICS_ROUND = 1
FIRST_TRAINING_ROUND = 2


def protocol_round(training_round: int) -> int:
    """Return the protocol's number of training round 1, 2, …"""
    return training_round + STATISTICS_ROUND


def training_round(round_number: int, study: Study) -> int:
    """Return which training round a protocol round is.

    Raises:
        PeerProtocolError: it is none of this study's.
    """
    number = round_number - STATISTICS_ROUND
    if not 1 <= number <= study.rounds:
        raise PeerProtocolError(
            f"expected training round 1 to {study.rounds}, got round {number}", blame=0
        )
    return number


def secagg_policy(study: Study, tail_len: int, round_number: int) -> SecAggPolicy:
    """Return the policy of one round: the first training round knows no spread, so 24 bits."""
    bits = study.cohort.ring_bits
    if round_number == FIRST_TRAINING_ROUND and bits == 16:
        bits = 24
    return SecAggPolicy(
        study=study.digest,
        ring_bits=bits,
        n_max=study.cohort.maximum_sites,
        m_min=study.cohort.minimum_sites,
        weight_cap=study.cohort.weight_cap,
        tail_len=tail_len,
    )
