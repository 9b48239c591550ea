"""Small federations for tests: real sessions, real rounds, quick to train."""

from __future__ import annotations

import numpy as np

from hospitium_client.data.records import Records
from hospitium_common.study import Study

TABLE = {
    "missing": "mask",
    "columns": [
        {"name": "age", "low": 0, "high": 100},
        {"name": "pressure", "low": 0, "high": 200},
        {"name": "lactate", "low": 0.1, "high": 30, "scale": "log"},
    ],
}


def study_of(**changes: object) -> Study:
    """A tabular study that three to eight hospitals finish in a second."""
    document = {
        "format": 1,
        "rounds": 3,
        "study": {"id": "small-study", "title": "A small study", "seed": 4},
        "task": {"kind": "tabular_classification", "classes": ["well", "ill"]},
        "data": TABLE,
        "model": {"name": "mlp", "hidden": [6]},
        "training": {"local_epochs": 1, "batch_size": 16, "learning_rate": 0.1},
        "privacy": {"mode": "none"},
        "cohort": {"minimum_sites": 3, "maximum_sites": 8, "weight_cap": 1000},
    }
    for key, value in changes.items():
        inner = document.get(key)
        document[key] = {**inner, **value} if isinstance(inner, dict) else value
    return Study.model_validate(document)


def private_study_of(**changes: object) -> Study:
    """The same with differential privacy."""
    return study_of(**{"privacy": {"mode": "dp", "epsilon": 8.0}, **changes})


def hospital(seed: int, patients: int = 60) -> Records:
    """Older patients with low pressure are ill; some values are missing; some come twice."""
    generator = np.random.default_rng(seed)
    age = generator.uniform(20, 95, patients)
    pressure = generator.normal(120 - 5 * (seed % 3), 20, patients)
    lactate = np.exp(generator.normal(0.5, 0.6, patients))
    score = (age - 60) / 15 - (pressure - 115) / 20 + np.log(lactate) - 0.5
    targets = (score + generator.normal(0, 0.7, patients) > 0).astype(np.int64)
    values = np.stack([age, pressure, lactate], 1).clip([0, 0, 0.1], [100, 200, 30])
    values[generator.random(values.shape) < 0.1] = np.nan
    names = np.array([f"patient-{seed}-{number // 2 * 2 + number % 2 * (number % 3 > 0)}"
                      for number in range(patients)])  # fmt: skip
    return Records(
        values=values.astype(np.float32),
        statics=np.zeros((patients, 0), np.float32),
        targets=targets,
        patients=names,
        synthetic=True,
    )


def hospitals(count: int, patients: int = 60) -> dict[str, Records]:
    """Return ``count`` hospitals by name."""
    return {f"hospital-{n}": hospital(n, patients) for n in range(1, count + 1)}


class Notes:
    """A watcher that keeps what it sees, and may stop the run after a round."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rounds: list[int] = []
        self.records = []
        self._stop_after = stop_after

    def on_round(self, record, received) -> None:
        self.rounds.append(record.round)
        self.records.append(record)
        if record.round == self._stop_after:
            raise KeyboardInterrupt
