"""`hospitium site`: everything a hospital does, and what its own books say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hospitium_client import approval_cli, enrolment_cli, inclusion_cli, running_cli
from hospitium_client.enrolment_cli import HERE, Home
from hospitium_client.protection.ledger import Ledger
from hospitium_client.settings import SiteHome
from hospitium_common.errors import ConfigError

app = typer.Typer(help="A hospital: its keys, its decisions, its processes.", no_args_is_help=True)
app.add_typer(enrolment_cli.app)
app.add_typer(approval_cli.app)
app.add_typer(running_cli.app)
app.add_typer(inclusion_cli.app)


@app.command("ledger")
def show_ledger(
    file: Annotated[
        Path | None, typer.Argument(help="A ledger.sqlite; else the one in this hospital's folder.")
    ] = None,
    home: Home = HERE,
    delta: Annotated[float, typer.Option(help="At which delta to state epsilon.")] = 1e-5,
) -> None:
    """Check the chain of a ledger and show what was spent; nothing is changed."""
    from hospitium_client.training.accounting import epsilon  # torch takes seconds to load

    file = file or SiteHome(home).ledger
    if not file.exists():
        raise ConfigError(
            f"{file}: expected a ledger, got nothing there; nothing was trained here yet, or the "
            "hospital's folder is elsewhere: --home"
        )
    ledger = Ledger(file)
    spends = ledger.spends()
    ledger.close()
    table = Table(title=f"{file}: {len(spends)} entries, chain intact", title_justify="left")
    for column in ("study", "round", "what", "unit", "rate", "noise", "steps"):
        table.add_column(column)
    for one in spends:
        event = one.event
        numbers = (
            ("", "", "", "")
            if event is None
            else (event.unit, f"{event.sampling_rate:.4f}", f"{event.noise_multiplier:.3f}",
                  str(event.steps))
        )  # fmt: skip
        table.add_row(one.study.hex()[:8], str(one.round), one.kind, *numbers)
    Console().print(table)
    events = [one.event for one in spends if one.event is not None]
    Console().print(f"All together: epsilon {epsilon(events, delta):.3f} at delta {delta:g}.")
