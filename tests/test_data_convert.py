"""Published data sets become usable data directories, with the published counts."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hospitium_client.data.cli import app
from hospitium_client.data.convert import eicu
from hospitium_client.data.loading import load_records
from hospitium_client.data.split import split
from hospitium_common.errors import DataRejected
from hospitium_common.study import load_study

DATA = Path(os.environ.get("HOSPITIUM_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "medmnist").exists(), reason=f"no real data sets under {DATA}"
)


def converted(kind: str, source: Path, target: Path):
    result = CliRunner().invoke(app, ["convert", kind, str(source), str(target)])
    assert result.exit_code == 0, result.output
    study = load_study(target / "study.toml")
    return load_records(target, study), study


@needs_data
def test_heart_disease_has_flambys_hospitals_and_test_rows(tmp_path):
    records, study = converted("heart-disease", DATA / "heart_disease", tmp_path)
    counts = {
        site: ((records.sites == site) & (records.split == "train")).sum()
        for site in ("cleveland", "hungarian", "switzerland", "va")
    }
    assert counts == {"cleveland": 199, "hungarian": 172, "switzerland": 30, "va": 85}
    assert len(records) == 740
    assert len(study.data.columns) == 13


@needs_data
def test_physionet_2012_has_the_published_patients_and_deaths(tmp_path):
    records, study = converted("physionet2012", DATA / "physionet2012_mortality", tmp_path)
    train = records.split == "train"
    assert (train.sum(), (~train).sum()) == (4000, 4000)
    assert (records.targets[train].sum(), records.targets[~train].sum()) == (554, 568)
    assert ((records.sites == "coronary") & train).sum() == 577
    assert 0.05 < np.isnan(records.values[..., 0]).mean() < 0.35  # heart rate, nearly hourly
    cut = split(records, study)
    assert not set(cut.validation) & set(np.flatnonzero(~train))


@needs_data
def test_physionet_2019_leaves_out_stays_whose_answer_is_already_known(tmp_path):
    records, _ = converted("physionet2019", DATA / "physionet2019_sepsis", tmp_path)
    assert sorted(set(records.sites)) == ["A1", "A2", "B1", "B2"]
    assert records.values.shape[1:] == (12, 30)
    assert 0.02 < records.targets.mean() < 0.06


@needs_data
def test_medmnist_keeps_its_published_splits(tmp_path):
    source = DATA / "medmnist" / "pneumoniamnist.npz"
    records, _ = converted("medmnist", source, tmp_path)
    counts = [int((records.split == part).sum()) for part in ("train", "validation", "test")]
    assert counts == [4708, 524, 624]


@needs_data
def test_check_shows_counts_and_shares_and_no_value(tmp_path):
    converted("heart-disease", DATA / "heart_disease", tmp_path)
    study = str(tmp_path / "study.toml")
    shown = CliRunner().invoke(app, ["check", str(tmp_path), "--study", study])
    assert shown.exit_code == 0
    assert "records to train" in shown.output
    assert "740" in shown.output


def test_a_source_that_is_not_there_is_named(tmp_path):
    result = CliRunner().invoke(app, ["convert", "physionet2012", str(tmp_path), str(tmp_path)])
    assert isinstance(result.exception, DataRejected)
    assert "set-a.npz or a folder set-a" in str(result.exception)


def test_text_files_as_published_are_read_too(tmp_path):
    for part in ("a", "b"):
        (tmp_path / f"set-{part}").mkdir()
        (tmp_path / f"set-{part}" / "101.txt").write_text(
            "Time,Parameter,Value\n00:00,RecordID,101\n00:00,Age,54\n00:00,Gender,0\n"
            "00:00,Height,-1\n00:00,ICUType,4\n00:00,Weight,-1\n01:30,HR,88\n"
        )
        (tmp_path / f"Outcomes-{part}.txt").write_text("RecordID,In-hospital_death\n101,1\n")
    target = tmp_path / "out"
    # one number in two sets is one patient in two splits, which must be noticed
    result = CliRunner().invoke(app, ["convert", "physionet2012", str(tmp_path), str(target)])
    assert result.exit_code == 0
    with pytest.raises(DataRejected, match="expected every record once"):
        load_records(target, load_study(target / "study.toml"))


@needs_data
def test_eicu_has_several_stays_per_patient_and_tests_in_hospitals_nobody_trained_in(tmp_path):
    records, study = converted("eicu", DATA / "eicu_demo", tmp_path)
    assert (len(records), records.patient_count) == (2399, 1809)
    assert sorted(set(records.sites)) == ["Midwest", "Northeast", "South", "West", "unknown"]
    rows = pd.read_csv(tmp_path / "rows.csv")
    test = rows["split"] == "test"
    assert (test.sum(), rows["label"][test].sum(), rows["label"].sum()) == (420, 39, 209)
    assert not set(rows["hospital"][test]) & set(rows["hospital"][~test])
    assert not set(rows["patient"][test]) & set(rows["patient"][~test])
    cut = split(records, study)
    owners = [set(records.patients[part]) for part in (cut.train, cut.validation, cut.test)]
    assert sum(map(len, owners)) == records.patient_count


def test_eicu_keeps_a_patient_in_the_first_hospital_and_no_stay_without_an_outcome(tmp_path):
    stay = {"gender": "Male", "hospitaldischargestatus": "Alive", "age": "> 89"}
    stays = pd.DataFrame(
        [
            {"patientunitstayid": 1, "uniquepid": "a", "hospitalid": 10, **stay},
            {"patientunitstayid": 2, "uniquepid": "a", "hospitalid": 11, **stay},
            {"patientunitstayid": 3, "uniquepid": "a", "hospitalid": 10, **stay},
            {"patientunitstayid": 4, "uniquepid": "b", "hospitalid": 11, **stay}
            | {"hospitaldischargestatus": None},
        ]
    )
    hospitals = pd.DataFrame({"hospitalid": [10, 11], "region": ["South", None]})
    scored = pd.DataFrame({"patientunitstayid": [1, 3, 4], "eyes": [4, -1, 3]}).reindex(
        columns=["patientunitstayid", *(name for name, *_ in eicu.SCORED)]
    )
    history = pd.DataFrame({"patientunitstayid": [1, 3]}).reindex(
        columns=["patientunitstayid", *eicu.HISTORY]
    )
    path = "admission diagnosis|Operative Organ Systems|Organ System|Respiratory"
    diagnosis = pd.DataFrame({"patientunitstayid": [3], "admitdxpath": [path]})
    pressure = pd.DataFrame(
        {
            "patientunitstayid": [1, 1, 1, 1],
            "observationoffset": [-5, 60, 120, 1500],
            "noninvasivesystolic": [30, 90, 110, 40],
        }
    )
    tables = {
        "patient": stays, "hospital": hospitals, "apacheapsvar": scored, "apachepredvar": history,
        "admissiondx": diagnosis, "vitalaperiodic": pressure,
    }  # fmt: skip
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    eicu.convert(tmp_path, tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert rows["stay"].tolist() == [1, 3]
    assert rows["age"].tolist() == [90, 90]
    assert rows["eyes"].isna().tolist() == [False, True]
    assert rows["lowest_systolic"][0] == 90 and rows["mean_systolic"][0] == 100
    assert (rows["operative"][1], rows["system_0"][1], rows["system_1"][1]) == (1, 0, 1)
