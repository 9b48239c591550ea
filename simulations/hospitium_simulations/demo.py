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
    reports = [_report(federation, file) for file, _, _ in STUDIES]
    if not all(report.exists() for report in reports):
        console.rule("[bold]Enrolment: one file from each hospital, one back")
        federation.found()
        console.print("(People compare a fingerprint by telephone here; --yes leaves it out.)")
        with federation:
            console.rule("[bold]A coordinator and three hospitals start")
            federation.serve()
            for name in federation.hospitals:
                federation.open(name)
            for study in STUDIES:
                _run_study(federation, *study, patients, console)
    for report in reports:
        console.print(f"Report: [bold]{report}", soft_wrap=True)
    console.print("Synthetic data: no patient stands behind any record.")


def _report(federation: LocalFederation, file: str) -> Path:
    return federation.home / "studies" / f"synthetic-{Path(file).stem}" / "report.html"


def _run_study(
    federation: LocalFederation,
    file: str,
    kind: str,
    write: Callable[..., None],
    patients: int,
    console: Console,
) -> None:
    """Submit one study, let every hospital approve it, and watch it to its end."""
    if _report(federation, file).exists():
        return
    own = federation.directory / file
    with ExitStack() as packed:
        scenario = files("hospitium_simulations") / "scenarios" / file
        shutil.copyfile(packed.enter_context(as_file(scenario)), own)
    study = load_study(own)
    console.rule(f"[bold]{study.study.title}")
    console.print(promise(study), style="italic")
    for number, hospital in enumerate(federation.hospitals.values(), start=1):
        if not (hospital.home / kind / "dataset.toml").exists():
            write(hospital.home / kind, sites=1, patients_per_site=patients,
                  seed=study.study.seed + number)  # fmt: skip
    federation.begin(own, dict.fromkeys(federation.hospitals, kind))
    federation.show("study", "watch", study.study.id, "--home", federation.home)
    federation.run("study", "report", study.study.id, "--home", federation.home)
