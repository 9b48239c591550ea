"""eICU demo (Pollard et al. 2018; Johnson et al. 2021): death in hospital, from day one in the ICU.

A record is one stay in an intensive care unit, and many patients have several. The sites are the
regions of the United States, as single hospitals have 10 to 40 stays here. Every fifth hospital of
a region is for testing alone: the model is judged in hospitals that it has never seen.
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

TEST_EVERY = 5
FIRST_DAY = 24 * 60
"""Minutes after admission to the unit."""
OLDEST = 90
"""Ages above 89 are published as "> 89"."""
NO_REGION = "unknown"
NEVER_MEASURED = -1
"""APACHE's mark for a gap."""
SCORED = (
    ("eyes", 1, 4, "points", False), ("motor", 1, 6, "points", False),
    ("verbal", 1, 5, "points", False), ("vent", 0, 1, "", False),
    ("dialysis", 0, 1, "", False), ("urine", 1, 15000, "mL/d", True),
    ("wbc", 0.1, 200, "1000/uL", True), ("temperature", 28, 43, "degC", False),
    ("respiratoryrate", 3, 80, "1/min", False), ("sodium", 95, 185, "mmol/L", False),
    ("heartrate", 20, 250, "1/min", False), ("meanbp", 20, 220, "mmHg", False),
    ("ph", 6.6, 7.9, "", False), ("pao2", 20, 600, "mmHg", True),
    ("pco2", 8, 130, "mmHg", False), ("fio2", 21, 100, "%", False),
    ("hematocrit", 8, 65, "%", False), ("creatinine", 0.1, 25, "mg/dL", True),
    ("albumin", 0.8, 6, "g/dL", False), ("bun", 1, 220, "mg/dL", True),
    ("glucose", 10, 1200, "mg/dL", True), ("bilirubin", 0.1, 60, "mg/dL", True),
)  # fmt: skip
HISTORY = ("metastaticcancer", "immunosuppression", "cirrhosis", "diabetes", "readmit")
SYSTEMS = ("Cardiovascular", "Respiratory", "Neurologic", "Gastrointestinal", "Metabolic/Endocrine")
VARIABLES = (
    ("age", 15, 120, "years", False), ("male", 0, 1, "", False),
    ("lowest_systolic", 20, 260, "mmHg", False), ("mean_systolic", 20, 260, "mmHg", False),
    *SCORED, *((name, 0, 1, "", False) for name in HISTORY), ("operative", 0, 1, "", False),
    *((f"system_{number}", 0, 1, "", False) for number in range(len(SYSTEMS))),
)  # fmt: skip
STUDY = """\
# eICU demo: death in hospital from the first day; regions stand for sites, unseen hospitals test.
format = 1
rounds = 30

[study]
id = "eicu-mortality"
title = "In-hospital mortality from the first day in intensive care, judged in unseen hospitals"
seed = 1

[task]
kind = "tabular_classification"
classes = ["survived", "died"]

[data]
missing = "mask"
columns = [
{variables}
]

[model]
name = "mlp"
hidden = [32]
dropout = 0.3

[training]
local_epochs = 1
batch_size = 64
optimizer = "adam"
learning_rate = 0.003
schedule = "cosine"

[privacy]
mode = "none"

[cohort]
minimum_sites = 4
maximum_sites = 5
ring_bits = 24

[strategy]
name = "fedavg"
"""


def convert(source: Path, target: Path) -> None:
    """Turn the demo's tables into one row per stay with patient, region and split.

    Stays whose outcome is not known or of which nothing was measured on the first day are left
    out, and so are stays of a patient in any hospital but their first: no patient of a training
    hospital is among those of a test hospital.
    """
    stays = _stays(source)
    rows = pd.DataFrame(
        {
            "patient": stays["uniquepid"],
            "stay": stays.index,
            "label": (stays["hospitaldischargestatus"] == "Expired").astype(int),
            "site": stays["region"],
            "split": stays["split"],
            "hospital": stays["hospitalid"],
            "age": stays["age"].replace("> 89", str(OLDEST)),
            "male": stays["gender"].map({"Female": 0, "Male": 1}),
        },
        index=stays.index,
    )
    day = pd.concat(
        [_pressure(source), _scored(source), _history(source), _diagnosis(source)], axis=1
    )
    rows = rows.join(day)[rows.index.isin(day.index)]
    target.mkdir(parents=True, exist_ok=True)
    rows.to_csv(target / "rows.csv", index=False)
    write_mapping(
        target,
        'kind = "table"\nfile = "rows.csv"\nsite_column = "site"\nsplit_column = "split"\n',
    )
    write_study(target, STUDY.format(variables=variables_toml(VARIABLES)))


def _stays(source: Path) -> pd.DataFrame:
    """Return the usable stays with the region and the split of their hospital, by stay number."""
    stays = _read(source, "patient").sort_values("patientunitstayid")
    hospitals = _read(source, "hospital").set_index("hospitalid").sort_index()
    strangers = ~stays["hospitalid"].isin(hospitals.index)
    if strangers.any():
        raise DataRejected(f"{source}: expected every hospital of a stay among the hospitals")
    hospitals["region"] = hospitals["region"].fillna(NO_REGION)
    place = hospitals.groupby("region").cumcount()
    hospitals["split"] = np.where(place % TEST_EVERY == TEST_EVERY - 1, "test", "train")
    stays = stays.join(hospitals[["region", "split"]], on="hospitalid")
    first = stays.groupby("uniquepid")["hospitalid"].transform("first")
    usable = stays["hospitaldischargestatus"].notna() & (stays["hospitalid"] == first)
    return stays[usable].set_index("patientunitstayid")


def _pressure(source: Path) -> pd.DataFrame:
    """Return the lowest and the mean systolic pressure of the first day."""
    table = _read(source, "vitalaperiodic")
    early = table[table["observationoffset"].between(0, FIRST_DAY)]
    plausible = early[early["noninvasivesystolic"].between(20, 260)]
    groups = plausible.groupby("patientunitstayid")["noninvasivesystolic"]
    return pd.DataFrame({"lowest_systolic": groups.min(), "mean_systolic": groups.mean()})


def _scored(source: Path) -> pd.DataFrame:
    """Return the worst values of the first day, as APACHE scores them."""
    table = _read(source, "apacheapsvar").set_index("patientunitstayid")
    return table[[name for name, *_ in SCORED]].replace(NEVER_MEASURED, np.nan)


def _history(source: Path) -> pd.DataFrame:
    table = _read(source, "apachepredvar").set_index("patientunitstayid")
    return table[list(HISTORY)].replace(NEVER_MEASURED, np.nan)


def _diagnosis(source: Path) -> pd.DataFrame:
    """Return why a patient was admitted: after an operation or not, and which organ system."""
    path = _read(source, "admissiondx").set_index("patientunitstayid")["admitdxpath"]
    parts = path[path.str.contains("|Organ System|", regex=False)].str.split("|")
    first = parts[~parts.index.duplicated()]
    system = first.str[3]
    columns = {"operative": (first.str[1] == "Operative Organ Systems").astype(int)}
    columns |= {f"system_{n}": (system == name).astype(int) for n, name in enumerate(SYSTEMS)}
    return pd.DataFrame(columns)


def _read(source: Path, name: str) -> pd.DataFrame:
    for path in (source / f"{name}.csv.gz", source / f"{name}.csv"):
        if path.exists():
            return pd.read_csv(path)
    return pd.read_csv(demand(source / f"{name}.csv.gz", "a table of the eICU demo"))
