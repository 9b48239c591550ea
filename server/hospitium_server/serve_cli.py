"""`hospitium coordinator serve`."""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.console import Console

from hospitium_server.enrolment import load_roster
from hospitium_server.enrolment_cli import HERE, Home
from hospitium_server.locking import only_server
from hospitium_server.settings import CoordinatorHome

app = typer.Typer()


@app.command()
def serve(
    home: Home = HERE,
    wait_hours: Annotated[
        float, typer.Option(help="How long a study waits for enough hospitals before it stops.")
    ] = 168.0,
) -> None:
    """Run the coordinator: let enrolled hospitals in, and run every study that was submitted.

    Hospitals dial the one public port (TLS 1.3); everything else listens on this machine only.
    Ctrl-C ends it at the next safe point, and the next start goes on from there.
    """
    from hospitium_server.service import Service  # Flower is slow to load, and only needed here

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    for noisy in ("httpx", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    folder = CoordinatorHome(home)
    settings, roster = folder.settings(), load_roster(folder)
    say = Console(soft_wrap=True, highlight=False)

    def ready(port: int) -> None:
        say.print(
            f"{settings.name} is ready: hospitals dial {', '.join(settings.network.addresses)} "
            f"(listening on {settings.network.listen}:{port}); "
            f"{sum(not m.revoked for m in roster.members)} hospitals are enrolled."
        )

    with only_server(folder):
        Service(folder, wait_hours * 3600).run(ready)
