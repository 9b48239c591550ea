"""`hospitium site`: joining a federation, and whom this hospital trusts in it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hospitium_client.enrolment import PinnedRosters
from hospitium_client.joining import (
    Joining,
    accept_waiting_roster,
    join,
    plan_joining,
    prepare_site,
    replace_lost_keys,
)
from hospitium_client.joining import rotate as rotate_keys
from hospitium_client.keys import find_passphrase, load_public_keys, read_passphrase
from hospitium_client.settings import SiteHome
from hospitium_common.durable import write_durably
from hospitium_common.enrolment import showing
from hospitium_common.enrolment.admission import Admission
from hospitium_common.enrolment.fingerprint import fingerprint_of_member
from hospitium_common.enrolment.names import name_from_title
from hospitium_common.enrolment.showing import demand_agreement, state_of
from hospitium_common.errors import ConfigError
from hospitium_common.federation import changes
from hospitium_common.json_file import read_received
from hospitium_common.study.signature import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from hospitium_common.enrolment.request import EnrolmentRequest
    from hospitium_common.federation import FederationRoster, Member, RosterChanges

HERE = Path("site")

app = typer.Typer()

Home = Annotated[Path, typer.Option(help="This hospital's folder.", envvar="HOSPITIUM_SITE_HOME")]
AskPassphrase = Annotated[
    bool, typer.Option("--passphrase", help="Lock the keys with a passphrase; it is asked for.")
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="Lock the keys with the passphrase in this file of mode 0600."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Accept without comparing: for trials.")]
Heard = Annotated[
    str | None,
    typer.Option("--fingerprint", help="What the coordinator read to you; then nothing is asked."),
]


@app.command()
def init(
    title: Annotated[str, typer.Argument(help='The hospital\'s name, such as "St. Anna".')],
    home: Home = HERE,
    name: Annotated[
        str | None, typer.Option(help="A short name for files; else made of the title.")
    ] = None,
    passphrase: AskPassphrase = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make this hospital's keys, settings and policy, and a request to be enrolled.

    The keys are made here and stay here. The request holds public keys only. Nothing is ever
    overwritten.
    """
    folder, short = SiteHome(home), name or name_from_title(title)
    secret = _new_passphrase(passphrase, passphrase_file)
    request = prepare_site(folder, short, title, secret, passphrase_file)
    say = _console()
    say.print(f"Made the keys of {escape(title)} in {home}; they stay there.")
    if secret is None:
        say.print("They have no passphrase: only the file mode 0600 protects them.")
    _hand_out(folder, request)
    say.print(
        f"Then look through {folder.settings_file} and {folder.policy}, and when "
        f"{short}.admission.json comes back: `hospitium site admit {short}.admission.json`."
    )


@app.command()
def admit(
    file: Annotated[Path, typer.Argument(help="NAME.admission.json from the coordinator.")],
    home: Home = HERE,
    heard: Heard = None,
    yes: Yes = False,
) -> None:
    """Check what the coordinator sent back, and trust it from now on.

    Shows the fingerprint of the governance key. Compare it by telephone with what the coordinator
    sees: everything else in the file is signed with it.
    """
    folder = SiteHome(home)
    folder.settings()
    data = read_received(file, "the coordinator's admission")
    try:
        joining = plan_joining(folder, Admission.decode(data), time.time())
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    _show_joining(joining)
    demand_agreement(
        fingerprint(joining.admission.roster.governance), heard,
        "Call the coordinator on a number that you know. Is governance the same there?",
        "this was signed by somebody else. Nothing was changed; find out who sent it",
        yes=yes,
    )  # fmt: skip
    join(folder, joining)
    say = _console()
    say.print(
        f"Admitted as site {joining.member.index} to {escape(joining.admission.roster.name)}; "
        f"the node dials {joining.admission.addresses[0]}."
    )
    if joining.with_new_keys:
        say.print("The new keys are in place, the old ones gone. Restart `hospitium site run`.")
    else:
        say.print("Next: name your data in site.toml, then `hospitium site run`.")


