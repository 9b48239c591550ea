"""`hospitium study submit` and its companions: the part of the group that needs a coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def register(study: typer.Typer) -> None:
    """Add the coordinator's commands to `hospitium study`."""
