"""`hospitium site`: the processes of a hospital, and whether they are well."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hospitium_client.enrolment import PinnedRosters
from hospitium_client.enrolment_cli import HERE, Home, passphrase_of
from hospitium_client.keys import PASSPHRASE_VARIABLE, is_locked, load_node_key
from hospitium_client.settings import SiteHome
from hospitium_client.supervisor import Part, end_with_the_supervisor, supervise
from hospitium_client.trainer_service import TrainerClient, TrainerServer
from hospitium_common.errors import ConfigError, HospitiumError

if TYPE_CHECKING:
    from hospitium_client.preflight import Finding

log = logging.getLogger(__name__)

LOG_BYTES, LOG_FILES = 5 << 20, 10
TRAINER_GRACE_S = 5.0
WELL_S = 60.0

COLOURS = {"good": "green", "look at it": "yellow", "bad": "bold red"}

app = typer.Typer()

Socket = Annotated[
    Path | None,
    typer.Option(
        help="Where node and trainer meet; else run/trainer.sock in the hospital's folder.",
        envvar="HOSPITIUM_SOCKET",
    ),
]


@app.command()
def run(home: Home = HERE) -> None:
    """Run this hospital: trainer and node, each started again if it dies. Ctrl-C ends both.

    For services, `hospitium site trainer` and `hospitium site node` run one of them each, under a
    user of its own; deploy/RUNBOOK.md shows how.
    """
    folder = SiteHome(home)
    _demand_admission(folder)
    _log_to(folder.log / "supervisor.log")
    plain = {key: value for key, value in os.environ.items() if key != PASSPHRASE_VARIABLE}
    secret = dict(plain)
    if is_locked(folder.site_keys):
        secret[PASSPHRASE_VARIABLE] = passphrase_of(folder)().decode()
    supervise(
        [
            Part(
                name="trainer", arguments=["site", "trainer", "--home", str(home)],
                environment=secret,
            ),
            Part(
                name="node", arguments=["site", "node", "--home", str(home)], environment=plain
            ),
        ],
        _stop_on_signals(),
    )  # fmt: skip


@app.command()
def trainer(
    home: Home = HERE,
    socket: Socket = None,
    group: Annotated[
        str | None, typer.Option(help="A group that may open the socket: that of the node's user.")
    ] = None,
) -> None:
    """Run the process that reads the data and trains. It needs no network at all."""
    folder = SiteHome(home)
    _demand_admission(folder)
    _log_to(folder.log / "site.log")
    from hospitium_client.trainer import Trainer  # torch takes seconds to load

    served = Trainer(folder, passphrase_of(folder, may_ask=os.isatty(0)))
    server = TrainerServer(socket or folder.socket, served.answer, group=group)
    stop = _stop_on_signals()
    server.start()
    log.info("the trainer answers on %s", socket or folder.socket)
    stop.wait()
    if server.stop(TRAINER_GRACE_S):
        served.close()
    else:
        log.warning("a training was given up; it starts over when the trainer is back")
    logging.shutdown()
    # A thread that trains cannot be ended, and torch takes seconds to be taken down. All that
    # counts is on disk.
    os._exit(0)


@app.command()
def node(home: Home = HERE, socket: Socket = None) -> None:
    """Run the process that dials the coordinator. It sees sealed bytes only, and needs no data.

    It dials out over TLS to the address in site.toml, and nobody dials in. A proxy is taken from
    HTTPS_PROXY.
    """
    os.environ.update({"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"})
    from hospitium_client.fleet import Fleet
    from hospitium_client.node import Node, Pace, known_node_id

    folder = SiteHome(home)
    settings = folder.settings()
    if not settings.coordinator.address:
        raise _not_admitted(folder)
    _log_to(folder.log / "node.log")
    for noisy in ("flwr", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    state = folder.path / "run"
    fleet = Fleet(
        settings.coordinator.address, _read_authority(folder), load_node_key(folder.node_key),
        known_node_id(state),
    )  # fmt: skip
    pace = Pace(busy_s=settings.polling.busy_s, idle_s=settings.polling.idle_s)
    Node(fleet, socket or folder.socket, state, pace, _stop_on_signals()).run()


@app.command()
def health(
    home: Home = HERE,
    socket: Socket = None,
    of_trainer: Annotated[bool, typer.Option("--trainer", help="Only the trainer.")] = False,
    of_node: Annotated[bool, typer.Option("--node", help="Only the node.")] = False,
) -> None:
    """Say whether trainer and node are well; code 1 if not. For health checks of services."""
    folder, both = SiteHome(home), of_trainer == of_node
    if both or of_trainer:
        client = TrainerClient(socket or folder.socket)
        well = client.is_serving()
        client.close()
        if not well:
            raise HospitiumError(f"{socket or folder.socket}: no trainer answers")
    if both or of_node:
        from hospitium_client.node import ONLINE

        sign = folder.path / "run" / ONLINE
        if not sign.exists() or time.time() - sign.stat().st_mtime > WELL_S:
            raise HospitiumError(
                f"the node has not spoken to the coordinator for {WELL_S:g} s; "
                f"{folder.log / 'node.log'} says why"
            )
    Console().print("well")


@app.command()
def preflight(
    home: Home = HERE,
    of_trainer: Annotated[
        bool, typer.Option("--trainer", help="Only what needs the data and no network.")
    ] = False,
    of_node: Annotated[
        bool, typer.Option("--node", help="Only what needs the network and no data.")
    ] = False,
) -> None:
    """Check clock, line, certificate, roster, disk, data, memory, and do a dry run; change nothing.

    Each approved study is read and rehearsed: one masked round with invented neighbours, in
    memory, and one step of training. Code 1 if something would stop this hospital.
    """
    from hospitium_client.preflight import check_site
    from hospitium_client.preflight_line import check_line

    folder, both, screen = SiteHome(home), of_trainer == of_node, Console()
    folder.settings()
    passphrase = passphrase_of(folder)
    if (both or of_trainer) and is_locked(folder.site_keys):
        passphrase()
    findings: list[Finding] = []
    with screen.status("looking …") as status:

        def note(what: str) -> None:
            status.update(f"{what} …")

        if both or of_node:
            findings += check_line(folder, note)
        if both or of_trainer:
            findings += check_site(folder, passphrase, note)
    table = Table(title=f"Preflight of {home}", title_justify="left")
    for column in ("what", "verdict", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for one in findings:
        style = COLOURS[one.verdict.value]
        verdict = f"[{style}]{one.verdict.value}[/{style}]"
        table.add_row(escape(one.what), verdict, escape(one.found), escape(one.remedy))
    screen.print(table)
    stopping = [one.what for one in findings if one.verdict.value == "bad"]
    if stopping:
        raise HospitiumError(f"not ready: {', '.join(stopping)}")
    screen.print("Ready.")


def _demand_admission(folder: SiteHome) -> None:
    folder.settings()
    if not PinnedRosters(folder).is_admitted:
        raise _not_admitted(folder)


def _not_admitted(folder: SiteHome) -> ConfigError:
    return ConfigError(
        f"{folder.path}: expected an admitted hospital; `hospitium site admit "
        "NAME.admission.json` with the file from the coordinator comes first"
    )


def _read_authority(folder: SiteHome) -> bytes:
    try:
        return folder.ca.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{folder.ca}: expected the coordinator's CA, got: {error.strerror}; "
            "`hospitium site admit` pins it"
        ) from error


def _stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM, Ctrl-C and the supervisor's end set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    end_with_the_supervisor(stop.set)
    return stop


def _log_to(path: Path) -> None:
    """Log to the terminal and to a file that turns over; details of errors to neither."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = os.umask(0o077)
    try:
        file = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES)
    finally:
        os.umask(before)
    root = logging.getLogger()
    line = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    file.setLevel(logging.INFO)
    root.addHandler(file)
    root.setLevel(min(root.level, logging.INFO))
    for handler in root.handlers:
        handler.setFormatter(line)
