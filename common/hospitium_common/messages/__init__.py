"""Every message between coordinator and site, and the only place where their bytes are laid out."""

from hospitium_common.codec import Reader
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages.answers import Reason, Refusal, Standing, StudyOffer, StudyState
from hospitium_common.messages.pairing import Paired, PairOffer, PairOffers, PairRequest
from hospitium_common.messages.round import (
    SEALED_SHARE_BYTES,
    Ack,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Purpose,
    Ready,
    ReadyHead,
    Shares,
    Task,
    UnmaskRequest,
)
from hospitium_common.messages.wire import VERSION, Message

__all__ = [
    "SEALED_SHARE_BYTES",
    "VERSION",
    "Ack",
    "ConfirmRequest",
    "MaskRequest",
    "Masked",
    "Message",
    "PairOffer",
    "PairOffers",
    "PairRequest",
    "Paired",
    "Purpose",
    "Ready",
    "ReadyHead",
    "Reason",
    "Refusal",
    "Shares",
    "Standing",
    "StudyOffer",
    "StudyState",
    "Task",
    "UnmaskRequest",
    "decode",
]

_KINDS: dict[int, type[Message]] = {
    kind.KIND: kind
    for kind in (
        PairRequest, PairOffers, Paired, Task, Ready, MaskRequest, Masked, ConfirmRequest, Ack,
        UnmaskRequest, Shares, Refusal, StudyOffer, Standing,
    )
}  # fmt: skip


def decode(data: bytes | memoryview) -> Message:
    """Read any message.

    Raises:
        PeerProtocolError: not exactly one message of this version.
    """
    if len(data) < 2 or data[0] != VERSION or data[1] not in _KINDS:
        raise PeerProtocolError(f"expected a message of version {VERSION}, got something else")
    reader = Reader(memoryview(data)[2:])
    message = _KINDS[data[1]]._read(reader)
    reader.finish()
    return message
