"""Images from PNG, JPEG, DICOM or a MedMNIST archive, as ``[record, channel, height, width]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from hospitium_client.data.records import Records
from hospitium_client.data.tables import labels, optional, read_table, texts
from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hospitium_client.data.mapping import ImageArchive, ImageFolder
    from hospitium_common.study import Study
    from hospitium_common.study.schema import ImageSchema

    Picture = NDArray[np.float32]

CONTRAST_PERCENTILES = (0.5, 99.5)
UNREADABLE = (
    OSError,
    InvalidDicomError,
    ValueError,
    AttributeError,
    RuntimeError,
    NotImplementedError,
)
"""What pydicom raises for files that are damaged, not images, or coded in a way it cannot read."""
ARCHIVE_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def load_folder(
    directory: Path, mapping: ImageFolder, study: Study, schema: ImageSchema
) -> Records:
    """Load every image that the table of labels names; an image that no label names is not read."""
    path = directory / mapping.labels
    multi = study.task.labels == "multi"
    label_columns = list(mapping.label_columns) if multi else [mapping.label_column]
    if multi and len(label_columns) != len(study.task.classes):
        raise DataRejected(
            f"{directory / 'dataset.toml'}: expected label_columns for "
            f"{len(study.task.classes)} classes, got {len(label_columns)}"
        )
    table = read_table(path, [mapping.file_column, mapping.patient_column, *label_columns])
    pictures = [
        read_picture(directory / name, schema) for name in texts(table, mapping.file_column, path)
    ]
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


def load_archive(
    directory: Path, mapping: ImageArchive, study: Study, schema: ImageSchema
) -> Records:
    """Load a MedMNIST-style archive; its splits become the records' splits."""
    path, pictures, targets, splits = directory / mapping.file, [], [], []
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name, split in ARCHIVE_SPLITS.items():
                if f"{name}_images" in archive:
                    pictures.append(archive[f"{name}_images"])
                    targets.append(archive[f"{name}_labels"])
                    splits += [split] * len(pictures[-1])
    except (OSError, ValueError, KeyError) as error:
        raise DataRejected(
            f"{path}: expected an archive with train_images, train_labels, …, got none"
        ) from error
    if not pictures or {len(p) for p in pictures} == {0}:
        raise DataRejected(f"{path}: expected images under train_images, got none")
    label = np.concatenate([np.asarray(t).reshape(len(t), -1) for t in targets])
    classes = len(study.task.classes)
    if study.task.labels == "exclusive":
        if label.shape[1] != 1 or label.min() < 0 or label.max() >= classes:
            raise DataRejected(f"{path}: expected one label from 0 to {classes - 1} per image")
        final: NDArray[np.float32] | NDArray[np.int64] = label[:, 0].astype(np.int64)
    else:
        if label.shape[1] != classes:
            raise DataRejected(f"{path}: expected {classes} labels per image")
        final = label.astype(np.float32)
    images = np.concatenate(pictures).astype(np.float32) / np.float32(255)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Records(
        values=_conform(images, schema),
        statics=np.zeros((len(images), 0), np.float32),
        targets=final,
        patients=np.array([f"{split}-{i}" for i, split in enumerate(splits)]),
        split=np.array(splits),
        synthetic=mapping.synthetic,
    )


def read_picture(path: Path, schema: ImageSchema) -> Picture:
    """Read one image file as ``[channel, height, width]`` in 0…1.

    Raises:
        DataRejected: the file is missing, unreadable or not one still image.
    """
    if path.suffix.lower() in (".dcm", ".dicom", ""):
        pixels = _read_dicom(path)
    else:
        try:
            with Image.open(path) as image:
                deep = image.mode in ("I", "I;16", "I;16B", "F")
                raw = np.asarray(image if deep else image.convert("RGB"), np.float32)
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise DataRejected(f"{path}: expected a readable image; replace it") from error
        pixels = _stretch(raw)[None] if deep else raw.transpose(2, 0, 1) / np.float32(255)
    picture: Picture = _conform(pixels[None].astype(np.float32), schema)[0]
    return picture


def _read_dicom(path: Path) -> Picture:
    """Pixels in modality units, without padding, contrast-stretched; ``[1, height, width]``."""
    try:
        file = pydicom.dcmread(path)
        pixels = file.pixel_array.astype(np.float32)
    except (
        OSError,
        InvalidDicomError,
        ValueError,
        AttributeError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise DataRejected(
            f"{path}: expected a readable DICOM image; export it again from the archive"
        ) from error
    if pixels.ndim != 2:
        raise DataRejected(f"{path}: expected one grey frame, got several; export single frames")
    padding = file.get("PixelPaddingValue")
    real = pixels != padding if padding is not None else np.ones(pixels.shape, bool)
    slope, intercept = file.get("RescaleSlope", 1), file.get("RescaleIntercept", 0)
    pixels = pixels * np.float32(slope) + np.float32(intercept)
    if real.any():
        pixels = np.where(real, pixels, pixels[real].min())
    stretched = _stretch(pixels)
    if file.get("PhotometricInterpretation") == "MONOCHROME1":
        stretched = 1 - stretched
    return stretched[None]


def _stretch(pixels: Picture) -> Picture:
    low, high = np.percentile(pixels, CONTRAST_PERCENTILES)
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
