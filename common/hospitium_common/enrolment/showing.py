"""What both sides show at the terminal: the roster, and a fingerprint to compare."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from hospitium_common.enrolment.fingerprint import fingerprint_of_member, same_fingerprint
from hospitium_common.errors import ConfigError
from hospitium_common.study.signature import fingerprint

if TYPE_CHECKING:
    from rich.console import Console

    from hospitium_common.federation import FederationRoster, Member
    from hospitium_common.secagg.keys import PublicKeys

DAY_S = 24 * 60 * 60
SOON_DAYS = 60
FOLDING = ("title", "fingerprint")


def state_of(member: Member, now: float) -> str:
    """Say in words whether a hospital may take part (``now``: seconds since 1970)."""
    if member.revoked:
        return "revoked"
    left = (member.expires - now) // DAY_S
    if left < 0:
        return "expired"
    return f"expires in {left:.0f} days" if left < SOON_DAYS else "active"


def show_roster(
    say: Console, roster: FederationRoster, now: float, own: PublicKeys | None = None
) -> None:
    """Print who is enrolled, and whose keys sign; ``own`` marks this hospital."""
    title = f"{escape(roster.name)}: roster version {roster.version}"
    table = Table(title=title, title_justify="left")
    for column in ("site", "name", "title", "fingerprint", "expires", "state"):
        table.add_column(column, no_wrap=column not in FOLDING, overflow="fold")
    for member in roster.members:
        until = datetime.fromtimestamp(member.expires, UTC)
        mark = " (this one)" if member.keys == own else ""
        table.add_row(
            f"{member.index}{mark}", member.name, escape(member.title),
            fingerprint_of_member(member), f"{until:%Y-%m-%d}", state_of(member, now),
        )  # fmt: skip
    say.print(table)
    say.print(f"governance   {fingerprint(roster.governance)}")
    say.print(f"coordinator  {fingerprint(roster.coordinator)}")


def demand_agreement(
    shown: str, heard: str | None, question: str, otherwise: str, *, yes: bool
) -> None:
    """Compare what is shown with what was heard by telephone; ask if nothing was given.

    Raises:
        ConfigError: they differ; ``otherwise`` says what that means.
        click.Abort: the person at the terminal says no.
    """
    if heard is not None:
        if not same_fingerprint(shown, heard):
            raise ConfigError(f"expected the fingerprint {shown}, got {heard}: {otherwise}")
    elif not yes:
        typer.confirm(question, abort=True)
