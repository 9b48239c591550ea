"""The one command `hospitium`; its parts come from whatever packages are installed here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

import click
import typer
from rich.console import Console

from hospitium_common.errors import HospitiumError

INTERRUPTED = 130
ORDER = ("study", "site", "data", "coordinator", "audit-round", "simulate", "demo")


def main() -> None:
    """Run `hospitium`; what it refuses on purpose is shown as one line, without a traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s")
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        code = _application(arguments)(args=arguments, prog_name="hospitium", standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except HospitiumError as error:
        if debug:
            raise
        errors.print("error:", style="bold red", end=" ")
        errors.print(str(error), markup=False)
        sys.exit(1)
    except click.ClickException as error:  # a wrong option or argument
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        errors.print("stopped; what was finished is kept")
        sys.exit(INTERRUPTED)


def _application(arguments: list[str]) -> typer.Typer:
    """Build the command; of its parts only the one that is asked for is loaded, which is quick."""
    application = typer.Typer(
        name="hospitium",
        help="Federated learning across hospitals: the model travels, the records stay.\n\n"
        "Add --debug to any command for a traceback instead of a one-line error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @application.callback()
    def hospitium() -> None:
        """Keep a single command under its name: typer would make it the whole program."""

    found = {point.name: point for point in entry_points(group="hospitium.commands")}
    if arguments and arguments[0] in found:
        found = {arguments[0]: found[arguments[0]]}
    for name in sorted(found, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        part = _load(found[name])
        if isinstance(part, typer.Typer):
            for extension in entry_points(group=f"hospitium.{name}"):
                add_to = _load(extension)  # a package that adds commands to another one's group
                if add_to is not None:
                    add_to(part)
            application.add_typer(part, name=name)
        elif part is not None:
            application.command(name)(part)
    return application


def _load(point: EntryPoint) -> typer.Typer | Callable[..., None] | None:
    """Load a group of commands or a single one; what was not installed here is left out."""
    try:
        part: typer.Typer | Callable[..., None] = point.load()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hospitium"):
            raise
        logging.getLogger(__name__).debug("without %s: %s is not installed", point.name, error.name)
        return None
    return part
