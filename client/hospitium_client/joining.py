"""Joining a federation: keys and request out, admission in, new keys later on.

Order matters when the power fails. Keys are on disk before their request is handed out. With an
admission, the roster is pinned last but for the keys: from then on this hospital's new keys are the
ones it is enrolled under, and putting them in place can be done again at any time.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hospitium_client.enrolment import PinnedRosters, Verdict, consider_roster, own_member
from hospitium_client.keys import (
    is_locked,
    load_node_key,
    load_public_keys,
    load_site_keys,
    make_node_key,
    store_site_keys,
)
from hospitium_client.policy import NEW_POLICY
from hospitium_client.settings import SiteHome, SiteSettings, settings_text
from hospitium_common.durable import write_durably
from hospitium_common.enrolment.names import check_name, check_title
from hospitium_common.enrolment.public_keys import node_public_pem
from hospitium_common.enrolment.request import EnrolmentRequest, make_request
from hospitium_common.errors import ConfigError
from hospitium_common.federation import changes
from hospitium_common.key_file import demand_absent
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.toml_file import parse_toml, with_text_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.enrolment.admission import Admission
    from hospitium_common.federation import FederationRoster, Member, RosterChanges


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What an admission would do, before the administrator agreed to it.

    ``changes`` against the roster that is pinned now, None for the first admission;
    ``with_new_keys`` if it is the answer to a rotation.
    """

    admission: Admission
    member: Member
    pinned: FederationRoster | None
    changes: RosterChanges | None
    with_new_keys: bool

    @property
    def other_keys(self) -> tuple[str, ...]:
        """Other hospitals that are there under changed keys."""
        if self.changes is None:
            return ()
        own = self.member.name if self.with_new_keys else None
        return tuple(name for name in self.changes.other_keys if name != own)


@dataclass(frozen=True, kw_only=True, repr=False)
class Site:
    """This hospital, ready to take part: its keys, its entry, and the roster it goes by."""

    keys: SiteKeys
    member: Member
    roster: FederationRoster


def prepare_site(
    home: SiteHome,
    name: str,
    title: str,
    passphrase: bytes | None = None,
    passphrase_file: Path | None = None,
) -> EnrolmentRequest:
    """Make keys, settings and policy of a new hospital; `site.toml` is written last.

    A policy that is there already is kept. Whatever fails in between leaves nothing behind.

    Raises:
        ConfigError: a name or title is wrong, or there is a hospital already.
    """
    check_name(name)
    check_title(title)
    text = settings_text(name, title)
    if passphrase_file is not None:
        where = str(passphrase_file.resolve())
        text = with_text_value(text, "keys", "passphrase_file", where, name="site.toml")
    parse_toml(SiteSettings, text, name="site.toml")
    files = [home.settings_file, home.site_keys, home.node_key, home.request]
    demand_absent(*files)
    home.path.mkdir(parents=True, exist_ok=True)
    try:
        keys = SiteKeys.generate()
        store_site_keys(home.site_keys, keys, passphrase)
        request = make_request(name, title, keys, make_node_key(home.node_key))
        write_durably(home.request, request.encode())
        if not home.policy.exists():
            write_durably(home.policy, NEW_POLICY.encode())
        write_durably(home.settings_file, text.encode())
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise
    return request


def rotate(home: SiteHome, passphrase: Callable[[], bytes]) -> EnrolmentRequest:
    """Make new keys beside the old ones, and a request that the old ones vouch for.

    The old keys stay in use until the admission of the new ones comes back. Running it again makes
    the same request again. The new keys are locked as the old ones are.

    Raises:
        ConfigError: the old keys are missing, damaged, or locked with another passphrase.
    """
    old = load_site_keys(home.site_keys, passphrase)
    locked = is_locked(home.site_keys)
    return _request_new_keys(home, passphrase() if locked else None, old.sign)


def replace_lost_keys(
    home: SiteHome, passphrase: bytes | None = None, passphrase_file: Path | None = None
) -> EnrolmentRequest:
    """Make new keys for a hospital that lost its own, forgot their passphrase, or was revoked.

    Nothing vouches for these but a comparison by telephone. Settings, policy, studies and ledger
    stay as they are.

    Raises:
        ConfigError: the old keys had a passphrase and the new ones would have none.
    """
    if passphrase is None and _had_passphrase(home):
        raise ConfigError(
            "expected a passphrase for the new keys, as the old ones had; give --passphrase or "
            "--passphrase-file"
        )
    request = _request_new_keys(home, passphrase, None)
    where = "" if passphrase_file is None else str(passphrase_file.resolve())
    _set_in_settings(home, "keys", "passphrase_file", where)
    return request


def plan_joining(home: SiteHome, admission: Admission, now: float) -> Joining:
    """Check an admission as far as a machine can; nothing is changed.

    Whose governance key signed it, the administrator compares.

    Raises:
        ConfigError: signature, CA or roster do not hold, it is another hospital's admission, or
            this hospital was revoked or has expired (``now``: seconds since 1970).
    """
    admission.check(now)
    member = admission.roster.member(admission.index)
    with_new_keys = _demand_own_keys(home, member)
    if not member.is_active(now):
        state = "was revoked" if member.revoked else "has expired"
        raise ConfigError(
            f"roster version {admission.roster.version}: expected this hospital to be enrolled, it "
            f"{state}; ask the coordinator"
        )
    rosters = PinnedRosters(home)
    pinned = rosters.pinned() if rosters.is_admitted else None
    if pinned is not None:
        decision = consider_roster(pinned, admission.roster)
        if decision.verdict is Verdict.REFUSED:
            raise ConfigError(decision.reason)
    return Joining(
        admission=admission,
        member=member,
        pinned=pinned,
        changes=None if pinned is None else changes(pinned, admission.roster),
        with_new_keys=with_new_keys,
    )


