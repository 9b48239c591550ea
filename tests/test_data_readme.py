"""Every example in the guide for hospitals is read as a hospital's directory would be."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hospitium_client.data import mapping as mappings
from hospitium_client.data.loading import load_records
from hospitium_client.data.mapping import load_mapping
from hospitium_common.study import Study
from tests.federation_kit import study_of
from tests.test_data_images import dicom, film_study
from tests.test_data_tables import ehr_study

GUIDE = Path(mappings.__file__).with_name("README.md").read_text(encoding="utf-8")
EXAMPLES = {
    tomllib.loads(text)["kind"]: text for text in re.findall(r"```toml\n(.*?)```", GUIDE, re.S)
}
KINDS = ("image_folder", "image_npz", "long", "wide", "meds", "table")


def tables(kind: str) -> list[str]:
    """The CSV examples in the section of a kind."""
    section = GUIDE.split(f": `{kind}`\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```csv\n(.*?)```", section, re.S)


def ehr() -> Study:
    document = ehr_study().model_dump(mode="json")
    document["task"]["classes"] = ["survived", "died"]
    return Study.model_validate(document)


def films() -> Study:
    document = film_study().model_dump(mode="json")
    document["task"]["classes"] = ["clear", "opacity"]
    return Study.model_validate(document)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_one_example_that_is_a_valid_mapping(tmp_path, kind):
    (tmp_path / "dataset.toml").write_text(EXAMPLES[kind])
    assert load_mapping(tmp_path).kind == kind
    assert len(re.findall(f'kind = "{kind}"', GUIDE)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_the_guide_comments_out_is_a_key(tmp_path, kind):
    spoken = re.sub(r"(?m)^# (\w+ = )", r"\1", EXAMPLES[kind])
    (tmp_path / "dataset.toml").write_text(spoken)
    assert load_mapping(tmp_path).kind == kind


def test_the_guide_names_every_key_of_every_kind():
    for kind in KINDS:
        for key in mappings._KINDS[kind].model_fields:
            assert re.search(rf"\b{key}\b", GUIDE), f"{key} of {kind}"


def test_the_example_of_a_table_is_read(tmp_path):
    (tmp_path / "dataset.toml").write_text(EXAMPLES["table"])
    (tmp_path / "rows.csv").write_text(tables("table")[0])
    records = load_records(tmp_path, study_of())
    assert records.patients.tolist() == ["p1", "p2"]
    assert records.values[0].tolist() == [70, 120, 2]


def test_the_example_of_stays_in_long_form_is_read(tmp_path):
    (tmp_path / "dataset.toml").write_text(EXAMPLES["long"])
    events, labels = tables("long")
    (tmp_path / "events.csv").write_text(events)
    (tmp_path / "labels.csv").write_text(labels)
    records = load_records(tmp_path, ehr())
    assert records.values[0, 0, 0] == 88
    assert records.values[0, 1, 1] == np.float32(2.1)
    assert records.statics.tolist() == [[71]]


def test_the_example_of_stays_in_wide_form_is_read(tmp_path):
    (tmp_path / "dataset.toml").write_text(EXAMPLES["wide"])
    (tmp_path / "events.csv").write_text(tables("wide")[0])
    pd.read_csv(tmp_path / "events.csv").to_parquet(tmp_path / "events.parquet")
    (tmp_path / "labels.csv").write_text(tables("long")[1])
    records = load_records(tmp_path, ehr())
    assert records.values[0, 0, 0] == 88
    assert records.values[0, 1, 1] == np.float32(2.1)


def test_the_example_of_meds_is_read(tmp_path):
    (tmp_path / "dataset.toml").write_text(EXAMPLES["meds"])
    noon = pd.Timestamp("2026-03-01 12:00")
    (tmp_path / "data").mkdir()
    (tmp_path / "labels").mkdir()
    pd.DataFrame(
        {
            "subject_id": [1, 1],
            "time": [noon - pd.Timedelta(hours=1), pd.NaT],
            "code": ["LAB//220045//bpm", "AGE"],
            "numeric_value": [88.0, 71.0],
        }
    ).to_parquet(tmp_path / "data" / "0.parquet")
    pd.DataFrame(
        {"subject_id": [1], "prediction_time": noon, "boolean_value": True, "split": "train"}
    ).to_parquet(tmp_path / "labels" / "0.parquet")
    records = load_records(tmp_path, ehr())
    assert records.values[0, 3, 0] == 88
    assert records.statics.tolist() == [[71]]


def test_the_example_of_a_folder_of_images_is_read(tmp_path):
    (tmp_path / "dataset.toml").write_text(EXAMPLES["image_folder"])
    (tmp_path / "labels.csv").write_text(tables("image_folder")[0])
    (tmp_path / "films").mkdir()
    Image.new("L", (20, 20), 30).save(tmp_path / "films" / "0001.png")
    Image.new("L", (20, 20), 60).save(tmp_path / "films" / "0003.jpg")
    dicom(tmp_path / "films" / "0002.dcm", np.arange(256).reshape(16, 16))
    records = load_records(tmp_path, films())
    assert records.targets.tolist() == [0, 1, 0]
    assert records.split.tolist() == ["train"] * 3


def test_the_example_of_an_archive_is_read(tmp_path):
    (tmp_path / "dataset.toml").write_text(EXAMPLES["image_npz"])
    images, labels = np.zeros((2, 16, 16), np.uint8), np.array([[0], [1]])
    np.savez(tmp_path / "pneumoniamnist.npz", train_images=images, train_labels=labels)
    assert load_records(tmp_path, films()).targets.tolist() == [0, 1]
