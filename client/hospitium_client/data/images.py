"""Images from PNG, JPEG, DICOM or a MedMNIST archive, as ``[record, channel, height, width]``."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pydicom
from PIL import Image

from hospitium_client.data.records import Records
from hospitium_client.data.tables import labels, optional, read_table, refuse_twice, texts
from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hospitium_client.data.mapping import ImageArchive, ImageFolder
    from hospitium_common.study import Study
    from hospitium_common.study.schema import ImageSchema

    Picture = NDArray[np.float32]

CONTRAST_PERCENTILES = (0.5, 99.5)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ""})
ARCHIVE_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def load_folder(
    directory: Path, mapping: ImageFolder, study: Study, schema: ImageSchema
) -> Records:
    """Load the images of a folder and their labels; every image has to have exactly one row."""
    path = directory / mapping.labels
    multi = study.task.labels == "multi"
    label_columns = list(mapping.label_columns) if multi else [mapping.label_column]
    if multi and len(label_columns) != len(study.task.classes):
        raise DataRejected(
            f"{directory / 'dataset.toml'}: expected label_columns for "
            f"{len(study.task.classes)} classes, got {len(label_columns)}"
        )
    table = read_table(path, [mapping.file_column, mapping.patient_column, *label_columns])
    files = [directory / name for name in texts(table, mapping.file_column, path)]
    _refuse_unlabelled(directory, files, path)
    resolved = pd.DataFrame({"file": [str(file.resolve()) for file in files]}, index=table.index)
    refuse_twice(resolved, ["file"], path, "every image file once")
    pictures = [read_picture(file, schema) for file in files]
    contents = pd.DataFrame({"content": [_fingerprint(file) for file in files]}, index=table.index)
    refuse_twice(contents, ["content"], path, "every image once")
    if multi:
        columns = [labels(table, c, ("0", "1"), path) for c in label_columns]
        targets: NDArray[np.float32] | NDArray[np.int64] = np.stack(columns, 1).astype(np.float32)
    else:
        targets = labels(table, mapping.label_column, study.task.classes, path)
    shape = (0, schema.channels, *schema.size)
    return Records(
        values=np.stack(pictures) if pictures else np.zeros(shape, np.float32),
        statics=np.zeros((len(pictures), 0), np.float32),
        targets=targets,
        patients=texts(table, mapping.patient_column, path),
        sites=optional(table, mapping.site_column, path),
        split=optional(table, mapping.split_column, path),
        synthetic=mapping.synthetic,
    )


def _refuse_unlabelled(directory: Path, files: Sequence[Path], labels_path: Path) -> None:
    labelled = {file.resolve() for file in files}
    suffixes = IMAGE_SUFFIXES | {file.suffix.lower() for file in files}
    left = sorted(
        file
        for file in directory.rglob("*")
        if file.suffix.lower() in suffixes
        and not file.name.startswith(".")
        and file.is_file()
        and file.resolve() not in labelled | {labels_path.resolve()}
    )
    if left:
        more = f" (and {len(left) - 1} more files)" if len(left) > 1 else ""
        raise DataRejected(
            f"{left[0]}{more}: expected a row in {labels_path.name} for every image, got none: "
            "label missing from the CSV; add it, or move the file elsewhere"
        )


def _fingerprint(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load_archive(
    directory: Path, mapping: ImageArchive, study: Study, schema: ImageSchema
) -> Records:
    """Load a MedMNIST-style archive; its splits become the records' splits.

    Raises:
        DataRejected: it is damaged, or holds other than 8-bit images with one label each.
    """
    path, pictures, targets, splits = directory / mapping.file, [], [], []
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name, split in ARCHIVE_SPLITS.items():
                if f"{name}_images" in archive:
                    pictures.append(archive[f"{name}_images"])
                    labelled = archive[f"{name}_labels"]
                    targets.append(labelled.reshape(len(labelled), -1))
                    splits += [split] * len(pictures[-1])
    except Exception as error:  # damaged files raise anything, and what it says is not ours
        reason = error.strerror if isinstance(error, OSError) else None
        raise DataRejected(
            f"{path}: expected an archive with train_images, train_labels, …, got: "
            f"{reason or 'a file that cannot be read as one'}"
        ) from None
    if not splits:
        raise DataRejected(f"{path}: expected images under train_images, got none")
    if any(p.dtype != np.uint8 or p.ndim not in (3, 4) for p in pictures):
        raise DataRejected(f"{path}: expected images as uint8 [image, height, width(, channel)]")
    if [len(p) for p in pictures] != [len(t) for t in targets]:
        raise DataRejected(f"{path}: expected as many labels as images, got more or fewer")
    images = np.concatenate(pictures).astype(np.float32) / np.float32(255)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Records(
        values=_conform(images, schema),
        statics=np.zeros((len(images), 0), np.float32),
        targets=_archive_targets(targets, study, path),
        patients=np.array([f"{split}-{i}" for i, split in enumerate(splits)]),
        split=np.array(splits),
        synthetic=mapping.synthetic,
    )


def _archive_targets(
    targets: Sequence[NDArray[Any]], study: Study, path: Path
) -> NDArray[np.float32] | NDArray[np.int64]:
    """Return labels as the study has them; anything but whole class numbers is refused."""
    exclusive, classes = study.task.labels == "exclusive", len(study.task.classes)
    columns, largest = (1, classes - 1) if exclusive else (classes, 1)
    if any(
        part.shape[1] != columns or not np.isin(part, np.arange(largest + 1)).all()
        for part in targets
    ):
        each = f"one label from 0 to {largest}" if exclusive else f"{classes} labels of 0 or 1"
        raise DataRejected(f"{path}: expected {each} per image, got something else")
    label = np.concatenate(targets)
    return label[:, 0].astype(np.int64) if exclusive else label.astype(np.float32)


def read_picture(path: Path, schema: ImageSchema) -> Picture:
    """Read one image file as ``[channel, height, width]`` in 0…1.

    Raises:
        DataRejected: the file is missing, unreadable, not one still image, or has pixels that
            are not finite numbers.
    """
    dicom = path.suffix.lower() in DICOM_SUFFIXES
    try:
        # What the libraries warn about may quote the file: it stays here.
        with warnings.catch_warnings(action="ignore"):
            pixels = _read_dicom(path) if dicom else _read_film(path)
    except DataRejected:
        raise
    except Exception:  # damaged files raise anything, and what it says may quote a patient
        what = "DICOM image; export it again from the archive" if dicom else "image; replace it"
        raise DataRejected(f"{path}: expected a readable {what}") from None
    picture: Picture = _conform(pixels[None].astype(np.float32), schema)[0]
    return picture


def _read_film(path: Path) -> Picture:
    """PNG or JPEG as ``[channel, height, width]``; deep grey ones are contrast-stretched."""
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) != 1:
            raise DataRejected(f"{path}: expected one still image, got several frames")
        deep = image.mode.startswith(("I", "F"))
        raw = np.asarray(image if deep else image.convert("RGB"), np.float32)
    _refuse_gaps(raw, path)
    if deep:
        return _stretch(raw, np.ones(raw.shape, bool))[None]
    picture: Picture = raw.transpose(2, 0, 1) / np.float32(255)
    return picture


def _read_dicom(path: Path) -> Picture:
    """Pixels in modality units, contrast-stretched, padding black; ``[1, height, width]``."""
    file = pydicom.dcmread(path)
    raw = file.pixel_array
    colours = str(file.get("PhotometricInterpretation", ""))
    if raw.ndim != 2 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataRejected(
            f"{path}: expected one grey frame, got several or colours; export single grey frames"
        )
    pixels, padding = raw.astype(np.float32), file.get("PixelPaddingValue")
    real = np.ones(pixels.shape, bool)
    if padding is not None:  # PS3.3 C.7.5.1.1.2: one value, or all up to the limit
        ends = sorted((float(padding), float(file.get("PixelPaddingRangeLimit", padding))))
        real = (pixels < ends[0]) | (pixels > ends[1])
    if not real.any():
        raise DataRejected(f"{path}: expected an image, got nothing but padding")
    slope, intercept = file.get("RescaleSlope", 1), file.get("RescaleIntercept", 0)
    pixels = pixels * np.float32(slope) + np.float32(intercept)
    _refuse_gaps(pixels, path)
    stretched = _stretch(pixels, real)
    if colours == "MONOCHROME1":
        stretched = 1 - stretched
    return np.where(real, stretched, np.float32(0))[None]


def _refuse_gaps(pixels: Picture, path: Path) -> None:
    wrong = int(np.count_nonzero(~np.isfinite(pixels)))
    if wrong:
        raise DataRejected(
            f"{path}: expected a number in every pixel, got none in {wrong} of them; export it "
            "again"
        )


def _stretch(pixels: Picture, real: NDArray[np.bool_]) -> Picture:
    """Bring the contrast of the real pixels to 0…1."""
    low, high = np.percentile(pixels[real], CONTRAST_PERCENTILES)
    stretched: Picture = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    return stretched


def _conform(images: Picture, schema: ImageSchema) -> Picture:
    """Bring ``[record, channel, height, width]`` to the study's channels and size."""
    if images.shape[1] != schema.channels:
        grey = images.mean(axis=1, keepdims=True, dtype=np.float32)
        images = np.repeat(grey, schema.channels, axis=1)
    height, width = schema.size
    if images.shape[2:] == (height, width):
        return np.ascontiguousarray(images, np.float32)
    resized = [
        [
            np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BOX))
            for c in image
        ]
        for image in images
    ]
    return np.array(resized, np.float32)
