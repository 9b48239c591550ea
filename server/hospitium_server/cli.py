"""`hospitium coordinator`: keys, signatures, and what a study's registry holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hospitium_common.errors import ConfigError
from hospitium_common.study import load_study
from hospitium_common.study.signature import sign_study
from hospitium_server import enrolment_cli, serve_cli
from hospitium_server.keys import load_key
from hospitium_server.registry import Registry
from hospitium_server.round_rows import outcome
from hospitium_server.settings import CoordinatorHome

app = typer.Typer(help="Found a federation, enroll hospitals, sign studies.", no_args_is_help=True)

app.add_typer(enrolment_cli.app)
app.add_typer(serve_cli.app)


@app.command()
def sign(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    home: enrolment_cli.Home = enrolment_cli.HERE,
    key: Annotated[
        Path | None, typer.Option(help="The coordinator's key, if not in the folder's keys/.")
    ] = None,
) -> None:
    """Sign a study; hospitals check the signature before they look any further."""
    document = load_study(study)
    path = sign_study(document, study, load_key(key or CoordinatorHome(home).coordinator_key))
    Console().print(f"Wrote {path}. Send both files to the hospitals.")


@app.command()
def models(
    directory: Annotated[Path, typer.Argument(help="A run's coordinator/ directory.")],
) -> None:
    """List a study's model versions, how each does, who made it, and whether it was used."""
    registry = Registry.open_existing(directory)
    history, lineage = registry.history(), registry.lineage()
    registry.close()
    if not history:
        raise ConfigError(f"{directory}: expected at least one model version, got none yet")
    table = Table(title=str(directory), title_justify="left")
    for column in (
        "version", "sites", "validation AUROC", "loss", "update", "SHA-256", "made from",
    ):  # fmt: skip
        table.add_column(column)
    for (made, seen), (number, digest, parent) in zip(history, lineage, strict=True):
        scores = ("", "") if seen is None else (f"{seen.auroc:.3f}", f"{seen.loss:.3f}")
        sites = ", ".join(str(site) for site in made.survivors)
        table.add_row(str(number), sites, *scores, outcome(made), digest[:12], parent[:12])
    Console().print(table)
