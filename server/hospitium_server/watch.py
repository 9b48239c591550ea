"""A running study for people to watch: its rounds, and which site is where and why."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hospitium_server.studies import ENDED, NOT_CONNECTED, State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import RenderableType

    from hospitium_server.nodes import NodeStatus
    from hospitium_server.studies import RoundStatus, SiteStatus, Status, StudyFolder

LOOK_S = 0.5
SHOWN_ROUNDS = 12
DAY_S = 24 * 3600
COLOURS = {
    State.RUNNING: "green", State.WAITING: "yellow", State.FINISHED: "bold green",
    State.STOPPED: "yellow", State.FAILED: "bold red", State.SUBMITTED: "cyan",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown of a study: its status, its nodes, and whether a server runs at all."""

    title: str
    rounds: int
    status: Status
    nodes: Mapping[str, NodeStatus]
    is_served: bool


def watch(
    look: Callable[[], View], console: Console, sleep: Callable[[float], None] = time.sleep
) -> Status:
    """Show a study until it ends; on a terminal in place, elsewhere a line for every change."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                view = look()
                live.update(render(view), refresh=True)
                if view.status.state in ENDED:
                    return view.status
                sleep(LOOK_S)
    told: set[str] = set()
    while True:
        view = look()
        for line in lines(view):
            if line not in told:
                told.add(line)
                console.print(line, soft_wrap=True, highlight=False, markup=False)
        if view.status.state in ENDED:
            return view.status
        sleep(LOOK_S)


def render(view: View) -> RenderableType:
    """Return the whole picture: state, sites, latest rounds."""
    status = view.status
    head = Text.assemble(
        (view.title, "bold"), "   ", (str(status.state), COLOURS[status.state]),
        f" since {clock(status.since)}" if status.since else "",
        f"   round {status.round} of {view.rounds}" if status.round else "",
        f"   {status.what}" if status.what else "",
    )  # fmt: skip
    parts: list[RenderableType] = [head]
    if not view.is_served and status.state not in ENDED:
        parts.append(
            Text("no coordinator is running: start it with `hospitium coordinator serve`", "red")
        )
    if status.reason:
        parts.append(Text(status.reason, "yellow"))
    parts += [_sites(view), _rounds(status.rounds[-SHOWN_ROUNDS:])]
    return Group(*parts)


def lines(view: View) -> list[str]:
    """Return the state, every site that is not simply at work, and every round as lines."""
    status = view.status
    state = f"{status.state}" + (f": {status.reason}" if status.reason else "")
    rounds = [
        f"round {one.round} of {view.rounds}: {_figures(one)}, {len(one.sites)} sites, "
        f"{one.seconds:.1f} s{_missing(one, status)}"
        for one in status.rounds
    ]
    return [*rounds, state]


def describe(site: SiteStatus, node: NodeStatus | None, number: int) -> str:
    """Say where a site is and, if it is away, what was last heard of it."""
    if site.what != NOT_CONNECTED and not (node is not None and not node.online):
        return f"{site.what} since {clock(site.since)}"
    if node is None or not node.last_heartbeat:
        heard = "never connected"
    else:
        heard = f"last heartbeat {clock(node.last_heartbeat)}"
    return heard + (f", not in round {number}" if number else "")


def clock(moment: float) -> str:
    """Return a time of today as hours and minutes, an earlier one with its date."""
    local = datetime.fromtimestamp(moment).astimezone()
    return f"{local:%H:%M}" if time.time() - moment < DAY_S else f"{local:%Y-%m-%d %H:%M}"


def _sites(view: View) -> Table:
    table = Table(show_header=True, header_style="bold")
    for column in ("site", "where it is", "last round"):
        table.add_column(column)
    for _, site in sorted(view.status.sites.items()):
        what = describe(site, view.nodes.get(site.name), view.status.round)
        last = "" if site.last_round is None else str(site.last_round)
        table.add_row(escape(site.name), escape(what), last)
    return table


def _rounds(rounds: tuple[RoundStatus, ...]) -> Table:
    table = Table(show_header=True, header_style="bold")
    for column in ("round", "sites", "validation AUROC", "loss", "seconds", "missing"):
        table.add_column(column, justify="left" if column == "missing" else "right")
    for one in rounds:
        reasons = "; ".join(f"site {site}: {why}" for site, why in sorted(one.missing.items()))
        table.add_row(
            str(one.round), str(len(one.sites)), _number(one.auroc), _number(one.loss),
            f"{one.seconds:.1f}", escape(one.rejected or reasons),
        )  # fmt: skip
    return table


def _missing(one: RoundStatus, status: Status) -> str:
    names = {site: known.name for site, known in status.sites.items()}
    return "".join(
        f"; without {names.get(site, f'site {site}')}: {why}"
        for site, why in sorted(one.missing.items())
    )


def _figures(one: RoundStatus) -> str:
    if one.rejected:
        return f"rejected: {one.rejected}"
    return f"validation AUROC {_number(one.auroc)}, loss {_number(one.loss)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def view_of(folder: StudyFolder, nodes: Mapping[str, NodeStatus], *, is_served: bool) -> View:
    """Look at a study now."""
    study = folder.study()
    return View(
        title=study.study.title, rounds=study.rounds, status=folder.status(), nodes=nodes,
        is_served=is_served,
    )  # fmt: skip
