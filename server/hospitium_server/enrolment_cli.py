"""`hospitium coordinator`: founding a federation, and who is enrolled in it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hospitium_common.durable import write_durably
from hospitium_common.enrolment import showing
from hospitium_common.enrolment.fingerprint import fingerprint_of_member
from hospitium_common.enrolment.request import EnrolmentRequest
from hospitium_common.enrolment.showing import DAY_S, demand_agreement, state_of
from hospitium_common.errors import ConfigError
from hospitium_common.json_file import read_received
from hospitium_common.study.signature import fingerprint
from hospitium_server import founding
from hospitium_server.certificates import hosts_of
from hospitium_server.enrolment import (
    Kind,
    Plan,
    find,
    keys_ever_used,
    load_roster,
    one_at_a_time,
    plan_enrolment,
    store_roster,
    write_admission,
)
from hospitium_server.enrolment import enroll as enroll_member
from hospitium_server.enrolment import revoke as revoke_member
from hospitium_server.keys import load_governance_key
from hospitium_server.settings import CoordinatorHome

app = typer.Typer()

Home = Annotated[
    Path,
    typer.Option(help="The coordinator's folder.", envvar="HOSPITIUM_COORDINATOR_HOME"),
]
GovernanceKey = Annotated[
    Path | None,
    typer.Option(help="Where the governance key is, if not in the folder's keys/."),
]
HERE = Path("coordinator")


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="What the federation is called.")],
    host: Annotated[
        list[str],
        typer.Option(help="Host name or IP address that hospitals dial; may be given again."),
    ],
    home: Home = HERE,
    port: Annotated[int, typer.Option(help="The public port.")] = 9092,
    local_port: Annotated[int, typer.Option(help="The control port, on 127.0.0.1 only.")] = 9093,
) -> None:
    """Found a federation: keys, CA, server certificate, settings and an empty roster.

    Nothing is ever overwritten.
    """
    folder = CoordinatorHome(home)
    roster = founding.found(
        folder, name, tuple(host), datetime.now(UTC), port=port, local_port=local_port
    )
    say = Console(soft_wrap=True, highlight=False)
    say.print(f"Founded {escape(name)} in {home}. Look through {folder.settings_file}.")
    say.print("Fingerprints, for hospitals to compare by telephone:")
    say.print(f"  governance   [bold]{fingerprint(roster.governance)}[/bold]")
    say.print(f"  coordinator  {fingerprint(roster.coordinator)}")
    say.print(
        f"\n{folder.governance_key} decides who is enrolled; running the server does not need it. "
        "Move it to a medium that you lock away, keep a copy, and name it with --governance-key "
        "when you enroll or revoke a hospital."
    )
    say.print("Next: `hospitium coordinator enroll REQUEST` for every hospital's request.")


@app.command()
def enroll(
    request: Annotated[Path, typer.Argument(help="The hospital's NAME.request.json.")],
    home: Home = HERE,
    governance_key: GovernanceKey = None,
    heard: Annotated[
        str | None,
        typer.Option("--fingerprint", help="What the hospital read to you; then nothing is asked."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Enroll without comparing fingerprints: for trials.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the admission; else here, by name.")
    ] = None,
) -> None:
    """Enroll a hospital, or give an enrolled one its new keys.

    Shows the fingerprint of the keys in the request. Compare it by telephone with what the hospital
    sees: that is what keeps a stranger out. Then writes NAME.admission.json to send back.
    """
    folder = CoordinatorHome(home)
    asked = _read_request(request)
    now = time.time()
    with one_at_a_time(folder):
        roster = load_roster(folder)
        expires = int(now) + folder.settings().enrolment.valid_days * DAY_S
        plan = plan_enrolment(roster, asked, keys_ever_used(folder), expires=expires, now=now)
        governance = load_governance_key(governance_key or folder.governance_key)
        _show(plan)
        demand_agreement(
            fingerprint_of_member(plan.after), heard,
            "Call the hospital on a number that you know. Does it read the same to you?",
            "these are other keys than the hospital's. Nobody was enrolled; find out who sent them",
            yes=yes,
        )  # fmt: skip
        roster = enroll_member(roster, plan, governance)
        store_roster(folder, roster)
        kept = write_admission(folder, roster, plan.after.name, governance)
    copy = _copy(kept, out)
    say = Console(soft_wrap=True, highlight=False)
    say.print(
        f"Enrolled {plan.after.name} as site {plan.after.index}; the roster is at version "
        f"{roster.version}. Wrote {copy}: send it to the hospital."
    )
    if plan.kind is not Kind.NEW and len(roster.members) > 1:
        say.print(
            "The other hospitals refuse changed keys until their administrators accept them: tell "
            "them the new fingerprint; they run `hospitium site accept-roster`."
        )


@app.command()
def admission(
    name: Annotated[str, typer.Argument(help="The hospital's short name.")],
    home: Home = HERE,
    governance_key: GovernanceKey = None,
    out: Annotated[Path | None, typer.Option(help="Where to write it; else here, by name.")] = None,
) -> None:
    """Write a hospital's admission again, with the newest roster and addresses."""
    folder = CoordinatorHome(home)
    roster = load_roster(folder)
    member = find(roster, name)
    if not member.is_active(time.time()):
        raise ConfigError(
            f"{name}: expected an active hospital, it is {state_of(member, time.time())}"
        )
    governance = load_governance_key(governance_key or folder.governance_key)
    copy = _copy(write_admission(folder, roster, name, governance), out)
    Console(soft_wrap=True).print(f"Wrote {copy}: send it to the hospital.")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The hospital's short name.")],
    home: Home = HERE,
    governance_key: GovernanceKey = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take a hospital out: its keys count for nothing from the next roster on."""
    folder = CoordinatorHome(home)
    with one_at_a_time(folder):
        roster = load_roster(folder)
        member = find(roster, name)
        governance = load_governance_key(governance_key or folder.governance_key)
        roster = revoke_member(roster, name, governance)
        if not yes:
            question = f"Revoke {member.name} ({fingerprint_of_member(member)})?"
            typer.confirm(question, abort=True)
        store_roster(folder, roster)
    Console(soft_wrap=True).print(
        f"Revoked {name}; the roster is at version {roster.version}. A running server and the "
        "other hospitals learn it by themselves."
    )


@app.command()
def rotate(
    home: Home = HERE,
    governance_key: GovernanceKey = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Give the coordinator a new signing key, because the server was broken into or moved.

    Every hospital's administrator has to accept it: they are shown both fingerprints.
    """
    folder = CoordinatorHome(home)
    with one_at_a_time(folder):
        before = load_roster(folder)
        governance = load_governance_key(governance_key or folder.governance_key)
        if not yes:
            typer.confirm("Every hospital will have to accept the new key. Go on?", abort=True)
        roster = founding.rotate_coordinator_key(folder, before, governance)
    say = Console(soft_wrap=True, highlight=False)
    say.print(f"The coordinator has another key; the roster is at version {roster.version}.")
    say.print(f"  from now on  [bold]{fingerprint(roster.coordinator)}[/bold]")
    say.print(
        "Hospitals answer the old key only, so the roster cannot come over the network: send each "
        "its `hospitium coordinator admission NAME`, for `hospitium site admit`. Then restart "
        "`hospitium coordinator serve`, and sign studies that go on: `hospitium coordinator sign`."
    )


