"""`hospitium study submit` and its companions: the part of the group that needs a coordinator.

Commands write down what a person wants and read how a study stands; the server does the work. They
need no secret of the server but the key that signs studies, and work while it is down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hospitium_common.errors import ConfigError, HospitiumError
from hospitium_server.enrolment import load_roster
from hospitium_server.enrolment_cli import HERE, Home
from hospitium_server.keys import load_key
from hospitium_server.locking import is_served
from hospitium_server.nodes import read_nodes
from hospitium_server.settings import CoordinatorHome
from hospitium_server.studies import ENDED, State, StudyFolder, every, find
from hospitium_server.studies import submit as submit_study
from hospitium_server.watch import View, clock, lines, render, view_of
from hospitium_server.watch import watch as watch_study

StudyId = Annotated[str, typer.Argument(help="The study's id; `hospitium study list` shows them.")]


def register(study: typer.Typer) -> None:
    """Add the coordinator's commands to `hospitium study`."""
    for command in (submit, list_studies, status, watch, stop, resume, report):
        study.command(command.__name__.removesuffix("_studies"))(command)


def submit(
    file: Annotated[Path, typer.Argument(help="The study file.")],
    home: Home = HERE,
) -> None:
    """Check a study, sign it, and offer it to every hospital; it runs once enough approve it."""
    folder = CoordinatorHome(home)
    made = submit_study(_studies(folder), file, load_key(folder.coordinator_key))
    say = Console(soft_wrap=True, highlight=False)
    least = made.study().cohort.minimum_sites
    say.print(f"Submitted {made.id}. It runs as soon as {least} hospitals approved it.")
    _say_if_down(folder, say)
    say.print(f"Next: `hospitium study watch {made.id}`.")


def list_studies(home: Home = HERE) -> None:
    """List every study, how far it is, and how it stands."""
    folder = CoordinatorHome(home)
    table = Table()
    for column in ("study", "state", "since", "round", "why"):
        table.add_column(column)
    for one in every(_studies(folder)):
        seen = one.status()
        since = clock(seen.since) if seen.since else ""
        rounds = f"{seen.round} of {one.study().rounds}"
        table.add_row(one.id, str(seen.state), since, rounds, escape(seen.reason))
    Console().print(table)


def status(study: StudyId, home: Home = HERE) -> None:
    """Show once how a study stands, and where every site is."""
    look = _look(CoordinatorHome(home), study)
    view, console = look(), Console()
    if console.is_terminal:
        console.print(render(view))
    else:
        for line in lines(view):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def watch(study: StudyId, home: Home = HERE) -> None:
    """Watch a study until it ends: rounds, figures, which site is where and why one is missing.

    Leaving with Ctrl-C does not touch the study.
    """
    folder = CoordinatorHome(home)
    try:
        ended = watch_study(_look(folder, study), Console())
    except KeyboardInterrupt:
        Console().print("No longer watching; the study goes on.")
        return
    if ended.state is State.FAILED:
        raise HospitiumError(
            f"study {study} stopped itself: {ended.reason}. `hospitium study resume {study}` "
            "goes on from its last round"
        )


def stop(study: StudyId, home: Home = HERE) -> None:
    """Stop a study at its next safe point; everything finished is kept."""
    folder = CoordinatorHome(home)
    found = find(_studies(folder), study)
    if found.status().state in ENDED and not found.is_wanted:
        raise ConfigError(f"{study}: expected a study that runs, got one that has ended")
    found.give_order(run=False)
    say = Console(soft_wrap=True)
    say.print(f"{study} stops at its next safe point; `hospitium study resume {study}` goes on.")
    _say_if_down(folder, say)


def resume(study: StudyId, home: Home = HERE) -> None:
    """Let a study go on from its last finished round, with the privacy that is spent already."""
    folder = CoordinatorHome(home)
    found = find(_studies(folder), study)
    state = found.status().state
    if state is State.FINISHED:
        raise ConfigError(f"{study}: expected a study with rounds to come, got a finished one")
    if state not in ENDED and found.is_wanted:
        raise ConfigError(f"{study}: expected a study that was stopped, got one that is {state}")
    found.give_order(run=True)
    say = Console(soft_wrap=True)
    say.print(f"{study} goes on. Next: `hospitium study watch {study}`.")
    _say_if_down(folder, say)


def report(study: StudyId, home: Home = HERE) -> None:
    """Write a finished study's report and its best model again, without asking any site."""
    folder = CoordinatorHome(home)
    found = find(_studies(folder), study)
    if found.status().state is not State.FINISHED:
        raise ConfigError(
            f"{study}: expected a finished study, got one that is {found.status().state}; "
            f"`hospitium study watch {study}` shows how far it is"
        )
    from hospitium_server import conclusion  # its pictures are slow to load, and only needed here

    names = {member.index: member.title for member in load_roster(folder).members}
    page = conclusion.write_again(found, names)
    say = Console(soft_wrap=True, highlight=False)
    say.print(f"Report: {page}")
    say.print(f"Best model: {found.path / 'model.safetensors'}")


def _studies(home: CoordinatorHome) -> Path:
    return home.resolve(home.settings().storage.studies)


def _look(home: CoordinatorHome, study: str) -> _Look:
    settings = home.settings()
    return _Look(home, find(_studies(home), study), home.resolve(settings.storage.superlink))


class _Look:
    """Looks at one study, again and again."""

    def __init__(self, home: CoordinatorHome, folder: StudyFolder, superlink: Path) -> None:
        self._home, self._folder, self._superlink = home, folder, superlink

    def __call__(self) -> View:
        nodes = read_nodes(self._superlink)
        return view_of(self._folder, nodes, is_served=is_served(self._home))


def _say_if_down(home: CoordinatorHome, say: Console) -> None:
    if not is_served(home):
        say.print(
            "No coordinator is running now; this is done when you start "
            "`hospitium coordinator serve`.",
            style="yellow",
        )
