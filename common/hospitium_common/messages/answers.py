"""How a site says no, and where a study stands with it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from hospitium_common.codec import Reader
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages.wire import Message

NOBODY = 256
"""Stands for no blame; sites are 1 to 255, the coordinator is 0."""


class Reason(IntEnum):
    """Why a site refuses; it never says more, because details are the site's own."""

    PROTOCOL = 1
    NOT_APPROVED = 2
    BUDGET = 3
    DATA = 4
    LOCAL_FAULT = 5


@dataclass(frozen=True, kw_only=True)
class Refusal(Message):
    """Site: no, and in one word why."""

    KIND = 12
    reason: Reason
    blame: int | None

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.reason, NOBODY if self.blame is None else self.blame

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        reason, blame = reader.integer(), reader.integer()
        if reason not in list(Reason) or blame > NOBODY:
            raise PeerProtocolError("expected a known reason for a refusal, got another")
        return cls(reason=Reason(reason), blame=None if blame == NOBODY else blame)


@dataclass(frozen=True, kw_only=True)
class StudyOffer(Message):
    """Coordinator: here is a study, signed, and the newest roster; where does it stand with you?

    ``document`` is the study file and ``signature`` what stands beside it; ``roster`` is the
    federation's roster as a file. All three are checked by the site, whoever relayed them.
    """

    KIND = 13
    document: bytes
    signature: bytes
    roster: bytes

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.document, self.signature, self.roster

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(document=reader.bytes(), signature=reader.bytes(), roster=reader.bytes())


class StudyState(IntEnum):
    """Where a study stands at a site."""

    APPROVED = 1
    WAITING = 2
    """Somebody at the site has to approve it."""
    REFUSED = 3
    """It breaks the site's rules."""
    ROSTER_WAITING = 4
    """The site's administrator has to accept a changed key first."""
    DATA_MISSING = 5
    """It is approved, but the site's data cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Standing(Message):
    """Site: where the offered study stands, and which roster the site goes by."""

    KIND = 14
    state: StudyState
    roster_version: int

    def _parts(self) -> tuple[int | bytes, ...]:
        return self.state, self.roster_version

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        state, version = reader.integer(), reader.integer()
        if state not in list(StudyState):
            raise PeerProtocolError("expected a known state of a study, got another")
        return cls(state=StudyState(state), roster_version=version)
