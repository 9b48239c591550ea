"""UCI heart disease (Janosi et al. 1988): four hospitals, prepared and split as FLamby does.

FLamby (Ogier du Terrail et al. 2022) drops slope, ca and thal, then rows with gaps, and makes
indicator columns of chest pain type and resting ECG. A third of each hospital is for testing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hospitium_client.data.convert.writing import demand, write_mapping, write_study

if TYPE_CHECKING:
    from pathlib import Path


HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak",
    "slope", "ca", "thal", "num",
)  # fmt: skip
DROPPED = ["slope", "ca", "thal"]
INDICATORS = {"cp": (2, 3, 4), "restecg": (1, 2)}
TRAIN_FRACTION = 0.66
SPLIT_SEED = 43
STUDY = """\
# UCI heart disease: four real hospitals, FLamby's task (logistic regression).
format = 1
rounds = 30

[study]
id = "heart-disease"
title = "Coronary heart disease in four hospitals"
seed = 1

[task]
kind = "tabular_classification"
classes = ["absent", "present"]

[data]
missing = "refuse"
columns = [
  { name = "age", low = 15, high = 120, unit = "years" },
  { name = "sex", low = 0, high = 1 },
  { name = "trestbps", low = 0, high = 300, unit = "mmHg" },
  { name = "chol", low = 0, high = 700, unit = "mg/dl" },
  { name = "fbs", low = 0, high = 1 },
  { name = "thalach", low = 30, high = 250, unit = "1/min" },
  { name = "exang", low = 0, high = 1 },
  { name = "oldpeak", low = -5, high = 10, unit = "mm" },
  { name = "cp_2", low = 0, high = 1 },
  { name = "cp_3", low = 0, high = 1 },
  { name = "cp_4", low = 0, high = 1 },
  { name = "restecg_1", low = 0, high = 1 },
  { name = "restecg_2", low = 0, high = 1 },
]

[model]
name = "mlp"
hidden = []                        # logistic regression

[training]
local_steps = 20
batch_size = 16
optimizer = "sgd"
learning_rate = 0.02

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
    """Turn the four ``processed.*.data`` files into one table with a site and a split column."""
    target.mkdir(parents=True, exist_ok=True)
    tables = [_hospital(source, name) for name in HOSPITALS]
    pd.concat(tables).to_csv(target / "rows.csv", index=False)
    write_mapping(
        target,
        'kind = "table"\nfile = "rows.csv"\nsite_column = "site"\nsplit_column = "split"\n',
    )
    write_study(target, STUDY)


def _hospital(source: Path, name: str) -> pd.DataFrame:
    path = demand(source / f"processed.{name}.data", "a file of UCI's heart disease data")
    table = pd.read_csv(path, header=None, names=list(COLUMNS), na_values="?")
    table = table.drop(columns=DROPPED).dropna()
    label = (table.pop("num") > 0).astype(int)
    for column, values in INDICATORS.items():
        cells = table.pop(column)
        for value in values:
            table[f"{column}_{value}"] = (cells == value).astype(int)
    table.insert(0, "patient", [f"{name}-{number}" for number in range(len(table))])
    table["label"], table["site"] = label, name
    test = _test_rows(label.to_numpy().astype(np.int64))
    table["split"] = np.where(np.isin(np.arange(len(table)), test), "test", "train")
    return table


def _test_rows(
    label: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Draw FLamby's test rows; stratified where every class has more than two members."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(label, minlength=2)
    rows = np.arange(len(label))
    _, test = train_test_split(
        rows, train_size=TRAIN_FRACTION, test_size=1 - TRAIN_FRACTION, shuffle=True,
        random_state=SPLIT_SEED, stratify=label if counts.min() > 2 else None,
    )  # fmt: skip
    return np.asarray(test)
