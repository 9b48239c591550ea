"""`hospitium demo`: a coordinator and three hospitals as separate processes, keys to report."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hospitium_common.study import load_study
from hospitium_common.study.explain import promise
from hospitium_simulations.local_federation import LocalFederation
from hospitium_simulations.synthetic_ehr import write_stays
from hospitium_simulations.synthetic_imaging import write_films

if TYPE_CHECKING:
    from collections.abc import Callable

TITLES = ("St. Anna", "Riverside Hospital", "Kantonsspital Nord")
STUDIES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("films.toml", "films", write_films),
    ("stays.toml", "stays", write_stays),
)


def demo(
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    patients: Annotated[int, typer.Option(help="Synthetic patients per hospital.")] = 400,
) -> None:
    """Run a whole federation on this machine: a coordinator, three hospitals, two studies.

    Enrols the hospitals, starts every process, and trains a CNN and an LSTM over TLS, private and
    masked. Every command is shown as it is run: these are the ones that you would type.
    """
    directory, console = runs / "demo", Console(highlight=False)
    federation = LocalFederation(
        directory=directory,
        titles=TITLES,
        say=lambda line: console.print(f"[dim]$[/dim] {line}", soft_wrap=True),
    )
    console.rule("[bold]Enrolment: one file from each hospital, one back")
    federation.found()
    console.print("(Between people, a fingerprint is compared by telephone; --yes leaves it out.)")
    with federation:
        console.rule("[bold]A coordinator and three hospitals start")
        federation.serve()
        for name in federation.hospitals:
            federation.open(name)
        reports = [_study(federation, *study, patients, console) for study in STUDIES]
    for report in reports:
        console.print(f"Report: [bold]{report}", soft_wrap=True)
    console.print("Synthetic data: no patient stands behind any record.")


def _study(
    federation: LocalFederation,
    file: str,
    kind: str,
    write: Callable[..., None],
    patients: int,
    console: Console,
) -> Path:
    """Submit one study, let every hospital approve it, watch it to its end; return the report."""
    own = federation.directory / file
    with ExitStack() as packed:
        scenario = files("hospitium_simulations") / "scenarios" / file
        shutil.copyfile(packed.enter_context(as_file(scenario)), own)
    study = load_study(own)
    console.rule(f"[bold]{study.study.title}")
    console.print(promise(study), style="italic")
    for number, hospital in enumerate(federation.hospitals.values(), start=1):
        if not (hospital.home / kind).exists():
            write(hospital.home / kind, sites=1, patients_per_site=patients,
                  seed=study.study.seed + number)  # fmt: skip
    report = federation.home / "studies" / study.study.id / "report.html"
    if not report.exists():
        federation.begin(own, dict.fromkeys(federation.hospitals, kind))
        federation.show("study", "watch", study.study.id, "--home", federation.home)
        federation.run("study", "report", study.study.id, "--home", federation.home)
    return report
