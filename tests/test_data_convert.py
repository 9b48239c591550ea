"""Published data sets become usable data directories, with the published counts."""

import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hospitium_client.data.cli import app
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