@app.command()
def rotate(
    home: Home = HERE,
    lost: Annotated[
        bool, typer.Option("--lost", help="The old keys are lost, stolen, or were revoked.")
    ] = False,
    passphrase: AskPassphrase = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make new keys beside the old ones, and a request to be enrolled under them.

    The old keys stay in use until `hospitium site admit` takes the answer. New keys are locked as
    the old ones are; a new passphrase can be given with --lost only.
    """
    folder = SiteHome(home)
    if lost:
        secret = _new_passphrase(passphrase, passphrase_file)
        request = replace_lost_keys(folder, secret, passphrase_file)
    elif passphrase or passphrase_file:
        raise ConfigError("--passphrase: expected it with --lost only, got it without")
    else:
        request = rotate_keys(folder, passphrase_of(folder))
    _console().print("Made new keys; the old ones stay in use until the new ones are admitted.")
    _hand_out(folder, request)


@app.command("roster")
def show_roster(home: Home = HERE) -> None:
    """List whom this hospital trusts: fingerprints, expiry, state; and what waits."""
    rosters = PinnedRosters(SiteHome(home))
    own = load_public_keys(SiteHome(home).site_keys)
    say = Console(highlight=False)
    showing.show_roster(say, rosters.pinned(), time.time(), own)
    pending = rosters.pending()
    if pending is not None:
        say.print(
            f"Version {pending.version} waits: `hospitium site accept-roster` shows its changes."
        )


@app.command("accept-roster")
def accept_roster(home: Home = HERE, yes: Yes = False) -> None:
    """Show a waiting roster that changes keys which this hospital pinned, and accept it.

    Compare each new fingerprint by telephone with the hospital that it belongs to: whoever could
    swap a key unnoticed could read what is meant for that hospital.
    """
    rosters = PinnedRosters(SiteHome(home))
    pinned, pending = rosters.pinned(), rosters.pending()
    say = _console()
    if pending is None:
        say.print(f"Nothing waits; this hospital goes by version {pinned.version}.")
        return
    say.print(f"Roster version {pending.version} instead of {pinned.version}:")
    _show_changes(pinned, pending, changes(pinned, pending))
    if not yes:
        typer.confirm("Did you compare every new fingerprint by telephone?", abort=True)
    accept_waiting_roster(SiteHome(home), pending.digest)
    say.print(f"Accepted; this hospital goes by version {pending.version} now.")


def passphrase_of(home: SiteHome, *, may_ask: bool = True) -> Callable[[], bytes]:
    """Return how to get the passphrase of this hospital's keys; it is asked for once at most."""
    named = home.settings().keys.passphrase_file

    @cache
    def find() -> bytes:
        file = home.path / named if named else None
        return find_passphrase(file, _ask if may_ask else None)

    return find


def _ask() -> str:
    answer: str = typer.prompt("Passphrase of this hospital's keys", hide_input=True)
    return answer


def _new_passphrase(ask: bool, file: Path | None) -> bytes | None:
    if file is not None:
        return read_passphrase(file)
    if not ask:
        return None
    answer: str = typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True)
    return answer.encode()


def _hand_out(folder: SiteHome, request: EnrolmentRequest) -> None:
    path = Path(f"{request.name}.request.json")
    write_durably(path, folder.request.read_bytes())
    say = _console()
    say.print(f"Wrote {path}: send it to the coordinator. Read this to them by telephone:")
    say.print(f"  [bold]{request.fingerprint}[/bold]")


def _show_joining(joining: Joining) -> None:
    admission, say = joining.admission, _console()
    roster, until = admission.roster, datetime.fromtimestamp(joining.member.expires, UTC)
    say.print(f"{roster.name}: admission of {joining.member.title}", markup=False)
    say.print(f"  site {joining.member.index} of {len(roster.members)}, until {until:%Y-%m-%d}")
    say.print(f"  addresses    {', '.join(admission.addresses)}", markup=False)
    say.print(f"  coordinator  {fingerprint(roster.coordinator)}")
    say.print(f"  governance   [bold]{fingerprint(roster.governance)}[/bold]")
    if joining.pinned is not None and joining.changes is not None:
        _show_changes(joining.pinned, roster, joining.changes)


def _show_changes(before: FederationRoster, after: FederationRoster, found: RosterChanges) -> None:
    say = _console()
    old = {member.name: member for member in before.members}
    new = {member.name: member for member in after.members}
    for name in found.other_keys:
        say.print(f"  [bold]{name}: other keys[/bold]")
        say.print(f"    until now  {_shown(old.get(name))}")
        say.print(f"    from now   [bold]{_shown(new.get(name))}[/bold]")
    for what, one, other in (
        ("coordinator", before.coordinator, after.coordinator),
        ("governance", before.governance, after.governance),
    ):
        if one != other:
            say.print(f"  [bold red]the {what} has another key[/bold red]")
            say.print(f"    until now  {fingerprint(one)}")
            say.print(f"    from now   [bold]{fingerprint(other)}[/bold]")
    if before.name != after.name:
        say.print(f"  the federation is called {after.name}, until now {before.name}", markup=False)
    for what, names in (("new", found.added), ("revoked", found.revoked)):
        if names:
            say.print(f"  {what}: {', '.join(names)}")


def _shown(member: Member | None) -> str:
    return (
        "not in it"
        if member is None
        else f"{fingerprint_of_member(member)} ({state_of(member, time.time())})"
    )


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)
