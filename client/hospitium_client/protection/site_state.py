"""What a site remembers between the messages of a round, as one value that can be written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hospitium_common.errors import LocalProtocolError

if TYPE_CHECKING:
    from hospitium_common.roster import Roster


class Phase(StrEnum):
    """Where in a round the site stands."""

    IDLE = "idle"
    READY = "ready"
    MASKED = "masked"
    CONFIRMED = "confirmed"


@dataclass(frozen=True, kw_only=True, repr=False)
class Held:
    """The secrets and facts of the attempt under way; each phase keeps only what comes after."""

    context: bytes
    invited: tuple[int, ...]
    shares: Mapping[int, bytes]
    seeds: Mapping[int, bytes] = field(default_factory=dict)
    self_mask: bytes = b""
    cohort: tuple[int, ...] = ()
    cohort_digest: bytes = b""
    digest: bytes = b""
    survivors: tuple[int, ...] = ()
    survivors_digest: bytes = b""


@dataclass(frozen=True, kw_only=True, repr=False)
class SiteState:
    """Pair roots at ratchet position ``ratchet_at``, and how far this site has gone.

    ``epoch`` and ``sites`` say which key epoch the roots belong to. ``latest`` is the highest
    (round, attempt) answered; ``spent`` the highest round for which shares were released.
    """

    roster_digest: bytes = b""
    epoch: int = 0
    sites: tuple[int, ...] = ()
    roots: Mapping[int, bytes] = field(default_factory=dict)
    ratchet_at: int = 0
    latest: tuple[int, int] = (0, 0)
    spent: int = 0
    phase: Phase = Phase.IDLE
    held: Held | None = None

    @classmethod
    def for_epoch(
        cls, roster: Roster, roots: Mapping[int, bytes], *, after: SiteState
    ) -> SiteState:
        """Return the state at the start of a key epoch: fresh roots, nothing forgotten.

        Fresh roots stand at ratchet position 0 at every site, however far each has gone.
        """
        return cls(
            roster_digest=roster.digest, epoch=roster.epoch, sites=tuple(sorted(roster.sites)),
            roots=roots, latest=after.latest, spent=after.spent,
        )  # fmt: skip

    def encode(self) -> bytes:
        """Return the state as bytes. They hold secrets: a file of mode 0600, never a message."""
        return json.dumps(_plain(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> SiteState:
        """Read what ``encode`` wrote.

        Raises:
            LocalProtocolError: the bytes are something else.
        """
        try:
            fields = json.loads(data)
            held = fields.pop("held")
            return cls(
                roster_digest=bytes.fromhex(fields["roster_digest"]),
                epoch=int(fields["epoch"]),
                sites=tuple(int(site) for site in fields["sites"]),
                roots=_table(fields["roots"]),
                ratchet_at=int(fields["ratchet_at"]),
                latest=(int(fields["latest"][0]), int(fields["latest"][1])),
                spent=int(fields["spent"]),
                phase=Phase(fields["phase"]),
                held=None if held is None else _held(held),
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            OverflowError,
            RecursionError,
        ) as error:
            raise LocalProtocolError(
                "expected the state of a site, got something else; this site must pair again"
            ) from error


def _plain(value: object) -> Any:
    """Turn a state into what JSON knows: bytes become hexadecimal text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, SiteState | Held):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _table(rows: dict[str, str]) -> dict[int, bytes]:
    return {int(key): bytes.fromhex(value) for key, value in rows.items()}


def _held(fields: dict[str, Any]) -> Held:
    return Held(
        context=bytes.fromhex(fields["context"]),
        invited=tuple(fields["invited"]),
        shares=_table(fields["shares"]),
        seeds=_table(fields["seeds"]),
        self_mask=bytes.fromhex(fields["self_mask"]),
        cohort=tuple(fields["cohort"]),
        cohort_digest=bytes.fromhex(fields["cohort_digest"]),
        digest=bytes.fromhex(fields["digest"]),
        survivors=tuple(fields["survivors"]),
        survivors_digest=bytes.fromhex(fields["survivors_digest"]),
    )
