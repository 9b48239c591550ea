"""`hospitium site check-inclusion`: was this hospital's update counted, and told alike to all?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hospitium_client.protection.receipts import (
    Receipt,
    check_previous,
    check_receipt,
    read_receipts,
)
from hospitium_common.archive import RoundArchive
from hospitium_common.errors import ConfigError, PeerProtocolError

if TYPE_CHECKING:
    from hospitium_common.archive import ArchivedStudy

app = typer.Typer()


@app.command("check-inclusion")
def check_inclusion(
    receipts: Annotated[
        Path, typer.Argument(help="This hospital's folder of the study, with receipts/ in it.")
    ],
    rounds: Annotated[
        Path, typer.Argument(help="The coordinator's rounds/, or a copy: transcripts are enough.")
    ],
) -> None:
    """Check this hospital's receipts against the coordinator's transcripts.

    For every masked vector that left this hospital: is it in the sum that was announced, did
    enough hospitals confirm that sum, was the task the one that this hospital got, and does the
    next task name the announced result. Ends with status 1 if anything is broken.
    """
    places = (receipts / "receipts", receipts / "session" / "receipts", receipts)
    home = next((place for place in places if place.is_dir()), receipts)
    archive = RoundArchive(rounds / "rounds" if (rounds / "rounds").is_dir() else rounds)
    found = read_receipts(home)
    if not found:
        raise ConfigError(f"{home}: expected receipts of this hospital, got none")
    archived = archive.study()
    table = Table(title=f"{len(found)} masked vectors left site {found[0].site}",
                  title_justify="left")  # fmt: skip
    for column in ("round", "attempt", "", "what was found"):
        table.add_column(column, overflow="fold")
    broken = 0
    for receipt in found:
        try:
            mark, told = "[green]counted[/]", _look(receipt, archive, archived)
            if told:
                mark = "–"
        except PeerProtocolError as error:
            mark, told = "[bold red]BROKEN[/]", str(error)
            broken += 1
        table.add_row(str(receipt.round), str(receipt.attempt), mark, told)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if broken:
        if not any(archive.has_roster(receipt.roster) for receipt in found):
            console.print("No round ran under a roster of these receipts: is it another study?")
        console.print("[bold red]The coordinator's story does not hold.[/] Keep both folders.")
        raise typer.Exit(1)
    console.print("Every vector that is in a finished round was counted, and told alike to all.")


def _look(receipt: Receipt, archive: RoundArchive, archived: ArchivedStudy) -> str:
    """Return nothing if the vector was counted, or why it is in no sum.

    Raises:
        PeerProtocolError: the transcript does not hold.
    """
    finished = archive.rounds()
    before = [number for number in finished if number < receipt.round]
    check_previous(receipt, archive.transcripts(before[-1]) if before else ())
    if receipt.round not in finished:
        return "the round was not finished; nothing was revealed"
    transcripts = archive.transcripts(receipt.round)
    mine = [one for one in transcripts if one.task.attempt == receipt.attempt]
    if not mine:
        return "this attempt came to nothing; the round was finished by another"
    policy = archived.policy(receipt.round)
    roster = archive.roster(mine[0].roster_digest)
    counted = check_receipt(receipt, mine[0], roster, policy)
    return "" if counted else "counted without this site: its answer was late, or was left out"