def join(home: SiteHome, joining: Joining) -> None:
    """Pin what an admission says, and put the keys in place that it is for.

    Raises:
        ConfigError: `site.toml` cannot be changed, or a newer roster was pinned meanwhile.
    """
    admission = joining.admission
    home.pinned.mkdir(mode=0o700, parents=True, exist_ok=True)
    _set_in_settings(home, "coordinator", "address", admission.addresses[0])
    write_durably(home.ca, admission.ca)
    PinnedRosters(home).pin(admission.roster)
    put_new_keys_in_place(home)


def accept_waiting_roster(home: SiteHome, shown: bytes) -> FederationRoster:
    """Go over to the waiting roster whose digest was shown to the administrator.

    Raises:
        ConfigError: another one waits by now, or it has other keys for this hospital than it made.
    """
    rosters = PinnedRosters(home)
    pending = rosters.pending()
    if pending is not None:
        own = [load_public_keys(f) for f in (home.site_keys, home.next_site_keys) if f.exists()]
        if not any(member.keys in own for member in pending.members):
            raise ConfigError(
                f"roster version {pending.version}: expected this hospital's own keys in it, got "
                "others in their place. Do not accept it; call the coordinator"
            )
    roster = rosters.accept(shown)
    put_new_keys_in_place(home)
    return roster


def put_new_keys_in_place(home: SiteHome) -> bool:
    """Replace the old keys by those that the pinned roster names; return whether it did.

    Does nothing as long as the new ones are not enrolled; goes on where it was interrupted.

    Raises:
        ConfigError: this hospital was not admitted yet, a file is damaged, or the keys cannot be
            moved.
    """
    if not home.next_site_keys.exists():
        return False
    enrolled = {member.keys for member in PinnedRosters(home).pinned().members}
    if load_public_keys(home.next_site_keys) not in enrolled:
        return False
    try:
        if home.next_node_key.exists():
            _keep_readers(home.node_key, home.next_node_key)
            home.next_node_key.replace(home.node_key)
        home.next_site_keys.replace(home.site_keys)
        for folder in (home.site_keys.parent, home.next_site_keys.parent):
            _flush(folder)
    except OSError as error:
        raise ConfigError(
            f"{home.site_keys}: expected to put the new keys in place, got: {error.strerror}; they "
            "are kept. Make the folder writable and run it again"
        ) from error
    return True


def open_site(home: SiteHome, passphrase: Callable[[], bytes]) -> Site:
    """Load this hospital's keys, its entry in the pinned roster, and that roster.

    A rotation that was interrupted is finished first. Whether the enrolment is still valid is
    ``site.member.is_active(now)``.

    Raises:
        ConfigError: not admitted yet, keys missing, locked, damaged, or not those of the roster.
    """
    put_new_keys_in_place(home)
    roster = PinnedRosters(home).pinned()
    keys = load_site_keys(home.site_keys, passphrase)
    return Site(keys=keys, member=own_member(roster, keys.public()), roster=roster)


def _request_new_keys(
    home: SiteHome, passphrase: bytes | None, old: Ed25519PrivateKey | None
) -> EnrolmentRequest:
    """Make the keys that wait, or find those that do, and write a request for them."""
    if not home.next_site_keys.exists():
        store_site_keys(home.next_site_keys, SiteKeys.generate(), passphrase)
    keys = load_site_keys(home.next_site_keys, lambda: passphrase or b"")
    if home.next_node_key.exists():
        node_key = load_node_key(home.next_node_key)
    else:
        node_key = make_node_key(home.next_node_key)
    settings = home.settings()
    request = make_request(settings.name, settings.title, keys, node_key, old)
    write_durably(home.request, request.encode())
    return request


def _had_passphrase(home: SiteHome) -> bool:
    if home.settings().keys.passphrase_file:
        return True
    try:
        return is_locked(home.site_keys)
    except ConfigError:  # lost or damaged: nobody can tell
        return False


def _set_in_settings(home: SiteHome, section: str, key: str, value: str) -> None:
    """Change one value in `site.toml`; every comment stays."""
    path = home.settings_file
    before = path.read_text(encoding="utf-8")
    text = with_text_value(before, section, key, value, name=str(path))
    parse_toml(SiteSettings, text, name=str(path))
    if text != before:
        write_durably(path, text.encode())


def _demand_own_keys(home: SiteHome, member: Member) -> bool:
    """Demand that an entry holds this hospital's keys; return whether they are the new ones."""
    for site_keys, node_key, is_new in (
        (home.next_site_keys, home.next_node_key, True),
        (home.site_keys, home.node_key, False),
    ):
        if not (site_keys.exists() and node_key.exists()):
            continue
        public = node_public_pem(load_node_key(node_key).public_key())
        if (member.keys, member.node_key) == (load_public_keys(site_keys), public):
            name = home.settings().name
            if member.name != name:
                raise ConfigError(
                    f"expected this hospital to be enrolled as {name}, got {member.name}"
                )
            return is_new
    raise ConfigError(
        f"expected this hospital's own keys at site {member.index} ({member.name}), got others: "
        "this is the admission of another hospital, or the answer to an older request"
    )


def _keep_readers(old: Path, new: Path) -> None:
    """Let the node's group, if the old file had one, read the new file too."""
    with suppress(OSError):  # not the owner of that group: the administrator sees to it
        was = old.stat()
        os.chown(new, -1, was.st_gid)
        new.chmod(was.st_mode & 0o640)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
