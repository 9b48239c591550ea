"""Which roster this hospital goes by: what it takes by itself, what needs a person, what never.

The coordinator relays rosters; the governance key that this hospital pinned signs them. A hospital
that joins or is revoked, or whose enrolment is extended, needs nobody here. Another key for one
that is known does: a person compares the new fingerprint by telephone first. An older roster, or
another one under the same version number, is refused, whoever signed it.
"""

from __future__ import annotations

import fcntl
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.federation import FederationRoster, RosterChanges, changes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hospitium_client.settings import SiteHome
    from hospitium_common.federation import Member
    from hospitium_common.secagg.keys import PublicKeys

logger = logging.getLogger(__name__)


class Verdict(Enum):
    """What becomes of a roster that was offered."""

    ACCEPTED = "accepted"
    WAITING = "waiting for this hospital's administrator"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A verdict, why, and what the roster would change; ``changes`` is None if it was refused."""

    verdict: Verdict
    reason: str
    changes: RosterChanges | None = None


def consider_roster(pinned: FederationRoster, offered: FederationRoster) -> Decision:
    """Decide about a roster that was offered, against the one that this hospital goes by.

    **Guarantees:** without a person nothing is accepted that the pinned governance key did not
    sign, that puts another key under a known name or index, or that is older than the pinned one.
    """
    try:
        offered.check(offered.governance)
    except PeerProtocolError as error:
        return Decision(verdict=Verdict.REFUSED, reason=str(error))
    if offered.version < pinned.version:
        return _refused(
            f"expected roster version {pinned.version} or newer, got {offered.version}: an old "
            "roster may bring back a revoked hospital"
        )
    if offered.version == pinned.version and offered.digest != pinned.digest:
        return _refused(
            f"roster version {offered.version}: expected digest {pinned.digest.hex()[:16]}, got "
            f"{offered.digest.hex()[:16]}: two rosters under one number; call the coordinator"
        )
    found = changes(pinned, offered)
    if found.need_a_person:
        who = [*found.other_keys, *(["the coordinator"] if found.other_coordinator else [])]
        return Decision(
            verdict=Verdict.WAITING,
            reason=f"roster version {offered.version} has other keys for {', '.join(who)}: "
            "`hospitium site accept-roster` shows and accepts them",
            changes=found,
        )
    return Decision(
        verdict=Verdict.ACCEPTED, reason=f"roster version {offered.version}", changes=found
    )


def own_member(roster: FederationRoster, keys: PublicKeys) -> Member:
    """Return the entry of the hospital that has these keys.

    Raises:
        ConfigError: there is none.
    """
    for member in roster.members:
        if member.keys == keys:
            return member
    raise ConfigError(
        f"roster version {roster.version}: expected this hospital's keys in it, got none of them; "
        "were they rotated elsewhere? `hospitium site admit` takes the admission that belongs to "
        "them"
    )


class PinnedRosters:
    """The roster that this hospital goes by, and one that waits for its administrator, on disk.

    Every call looks at the files anew: the trainer and a command at the terminal share them.
    """

    def __init__(self, home: SiteHome) -> None:
        self._folder = home.pinned

    @property
    def is_admitted(self) -> bool:
        """Whether this hospital was admitted to a federation."""
        return self._pinned_file.exists()

    def pinned(self) -> FederationRoster:
        """Return the roster that this hospital goes by.

        Raises:
            ConfigError: it was not admitted yet, or the file is damaged.
        """
        if not self.is_admitted:
            raise ConfigError(
                f"{self._pinned_file}: expected the pinned roster, got nothing there; "
                "`hospitium site admit NAME.admission.json` pins it"
            )
        return _read(self._pinned_file)

    def pending(self) -> FederationRoster | None:
        """Return the roster that waits for the administrator, if one does.

        Raises:
            ConfigError: a file is damaged.
        """
        if not self._pending_file.exists():
            return None
        pending = _read(self._pending_file)
        waits = consider_roster(self.pinned(), pending).verdict is Verdict.WAITING
        return pending if waits else None

    def offer(self, offered: FederationRoster) -> Decision:
        """Consider a roster and keep what comes of it, on disk before this returns.

        Raises:
            ConfigError: this hospital was not admitted yet, or a file is damaged.
            HospitiumError: the disk is full.
        """
        with self._alone():
            pinned = self.pinned()
            decision = consider_roster(pinned, offered)
            if decision.verdict is Verdict.WAITING:
                decision = self._keep_waiting(pinned, offered, decision)
            elif decision.verdict is Verdict.ACCEPTED and offered.version > pinned.version:
                write_durably(self._pinned_file, offered.encode())
                logger.info("went over to %s", decision.reason)
            if decision.verdict is Verdict.REFUSED:
                logger.warning("refused a roster from the coordinator: %s", decision.reason)
        return decision

    def accept(self, shown: bytes) -> FederationRoster:
        """Go over to the waiting roster, if it is still the one with the digest that was shown.

        Raises:
            ConfigError: another one waits by now, or none.
        """
        with self._alone():
            pending = self.pending()
            if pending is None or pending.digest != shown:
                raise ConfigError(
                    "expected the roster that was shown to wait still, got another or none; look "
                    "again with `hospitium site accept-roster`"
                )
            self._pin(pending)
        return pending

    def pin(self, roster: FederationRoster) -> None:
        """Go over to a roster that the administrator accepted as part of an admission.

        Raises:
            ConfigError: it is older than the pinned one, or another under the same number.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            if self.is_admitted:
                decision = consider_roster(self.pinned(), roster)
                if decision.verdict is Verdict.REFUSED:
                    raise ConfigError(decision.reason)
            self._pin(roster)

    def _pin(self, roster: FederationRoster) -> None:
        write_durably(self._pinned_file, roster.encode())
        self._pending_file.unlink(missing_ok=True)

    def _keep_waiting(
        self, pinned: FederationRoster, offered: FederationRoster, decision: Decision
    ) -> Decision:
        """Keep the offered roster, unless one waits that it must not displace."""
        waiting = self.pending()
        if waiting is not None and waiting.governance == offered.governance:
            decision_among = _newer_of_two(waiting, offered)
            if decision_among is not None:
                return decision_among
        elif waiting is not None and waiting.governance == pinned.governance:
            return _refused(
                f"roster version {offered.version}: expected the pinned governance key, got "
                "another, and one that the pinned key signed is waiting"
            )
        if waiting is None or waiting.digest != offered.digest:
            write_durably(self._pending_file, offered.encode())
            logger.warning("a roster waits for the administrator: %s", decision.reason)
        return decision

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Change the files one process at a time; each holds the lock for milliseconds."""
        with (self._folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def _pinned_file(self) -> Path:
        return self._folder / "roster.json"

    @property
    def _pending_file(self) -> Path:
        return self._folder / "pending.json"


def _newer_of_two(waiting: FederationRoster, offered: FederationRoster) -> Decision | None:
    """Refuse what is older than the waiting roster, or another one under its number."""
    if offered.version < waiting.version:
        return _refused(f"expected roster version {waiting.version}, which waits, or newer")
    if offered.version == waiting.version and offered.digest != waiting.digest:
        return _refused(
            f"roster version {offered.version}: expected the one that waits, got another under "
            "the same number; call the coordinator"
        )
    return None


def _refused(reason: str) -> Decision:
    return Decision(verdict=Verdict.REFUSED, reason=reason)


def _read(path: Path) -> FederationRoster:
    try:
        roster = FederationRoster.decode(path.read_bytes())
        roster.check(roster.governance)
    except OSError as error:
        raise ConfigError(f"{path}: expected a roster, got: {error.strerror}") from error
    except PeerProtocolError as error:
        raise ConfigError(
            f"{path}: {error}; restore it from your back-up, or admit this hospital again"
        ) from error
    return roster