@app.command()
def renew(
    home: Home = HERE,
    ca: Annotated[
        bool, typer.Option("--ca", help="A new CA too: the old one is lost, stolen or expires.")
    ] = False,
) -> None:
    """Make a new server certificate under the same CA; hospitals notice nothing.

    It stands for the hosts in coordinator.toml and is valid for a year. After a new CA, every
    hospital needs its admission again before it can connect.
    """
    folder, say = CoordinatorHome(home), Console(soft_wrap=True, highlight=False)
    if ca:
        founding.replace_ca(folder, datetime.now(UTC))
        say.print("Made a new CA: send each hospital its `hospitium coordinator admission NAME`.")
    certificate = founding.renew(folder, datetime.now(UTC))
    say.print(
        f"Renewed until {certificate.not_valid_after_utc:%Y-%m-%d} for "
        f"{', '.join(hosts_of(certificate))}. Restart `hospitium coordinator serve`."
    )
    _warn(CoordinatorHome(home))


@app.command("roster")
def show_roster(home: Home = HERE) -> None:
    """List who is enrolled: fingerprints, expiry, state; and whether the certificate is well."""
    folder = CoordinatorHome(home)
    roster = load_roster(folder)
    showing.show_roster(Console(highlight=False), roster, time.time())
    _warn(folder)


def _read_request(path: Path) -> EnrolmentRequest:
    data = read_received(path, "a hospital's enrolment request")
    try:
        return EnrolmentRequest.decode(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _show(plan: Plan) -> None:
    say = Console(soft_wrap=True, highlight=False)
    say.print(f"{plan.after.title} ({plan.after.name}), site {plan.after.index}", markup=False)
    say.print(f"  what it is:   {plan.kind.value}")
    if plan.before is not None:
        say.print(f"  until now:    {fingerprint_of_member(plan.before)}")
    say.print(f"  fingerprint:  [bold]{fingerprint_of_member(plan.after)}[/bold]")


def _copy(kept: Path, out: Path | None) -> Path:
    copy = out or Path(kept.name)
    if copy.resolve() != kept.resolve():
        write_durably(copy, kept.read_bytes())
    return copy


def _warn(folder: CoordinatorHome) -> None:
    say = Console(soft_wrap=True, highlight=False)
    for warning in founding.certificate_warnings(folder, datetime.now(UTC)):
        say.print(f"[bold yellow]warning:[/bold yellow] {warning}")
