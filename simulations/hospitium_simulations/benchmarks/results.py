"""A benchmark's results: a table for people and a file for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

DIRECTORY = Path("bench-results")


@dataclass(frozen=True)
class Result:
    """One figure; without a target it is shown for orientation only."""

    what: str
    value: float
    unit: str
    target: float | None
    better: Literal["lower", "higher"] = "lower"

    @property
    def met(self) -> bool | None:
        """Whether the target was met."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def publish(name: str, results: list[Result]) -> None:
    """Print a table and write ``bench-results/<name>.json``."""
    table = Table(title=f"bench-{name}", title_justify="left")
    for column in ("what", "value", "target", "met"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for one in results:
        sign = "≤" if one.better == "lower" else "≥"
        target = "" if one.target is None else f"{sign} {one.target:g} {one.unit}"
        met = {None: "", True: "yes", False: "no"}[one.met]
        table.add_row(one.what, f"{one.value:.3g} {one.unit}", target, met)
    Console().print(table)
    DIRECTORY.mkdir(exist_ok=True)
    document = [{**asdict(one), "met": one.met} for one in results]
    text = json.dumps(document, indent=1, ensure_ascii=False)
    (DIRECTORY / f"{name}.json").write_text(text + "\n", encoding="utf-8")
