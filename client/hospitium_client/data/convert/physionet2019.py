"""PhysioNet/CinC Challenge 2019 (Reyna et al. 2020): sepsis in two hospital systems.

The published label turns 1 six hours before onset, and septic records end soon after: their length
gives the answer away. Here the model sees the first ``WINDOW`` hours of every stay that is longer,
and predicts whether the label turns 1 afterwards; stays where it has turned already are left out.

Two hospitals are too few for secure aggregation (each would learn the other's update), so each
hospital takes part as two sites, its patients divided by number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hospitium_client.data.convert.physionet2012 import variables_toml
from hospitium_client.data.convert.writing import demand, write_mapping, write_study
from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = 12
STATICS = ("Age", "Gender", "HospAdmTime")
VARIABLES = (
    ("HR", 20, 250, "1/min", False), ("O2Sat", 40, 100, "%", False),
    ("Temp", 28, 43, "degC", False), ("SBP", 30, 280, "mmHg", False),
    ("MAP", 20, 250, "mmHg", False), ("DBP", 10, 200, "mmHg", False),
    ("Resp", 2, 90, "1/min", False), ("BaseExcess", -35, 60, "mmol/L", False),
    ("HCO3", 4, 60, "mmol/L", False), ("FiO2", 0.2, 1, "", False),
    ("pH", 6.6, 7.9, "", False), ("PaCO2", 8, 130, "mmHg", False),
    ("SaO2", 20, 100, "%", False), ("AST", 2, 30000, "U/L", True),
    ("BUN", 1, 300, "mg/dL", True), ("Alkalinephos", 5, 4000, "U/L", True),
    ("Calcium", 1, 30, "mg/dL", False), ("Chloride", 25, 160, "mmol/L", False),
    ("Creatinine", 0.1, 50, "mg/dL", True), ("Glucose", 10, 1200, "mg/dL", True),
    ("Lactate", 0.2, 32, "mmol/L", True), ("Magnesium", 0.2, 10, "mmol/L", False),
    ("Phosphate", 0.2, 20, "mg/dL", False), ("Potassium", 1, 30, "mmol/L", False),
    ("Bilirubin_total", 0.1, 60, "mg/dL", True), ("Hct", 5, 75, "%", False),
    ("Hgb", 2, 35, "g/dL", False), ("PTT", 10, 260, "s", True),
    ("WBC", 0.1, 500, "1000/uL", True), ("Platelets", 1, 2500, "1000/uL", True),
)  # fmt: skip
STUDY = """\
# PhysioNet 2019: will sepsis begin after the first 12 hours? Two real hospitals, two sites each.
format = 1
rounds = 15

[study]
id = "sepsis"
title = "Sepsis after the first 12 hours in intensive care"
seed = 1

[task]
kind = "ehr_sequence_classification"
classes = ["no sepsis", "sepsis"]

[data]
window_hours = 12
step_hours = 1
variables = [
{variables}
]
statics = [
  {{ name = "Age", low = 14, high = 110, unit = "years" }},
  {{ name = "Gender", low = 0, high = 1 }},
  {{ name = "HospAdmTime", low = -1000, high = 24, unit = "h" }},
]

[model]
name = "lstm"
hidden = 64
pooling = "last"
dropout = 0.3

[training]
local_epochs = 1
batch_size = 64
optimizer = "adam"
learning_rate = 0.002
schedule = "cosine"

[privacy]
mode = "none"

[cohort]
minimum_sites = 3
maximum_sites = 4
ring_bits = 24

[strategy]
name = "fedavg"
"""


def convert(source: Path, target: Path) -> None:
    """Turn hospitals A and B (``hospital_A.csv.gz`` or folders of ``.psv``) into a wide table."""
    target.mkdir(parents=True, exist_ok=True)
    rows, labels = [], []
    for hospital in ("A", "B"):
        table = _rows(source, hospital)
        table["hour"] = table.groupby("patient").cumcount()
        turned = table[table["SepsisLabel"] == 1].groupby("patient")["hour"].min()
        length = table.groupby("patient").size()
        first_turn = turned.reindex(length.index)
        usable = length.index[(length > WINDOW) & ~(first_turn < WINDOW)]
        table = table[table["patient"].isin(usable) & (table["hour"] < WINDOW)]
        stays = table.drop_duplicates("patient").set_index("patient")[list(STATICS)]
        stays["label"] = first_turn.reindex(stays.index).notna().astype(int)
        half = np.arange(len(stays)) % 2 + 1
        stays["site"] = [f"{hospital}{number}" for number in half]
        labels.append(stays.reset_index())
        rows.append(table[["patient", "hour", *(name for name, *_ in VARIABLES)]])
    pd.concat(rows, ignore_index=True).to_parquet(target / "events.parquet", index=False)
    pd.concat(labels, ignore_index=True).to_csv(target / "labels.csv", index=False)
    write_mapping(
        target,
        'kind = "wide"\nevents = "events.parquet"\ntime_column = "hour"\nsite_column = "site"\n',
    )
    write_study(target, STUDY.format(variables=variables_toml(VARIABLES)))


def _rows(source: Path, hospital: str) -> pd.DataFrame:
    table = source / f"hospital_{hospital}.csv.gz"
    if table.exists():
        return pd.read_csv(table)
    folder = demand(
        source / f"training_set{hospital}",
        f"hospital_{hospital}.csv.gz or a folder training_set{hospital} of .psv files",
    )
    parts = [
        pd.read_csv(path, sep="|").assign(patient=path.stem)
        for path in sorted(folder.glob("*.psv"))
    ]
    if not parts:
        raise DataRejected(f"{folder}: expected .psv files, got none")
    return pd.concat(parts, ignore_index=True)
