"""Named faults between coordinator and sites, for simulations and tests.

A fault is written ``KIND:SITE:MESSAGE[:ROUND]``, for instance ``drop:2:masked:3``: in training
round 3, site 2's MASKED never arrives. Without a round it happens in all of them; round 0 adds up
the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.messages import Ack, Masked, Message, Ready, Shares, Task, decode
from hospitium_common.schedule import NUMBERS_PER_STAGE, STATISTICS_STAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hospitium_server.transport import Transport

FaultKind = Literal["drop", "delay", "replay", "corrupt", "lie"]
ANSWERS: dict[str, type[Message]] = {"ready": Ready, "masked": Masked, "ack": Ack, "shares": Shares}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one site's answer of one kind.

    ``drop`` and ``delay`` (beyond the deadline) lose it; ``replay`` answers with that site's
    answer of an earlier round; ``corrupt`` flips a bit; ``lie`` sends another site's number.
    """

    kind: FaultKind
    site: int
    answer: str
    round: int | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read ``KIND:SITE:MESSAGE[:ROUND]``.

        Raises:
            ConfigError: it is something else.
        """
        parts = text.split(":")
        try:
            kind, site, answer = parts[:3]
            number = int(parts[3]) if len(parts) > 3 else None
            if kind in get_args(FaultKind) and answer in ANSWERS and len(parts) <= 4:
                return cls(kind=kind, site=int(site), answer=answer, round=number)  # type: ignore[arg-type]  # checked above
        except ValueError:
            pass
        kinds, answers = ", ".join(get_args(FaultKind)), ", ".join(ANSWERS)
        raise ConfigError(
            f"expected a fault KIND:SITE:MESSAGE[:ROUND] with KIND one of {kinds} and MESSAGE one "
            f"of {answers}, got {text!r}"
        )


class FaultyTransport:
    """A transport that lets the given faults happen."""

    def __init__(self, inner: Transport, faults: tuple[Fault, ...]) -> None:
        self._inner, self._faults = inner, faults
        self._round = 0
        self._earlier: dict[tuple[int, str], bytes] = {}

    def exchange(
        self, requests: Mapping[int, bytes], deadline_s: float
    ) -> Iterator[tuple[int, bytes]]:
        """Pass messages on, except where a fault says otherwise."""
        first = decode(next(iter(requests.values()))) if requests else None
        if isinstance(first, Task):
            self._round = first.round // NUMBERS_PER_STAGE - STATISTICS_STAGE
        for site, answer in self._inner.exchange(requests, deadline_s):
            name = _name(answer)
            changed: bytes | None = answer
            for fault in self._faults:
                if (fault.site, fault.answer) == (site, name) and fault.round in (
                    None,
                    self._round,
                ):
                    changed = self._apply(fault, answer)
            self._earlier[(site, name)] = answer
            if changed is not None:
                yield site, changed

    def _apply(self, fault: Fault, answer: bytes) -> bytes | None:
        if fault.kind in ("drop", "delay"):
            return None
        if fault.kind == "replay":
            return self._earlier.get((fault.site, fault.answer), answer)
        if fault.kind == "corrupt":
            middle = len(answer) // 2
            return answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]
        # A lie: the same answer with one of its integers (a site's number) changed.
        number, other = fault.site.to_bytes(8, "big"), (fault.site % 3 + 1).to_bytes(8, "big")
        return answer.replace(number, other, 1)


def _name(answer: bytes) -> str:
    try:
        message = decode(answer)
    except PeerProtocolError:
        return ""
    return next((name for name, kind in ANSWERS.items() if isinstance(message, kind)), "")
