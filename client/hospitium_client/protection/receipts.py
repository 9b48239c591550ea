"""What a site keeps to check afterwards that its update was counted: one receipt per attempt.

A receipt is on disk before the masked vector that it is about leaves. It holds digests only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.secagg.context import round_context
from hospitium_common.transcript import (
    Transcript,
    announced,
    check_inclusion,
    signature_faults,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hospitium_common.roster import Roster
    from hospitium_common.secagg.policy import SecAggPolicy


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What this site handed in: the ``digest`` of its masked vector, and in which round.

    ``context`` binds study, roster, model, invited sites and all the rest; ``previous_result`` is
    what the coordinator's task named as the result of the round before.
    """

    site: int
    round: int
    attempt: int
    roster: bytes
    context: bytes
    digest: bytes
    previous_result: bytes

    def encode(self) -> bytes:
        """Return the receipt as bytes."""
        return encode_parts(
            self.site, self.round, self.attempt, self.roster, self.context, self.digest,
            self.previous_result,
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> Receipt:
        """Read what ``encode`` wrote.

        Raises:
            PeerProtocolError: the bytes are something else.
        """
        reader = Reader(data)
        receipt = cls(
            site=reader.integer(), round=reader.integer(), attempt=reader.integer(),
            roster=reader.bytes(32), context=reader.bytes(32), digest=reader.bytes(64),
            previous_result=reader.bytes(64),
        )  # fmt: skip
        reader.finish()
        return receipt


def keep_receipt(directory: Path, receipt: Receipt) -> None:
    """Write a receipt down, on disk before this returns.

    Raises:
        HospitiumError: the disk is full or the place is not writable.
    """
    directory.mkdir(exist_ok=True, mode=0o700)
    path = directory / f"{receipt.round:05}-{receipt.attempt}.receipt"
    write_durably(path, receipt.encode())


def read_receipts(directory: Path) -> tuple[Receipt, ...]:
    """Return every receipt, in the order of rounds and attempts.

    Raises:
        ConfigError: a file is no receipt.
    """
    found = []
    for path in directory.glob("*.receipt"):
        try:
            found.append(Receipt.decode(path.read_bytes()))
        except PeerProtocolError as error:
            raise ConfigError(f"{path}: expected a receipt, got something else") from error
    return tuple(sorted(found, key=lambda one: (one.round, one.attempt)))


def check_receipt(
    receipt: Receipt, transcript: Transcript, roster: Roster, policy: SecAggPolicy
) -> bool:
    """Return whether this site's vector is in the sum that a transcript announces.

    It may not be: an answer that came too late is left out, and so says the signed list.

    Raises:
        PeerProtocolError: another vector was counted for it, something is not signed, or the
            coordinator told others something else than this site.
    """
    context = round_context(transcript.task, roster, policy)
    if roster.digest != receipt.roster or context != receipt.context:
        raise PeerProtocolError(
            f"round {receipt.round}, attempt {receipt.attempt}: expected the task that this site "
            "got, the transcript has another: the coordinator told two stories",
            blame=0,
        )
    if receipt.site not in transcript.digests:
        for fault in signature_faults(transcript, roster, policy):
            raise fault
        return False
    check_inclusion(transcript, roster, policy, receipt.site, receipt.digest)
    return True


def check_previous(receipt: Receipt, before: Sequence[Transcript]) -> None:
    """Check that the task named the result which the transcripts of the round before announce.

    Raises:
        PeerProtocolError: it named another one.
    """
    result = announced([one.result for one in before]) if before else bytes(64)
    if receipt.previous_result != result:
        raise PeerProtocolError(
            f"round {receipt.round}: its task named another previous result than the transcript "
            "of the round before announces",
            blame=0,
        )
