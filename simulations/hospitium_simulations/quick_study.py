"""A study over a few numbers, over in seconds: for benchmarks and tests of the deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from hospitium_simulations.local_federation import Hospital

RECORDS = 60
STUDY = """\
format = 1
rounds = {rounds}
[study]
id = "{name}"
title = "Which of two numbers is larger"
[task]
kind = "tabular_classification"
classes = ["low", "high"]
[data]
columns = [{{ name = "a", low = -5, high = 5 }}, {{ name = "b", low = -5, high = 5 }}]
[model]
name = "mlp"
hidden = {hidden}
[training]
local_steps = 1
batch_size = 16
learning_rate = 0.001
[privacy]
{privacy}
[cohort]
minimum_sites = 3
maximum_sites = 8
ring_bits = 16
deadline_s = {deadline_s}
exchange_s = 60
"""
OPEN = 'mode = "none"'
PRIVATE = 'mode = "dp"\nepsilon = 8.0'


def write_quick_study(
    directory: Path, name: str, *, hidden: str = "[8]", rounds: int = 3, privacy: str = OPEN,
    deadline_s: float = 120,
) -> Path:  # fmt: skip
    """Write ``NAME.toml`` and return it."""
    file = directory / f"{name}.toml"
    text = STUDY.format(
        name=name, hidden=hidden, rounds=rounds, privacy=privacy, deadline_s=deadline_s
    )
    file.write_text(text, encoding="utf-8")
    return file


def prepare_for_quick_studies(hospital: Hospital) -> None:
    """Let a hospital train without privacy too, and give it synthetic records in ``data``."""
    policy = hospital.home / "policy.toml"
    rules = policy.read_text(encoding="utf-8")
    policy.write_text(
        rules.replace("without_privacy = false", "without_privacy = true"), encoding="utf-8"
    )
    data = hospital.home / "data"
    data.mkdir()
    generator = np.random.default_rng(len(hospital.name))
    values = generator.normal(size=(RECORDS, 2)).clip(-4, 4)
    rows = [
        f"p{at},{a:.3f},{b:.3f},{'high' if a > b else 'low'}" for at, (a, b) in enumerate(values)
    ]
    (data / "rows.csv").write_text("patient,a,b,label\n" + "\n".join(rows) + "\n", "utf-8")
    (data / "dataset.toml").write_text(
        'kind = "table"\nsynthetic = true\nfile = "rows.csv"\n', encoding="utf-8"
    )
