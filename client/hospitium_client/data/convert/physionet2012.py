"""PhysioNet/CinC Challenge 2012 (Silva et al. 2012): mortality from the first 48 hours in the ICU.

All patients were in one hospital; the four types of unit stand for sites. Set a is for training,
set b for testing, as published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hospitium_client.data.convert.writing import demand, write_mapping, write_study
from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from pathlib import Path

UNITS = {1: "coronary", 2: "cardiac-surgery", 3: "medical", 4: "surgical"}
SPLITS = {"a": "train", "b": "test"}
STATICS = ("Age", "Gender", "Height")
# name, low, high, unit, whether values spread over orders of magnitude
VARIABLES = (
    ("HR", 20, 250, "1/min", False), ("SysABP", 30, 260, "mmHg", False),
    ("DiasABP", 10, 180, "mmHg", False), ("MAP", 20, 200, "mmHg", False),
    ("NISysABP", 30, 260, "mmHg", False), ("NIDiasABP", 10, 180, "mmHg", False),
    ("NIMAP", 20, 200, "mmHg", False), ("RespRate", 3, 80, "1/min", False),
    ("Temp", 28, 43, "degC", False), ("GCS", 3, 15, "points", False),
    ("SaO2", 50, 100, "%", False), ("FiO2", 0.2, 1, "", False),
    ("MechVent", 0, 1, "", False), ("Urine", 0, 2500, "mL", False),
    ("Weight", 25, 300, "kg", False), ("pH", 6.6, 7.9, "", False),
    ("PaCO2", 8, 130, "mmHg", False), ("PaO2", 20, 600, "mmHg", True),
    ("HCO3", 4, 60, "mmol/L", False), ("Na", 95, 185, "mmol/L", False),
    ("K", 1.5, 12, "mmol/L", False), ("Mg", 0.5, 10, "mmol/L", False),
    ("Glucose", 10, 1200, "mg/dL", True), ("BUN", 1, 220, "mg/dL", True),
    ("Creatinine", 0.1, 25, "mg/dL", True), ("WBC", 0.1, 200, "1000/uL", True),
    ("Platelets", 5, 1100, "1000/uL", True), ("HCT", 8, 65, "%", False),
    ("Lactate", 0.2, 32, "mmol/L", True), ("Bilirubin", 0.1, 60, "mg/dL", True),
    ("ALP", 8, 3000, "U/L", True), ("ALT", 1, 20000, "U/L", True),
    ("AST", 2, 30000, "U/L", True), ("Albumin", 0.8, 6, "g/dL", False),
    ("TroponinI", 0.1, 60, "ug/L", True), ("TroponinT", 0.005, 30, "ug/L", True),
    ("Cholesterol", 20, 400, "mg/dL", False),
)  # fmt: skip
STUDY = """\
# PhysioNet 2012: in-hospital mortality; the four types of intensive care unit stand for sites.
format = 1
rounds = 20

[study]
id = "icu-mortality"
title = "In-hospital mortality from the first 48 hours in intensive care"
seed = 1

[task]
kind = "ehr_sequence_classification"
classes = ["survived", "died"]

[data]
window_hours = 48
step_hours = 1
variables = [
{variables}
]
statics = [
  {{ name = "Age", low = 15, high = 120, unit = "years" }},
  {{ name = "Gender", low = 0, high = 1 }},
  {{ name = "Height", low = 120, high = 230, unit = "cm" }},
]

[model]
name = "lstm"
hidden = 64
pooling = "mean"
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
    """Turn sets a and b (``set-a.npz`` or a folder of text files) into events and labels."""
    target.mkdir(parents=True, exist_ok=True)
    events, labels = [], []
    for part, split in SPLITS.items():
        table = _events(source, part)
        outcomes_path = demand(source / f"Outcomes-{part}.txt", "the outcomes of the set")
        outcomes = pd.read_csv(outcomes_path).set_index("RecordID")["In-hospital_death"]
        first = table[table["minute"] == 0].drop_duplicates(["record", "variable"])
        wide = first.pivot_table(index="record", columns="variable", values="value")
        stays = wide.reindex(columns=[*STATICS, "ICUType"])
        stays["label"] = outcomes.reindex(stays.index)
        if stays["label"].isna().any():
            raise DataRejected(f"{outcomes_path}: expected an outcome for every record of the set")
        stays["site"] = stays.pop("ICUType").map(UNITS)
        stays["split"] = split
        labels.append(stays.reset_index().rename(columns={"record": "patient"}))
        names = [name for name, *_ in VARIABLES]
        events.append(table[table["variable"].isin(names)])
    joined = pd.concat(events, ignore_index=True).rename(columns={"record": "patient"})
    joined["patient"] = joined["patient"].astype(str)
    joined.to_parquet(target / "events.parquet", index=False)
    people = pd.concat(labels, ignore_index=True)
    people["label"] = people["label"].astype(int)
    people.to_csv(target / "labels.csv", index=False)
    write_mapping(
        target,
        'kind = "long"\nevents = "events.parquet"\ntime_column = "minute"\n'
        'time_unit = "minutes"\nsite_column = "site"\nsplit_column = "split"\n',
    )
    write_study(target, STUDY.format(variables=variables_toml(VARIABLES)))


def variables_toml(variables: tuple[tuple[str, float, float, str, bool], ...]) -> str:
    """Return one TOML table per variable."""
    lines = []
    for name, low, high, unit, log in variables:
        scale = ', scale = "log"' if log else ""
        lines.append(
            f'  {{ name = "{name}", low = {low}, high = {high}, unit = "{unit}"{scale} }},'
        )
    return "\n".join(lines)


def _events(source: Path, part: str) -> pd.DataFrame:
    """Return ``record, minute, variable, value`` of one set."""
    archive = source / f"set-{part}.npz"
    if archive.exists():
        with np.load(archive, allow_pickle=False) as data:
            return pd.DataFrame(
                {
                    "record": data["RecordID"].astype(np.int64),
                    "minute": data["minute"].astype(np.float64),
                    "variable": data["parameters"][data["parameter"]].astype(str),
                    "value": data["value"].astype(np.float64),
                }
            )
    folder = demand(source / f"set-{part}", f"set-{part}.npz or a folder set-{part} of text files")
    parts = []
    for path in sorted(folder.glob("*.txt")):
        table = pd.read_csv(path)
        hours = table["Time"].str.split(":", expand=True).astype(int)
        table["minute"] = (hours[0] * 60 + hours[1]).astype(np.float64)
        table["record"] = int(path.stem)
        parts.append(table.rename(columns={"Parameter": "variable", "Value": "value"}))
    if not parts:
        raise DataRejected(f"{folder}: expected text files, got none")
    return pd.concat(parts, ignore_index=True)[["record", "minute", "variable", "value"]]
