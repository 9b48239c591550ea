"""Images at a site: PNG, real DICOM, archives, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from hospitium_client.data.images import read_picture
from hospitium_client.data.loading import load_records
from hospitium_common.errors import DataRejected
from hospitium_common.study import Study
from hospitium_common.study.schema import ImageSchema
from tests.federation_kit import study_of
from tests.test_data_tables import all_that_is_said

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


BAD_ARCHIVES = {
    "pixels that are no bytes": ({"train_images": np.zeros((2, 16, 16))}, "as uint8"),
    "a label too few": ({"train_labels": np.array([[0]])}, "as many labels as images"),
    "a label that is not a number": ({"train_labels": np.array([[0], [np.nan]])}, "one label from"),
    "a label of no class": ({"train_labels": np.array([[0], [2]])}, "one label from 0 to 1"),
    "no labels at all": ({"train_labels": None}, "expected an archive with train_images"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_an_archive_is_refused_for(tmp_path, case):
    changed, complaint = BAD_ARCHIVES[case]
    arrays = {"train_images": np.zeros((2, 16, 16), np.uint8), "train_labels": np.array([[0], [1]])}
    arrays = {name: a for name, a in (arrays | changed).items() if a is not None}
    np.savez(tmp_path / "films.npz", **arrays)
    (tmp_path / "dataset.toml").write_text('kind = "image_npz"\nfile = "films.npz"\n')
    with pytest.raises(DataRejected, match=complaint):
        load_records(tmp_path, film_study())


def test_a_film_that_no_row_names_is_refused(tmp_path):
    write_films(tmp_path)
    (tmp_path / "more").mkdir()
    Image.new("L", (20, 30), 7).save(tmp_path / "more" / "forgotten.png")
    with pytest.raises(DataRejected, match=r"forgotten\.png: .* label missing from the CSV"):
        load_records(tmp_path, film_study())


def test_the_same_film_twice_is_refused_with_both_rows(tmp_path):
    text = (write_films(tmp_path) / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text + "./1.png,p9,0\n")
    with pytest.raises(DataRejected, match="rows 3 and 6: expected every image file once"):
        load_records(tmp_path, film_study())


def test_a_copy_of_a_film_under_another_name_is_refused_with_both_rows(tmp_path):
    text = (write_films(tmp_path) / "labels.csv").read_text()
    (tmp_path / "copy.png").write_bytes((tmp_path / "2.png").read_bytes())
    (tmp_path / "labels.csv").write_text(text + "copy.png,p9,0\n")
    with pytest.raises(DataRejected, match="rows 4 and 6: expected every image once"):
        load_records(tmp_path, film_study())


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, odd):
    pixels = np.ones((16, 16), np.float32)
    pixels[3, 4] = odd
    Image.fromarray(pixels).save(tmp_path / "film.tiff")
    with pytest.raises(DataRejected, match=r"film\.tiff: expected a number in every pixel"):
        read_picture(tmp_path / "film.tiff", GREY)


def dicom(path: Path, pixels, **tags) -> Path:
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.PatientName = "Secret^Name"
    file.Rows, file.Columns = pixels.shape
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation, file.SamplesPerPixel = 15, 1, 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.PixelData = pixels.astype("<i2").tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("padding", [{"PixelPaddingValue": -2000}, {"PixelPaddingValue": -1000}])
def test_padding_stays_black_when_dark_and_light_are_exchanged(tmp_path, padding):
    pixels = np.tile(np.arange(16) * 100, (16, 1))
    pixels[:, :4] = -2000
    tags = {**padding, "PhotometricInterpretation": "MONOCHROME1"}
    if padding["PixelPaddingValue"] == -1000:
        tags["PixelPaddingRangeLimit"] = -3000
    picture = read_picture(dicom(tmp_path / "slice.dcm", pixels, **tags), GREY)
    assert (picture[0, :, :4] == 0).all()
    np.testing.assert_allclose(picture[0, 0, [4, 15]], [1, 0], atol=0.01)


BAD_DICOM = {
    "a slope of more than one number": {"RescaleSlope": ["1", "2"]},
    "an intercept without end": {"RescaleIntercept": "inf"},
    "a padding limit of more than one number": {
        "PixelPaddingValue": -1,
        "PixelPaddingRangeLimit": [1, 2],
    },
    "nothing but padding": {"PixelPaddingValue": 0},
    "colours from a palette": {"PhotometricInterpretation": "PALETTE COLOR"},
    "fewer pixels than it says": {"Rows": 400},
}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("case", BAD_DICOM)
def test_a_dicom_is_refused_without_pydicoms_words_for(tmp_path, case, capfd):
    path = dicom(tmp_path / "slice.dcm", np.zeros((16, 16)), **BAD_DICOM[case])
    with pytest.raises(DataRejected, match=r"slice\.dcm: expected ") as caught:
        read_picture(path, GREY)
    assert all_that_is_said(caught.value).count("\n") == 1
    assert capfd.readouterr() == ("", "")


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
