"""Images at a site: PNG, real DICOM, archives, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hospitium_client.data.images import read_picture
from hospitium_client.data.loading import load_records
from hospitium_common.errors import DataRejected
from hospitium_common.study import Study
from hospitium_common.study.schema import ImageSchema
from tests.federation_kit import study_of

DATA = Path(os.environ.get("HOSPITIUM_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_dicom = pytest.mark.skipif(
    not (DATA / "dicom_chest_ct").exists(), reason=f"no real DICOM files under {DATA}"
)
GREY = ImageSchema(kind="image", channels=1, size=(16, 16))


def film_study(labels: str = "exclusive", **data) -> Study:
    document = study_of().model_dump(mode="json")
    document["task"].update(kind="image_classification", labels=labels)
    document["data"] = {"channels": 1, "size": [16, 16], **data}
    document["model"] = {"name": "small_cnn", "width": 4}
    return Study.model_validate(document)


def write_films(directory: Path, count: int = 4) -> Path:
    rows = ["file,patient,label"]
    for number in range(count):
        Image.new("L", (20, 30), 60 * number).save(directory / f"{number}.png")
        rows.append(f"{number}.png,p{number},{number % 2}")
    (directory / "labels.csv").write_text("\n".join(rows) + "\n")
    (directory / "dataset.toml").write_text('kind = "image_folder"\n')
    return directory


def test_films_are_resized_and_scaled_to_one(tmp_path):
    records = load_records(write_films(tmp_path), film_study())
    assert records.values.shape == (4, 1, 16, 16)
    np.testing.assert_allclose(records.values[:, 0, 8, 8], np.arange(4) * 60 / 255, atol=1e-6)
    assert records.targets.tolist() == [0, 1, 0, 1]


def test_grey_films_serve_a_study_in_colour(tmp_path):
    records = load_records(write_films(tmp_path), film_study(channels=3))
    assert records.values.shape == (4, 3, 16, 16)


def test_independent_labels_have_a_column_each(tmp_path):
    write_films(tmp_path, 2)
    (tmp_path / "labels.csv").write_text("file,patient,well,ill\n0.png,a,0,1\n1.png,b,1,1\n")
    mapping = 'kind = "image_folder"\nlabel_columns = ["well", "ill"]\n'
    (tmp_path / "dataset.toml").write_text(mapping)
    records = load_records(tmp_path, film_study(labels="multi"))
    assert records.targets.tolist() == [[0.0, 1.0], [1.0, 1.0]]


DAMAGE = {
    "a film that is missing": lambda d: (d / "2.png").unlink(),
    "a film that is cut off": lambda d: (d / "2.png").write_bytes((d / "2.png").read_bytes()[:40]),
    "a film that is no image": lambda d: (d / "2.png").write_text("not a film"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_film_that_cannot_be_read_is_named(tmp_path, case):
    write_films(tmp_path)
    DAMAGE[case](tmp_path)
    with pytest.raises(DataRejected, match=r"2\.png: expected a readable image"):
        load_records(tmp_path, film_study())


def test_a_film_without_a_label_is_named_by_row(tmp_path):
    write_films(tmp_path)
    text = (tmp_path / "labels.csv").read_text().replace("p1,1", "p1,")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataRejected, match=r"labels\.csv, row 3, column 'label'"):
        load_records(tmp_path, film_study())


def test_an_archive_keeps_its_splits(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8)
    labels = np.array([[0], [1], [0], [1], [0], [1]])
    parts = {"train": slice(0, 3), "val": slice(3, 4), "test": slice(4, 6)}
    arrays = {f"{n}_images": images[s] for n, s in parts.items()}
    arrays |= {f"{n}_labels": labels[s] for n, s in parts.items()}
    np.savez(tmp_path / "films.npz", **arrays)
    (tmp_path / "dataset.toml").write_text('kind = "image_npz"\nfile = "films.npz"\n')
    records = load_records(tmp_path, film_study())
    assert records.split.tolist() == ["train"] * 3 + ["validation"] + ["test"] * 2
    np.testing.assert_allclose(records.values[:, 0, 0, 0] * 255, np.arange(6), atol=1e-4)


def test_an_archive_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "films.npz", weights=np.zeros(3))
    (tmp_path / "dataset.toml").write_text('kind = "image_npz"\nfile = "films.npz"\n')
    with pytest.raises(DataRejected, match="expected images under train_images"):
        load_records(tmp_path, film_study())


@needs_dicom
def test_real_dicom_slices_are_read_without_their_padding():
    for path in sorted((DATA / "dicom_chest_ct").glob("*.dcm")):
        picture = read_picture(path, GREY)
        assert picture.shape == (1, 16, 16)
        assert 0.0 <= picture.min() < picture.max() <= 1.0
        assert 0.1 < picture.mean() < 0.9  # padding of -2000 would push all tissue to white


@needs_dicom
@pytest.mark.parametrize("keep", [10, 200, 4000])
def test_a_damaged_dicom_is_named(tmp_path, keep):
    source = next((DATA / "dicom_chest_ct").glob("*.dcm"))
    path = tmp_path / "slice.dcm"
    path.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(DataRejected, match=r"slice\.dcm: expected a readable DICOM"):
        read_picture(path, GREY)
