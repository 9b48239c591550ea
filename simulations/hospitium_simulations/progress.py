"""What a researcher sees while a simulation runs: a bar, and a line for every round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from typing import Self

    from rich.console import Console

    from hospitium_common.study import Study
    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord


class Progress:
    """Shows local steps as they are made, and each round with how its model did."""

    def __init__(self, console: Console, study: Study, sites: int) -> None:
        self._console, self._study, self._sites = console, study, sites
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._rounds = self._bars.add_task("rounds", total=study.rounds)
        self._steps = self._bars.add_task("local steps", total=None)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()

    def on_step(self) -> None:
        """Count one local step of one site."""
        self._bars.advance(self._steps)

    def on_round(self, record: RoundRecord, received: Figures) -> None:
        """Print a finished round: how the model did that the sites received in it."""
        self._bars.update(self._rounds, completed=record.round)
        missing = "".join(f"; site {s} {why}" for s, why in record.missing.items())
        self._console.print(
            f"round {record.round:3d}/{self._study.rounds}  "
            f"sites {len(record.survivors)}/{self._sites}  "
            f"validation AUROC {received.auroc:.3f}  loss {received.loss:.3f}  "
            f"{record.bytes_received / 1e6:.2f} MB  {record.seconds:.1f} s{missing}",
            highlight=False,
        )
