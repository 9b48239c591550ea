"""Synthetic intensive-care stays: vital signs and laboratory values over two days.

No patient stands behind any of them. A hidden severity drifts through the stay; the worse it is,
the faster the heart, the lower the pressure, the higher lactate and creatinine. Sicker patients are
measured more often, and hospitals differ in case mix and in their habits of measuring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from pathlib import Path

HOURS = 48


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A variable: usual value, spread between patients, pull of severity, measurements per day."""

    name: str
    usual: float
    spread: float
    pull: float
    per_day: float


SIGNALS = (
    Signal(name="HR", usual=84, spread=9, pull=13, per_day=14),
    Signal(name="SysABP", usual=122, spread=11, pull=-13, per_day=14),
    Signal(name="RespRate", usual=18, spread=2.5, pull=3.2, per_day=10),
    Signal(name="Temp", usual=37, spread=0.4, pull=0.35, per_day=6),
    Signal(name="GCS", usual=13.6, spread=1.0, pull=-2.0, per_day=5),
    Signal(name="Lactate", usual=1.6, spread=0.5, pull=1.1, per_day=1.5),
    Signal(name="Creatinine", usual=1.0, spread=0.3, pull=0.5, per_day=1),
)


def write_stays(directory: Path, *, sites: int, patients_per_site: int, seed: int) -> None:
    """Write events in long form, a table of labels and ``dataset.toml``, marked as synthetic."""
    generator = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    events, stays = [], []
    for site in range(1, sites + 1):
        sickness, diligence = generator.normal(0, 0.35), generator.uniform(0.6, 1.3)
        for number in range(patients_per_site):
            patient = f"SYNTHETIC-{site}-{number:05d}"
            age = float(np.clip(generator.normal(64, 15), 18, 95))
            for stay in range(1 + (generator.random() < 0.15)):  # some come back
                record = f"{patient}-{stay}"
                severity = sickness + generator.normal(0, 0.8) + 0.015 * (age - 64)
                drift = generator.normal(0, 0.5)
                events += _events(generator, record, severity, drift, diligence)
                risk = 1 / (1 + np.exp(-(2.2 * (severity + 0.7 * drift) - 1.6)))
                died = int(generator.random() < risk)
                stays.append((record, patient, round(age, 1), died, f"hospital-{site}"))
    pd.DataFrame(events, columns=["stay", "time", "variable", "value"]).to_csv(
        directory / "events.csv", index=False
    )
    pd.DataFrame(stays, columns=["stay", "patient", "Age", "label", "site"]).to_csv(
        directory / "labels.csv", index=False
    )
    (directory / "dataset.toml").write_text(
        "# SYNTHETIC stays, made by hospitium_simulations; no patient stands behind them.\n"
        'kind = "long"\nsynthetic = true\nevents = "events.csv"\nrecord_column = "stay"\n'
        'site_column = "site"\n',
        encoding="utf-8",
    )


def _events(
    generator: np.random.Generator, record: str, severity: float, drift: float, diligence: float
) -> list[tuple[str, float, str, float]]:
    found = []
    for signal in SIGNALS:
        often = signal.per_day * diligence * (1 + 0.3 * max(severity, 0)) * HOURS / 24
        own = generator.normal(0, signal.spread * 0.6)
        for hour in np.sort(generator.uniform(0, HOURS, generator.poisson(often))):
            now = severity + drift * (hour / HOURS - 0.5) * 2
            value = signal.usual + own + signal.pull * now
            value += generator.normal(0, signal.spread * 0.7)
            found.append((record, round(float(hour), 2), signal.name, round(float(value), 2)))
    return found
