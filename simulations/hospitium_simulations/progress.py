"""What a researcher sees while a simulation runs: a bar, and a line for every round."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from types import FrameType
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
        self._interrupted = False
        self._rounds = self._bars.add_task("rounds", total=study.rounds)
        self._steps = self._bars.add_task("local steps", total=None)

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()
        signal.signal(signal.SIGINT, self._before)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Wait for the next local step or finished round: no round is lost while it is unmasked.

        A second Ctrl-C does not wait.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def _stop_if_asked(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    def on_step(self) -> None:
        """Count one local step of one site."""
        self._stop_if_asked()
        self._bars.advance(self._steps)

    def on_round(self, record: RoundRecord, received: Figures) -> None:
        """Print a finished round: how the model did that the sites received in it."""
        self._bars.update(self._rounds, completed=record.round)
        missing = "".join(f"; site {s} {why}" for s, why in record.missing.items())
        unused = f"; not used: {record.rejected}" if record.rejected else ""
        self._console.print(
            f"round {record.round:3d}/{self._study.rounds}  "
            f"sites {len(record.survivors)}/{self._sites}  "
            f"validation AUROC {received.auroc:.3f}  loss {received.loss:.3f}  "
            f"{record.bytes_received / 1e6:.2f} MB  {record.seconds:.1f} s{missing}{unused}",
            highlight=False,
        )
        self._stop_if_asked()
