"""`hospitium demo`: a coordinator and three hospitals as separate processes, keys to report."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hospitium_client.settings import SiteHome
from hospitium_client.studies import all_studies
from hospitium_common.errors import HospitiumError
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
ARRIVAL_S = 60.0


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
        data = federation.directory / "data" / hospital.name / kind
        if not data.exists():
            write(data, sites=1, patients_per_site=patients, seed=study.study.seed + number)
    report = federation.home / "studies" / study.study.id / "report.html"
    if not report.exists():
        federation.run("study", "submit", file, "--home", federation.home)
        for hospital in federation.hospitals.values():
            _wait_for(SiteHome(hospital.home), study.digest)
            data = federation.directory / "data" / hospital.name / kind
            federation.run(
                "site", "approve", study.study.id, "--data", data, "--home", hospital.home
            )
        federation.show("study", "watch", study.study.id, "--home", federation.home)
        federation.run("study", "report", study.study.id, "--home", federation.home)
    return report


def _wait_for(home: SiteHome, digest: bytes) -> None:
    """Wait until the coordinator's offer has reached a hospital: people approve what they saw."""
    until = time.monotonic() + ARRIVAL_S
    while not any(one.study.digest == digest for one in all_studies(home.studies)):
        if time.monotonic() > until:
            raise HospitiumError(
                f"{home.path}: expected the study to arrive within {ARRIVAL_S:.0f} s, it did not; "
                f"the log beside it says why"
            )
        time.sleep(0.1)
