"""`dataset.toml`: where a hospital's data lies and how its columns are called."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hospitium_common.errors import ConfigError
from hospitium_common.study.reading import validate

if TYPE_CHECKING:
    from pathlib import Path


class _Mapping(BaseModel):
    """``synthetic`` marks data that no patient stands behind; it is shown wherever the data is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    synthetic: bool = False


class _Table(_Mapping):
    """Columns that every table of labels has; ``missing`` lists texts that mean a gap."""

    patient_column: str = "patient"
    label_column: str = "label"
    site_column: str | None = None
    split_column: str | None = None
    missing: tuple[str, ...] = ()


class ImageFolder(_Table):
    """PNG, JPEG or DICOM files and a table with one row for each of them.

    With independent labels, ``label_columns`` names one 0/1 column per class, in order.
    """

    kind: Literal["image_folder"]
    labels: str = "labels.csv"
    file_column: str = "file"
    label_columns: tuple[str, ...] = ()


class ImageArchive(_Mapping):
    """One ``.npz`` as MedMNIST publishes them: ``{train,val,test}_{images,labels}``.

    It names no patients; each image counts as one.
    """

    kind: Literal["image_npz"]
    file: str


class _Events(_Table):
    """Measurements at points in time, and a table of labels with one row per record (stay).

    ``record_column`` (default: the patient's) ties the two together. Times count from the start
    of the window: as hours or minutes, or as timestamps since ``admission_column`` of the labels,
    or else since the record's first event.
    """

    events: str
    labels: str = "labels.csv"
    record_column: str | None = None
    time_column: str = "time"
    time_unit: Literal["hours", "minutes", "timestamp"] = "hours"
    admission_column: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)

    @property
    def key_column(self) -> str:
        """The column that says which record a row belongs to."""
        return self.record_column or self.patient_column

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.admission_column is not None and self.time_unit != "timestamp":
            raise ValueError('expected time_unit = "timestamp" beside admission_column')
        return self


class LongTable(_Events):
    """One row per measurement."""

    kind: Literal["long"]
    variable_column: str = "variable"
    value_column: str = "value"


class WideTable(_Events):
    """One row per record and time with a column for each variable."""

    kind: Literal["wide"]


class Meds(_Mapping):
    """The Medical Event Data Standard: ``subject_id, time, code, numeric_value``.

    ``codes`` maps a study's variable to its code. A record is a row of the labels
    (``subject_id, prediction_time, boolean_value``); only events up to that time are read. The
    labels may carry a column for the site and one for the split.
    """

    kind: Literal["meds"]
    events: str = "data/**/*.parquet"
    labels: str = "labels/**/*.parquet"
    site_column: str | None = None
    split_column: str | None = None
    codes: dict[str, str] = Field(default_factory=dict)


class RowTable(_Table):
    """One row per record. ``columns`` maps a study's column to the file's, where they differ."""

    kind: Literal["table"]
    file: str
    columns: dict[str, str] = Field(default_factory=dict)


Mapping = ImageFolder | ImageArchive | LongTable | WideTable | Meds | RowTable
_KINDS: dict[str, type[Mapping]] = {
    "image_folder": ImageFolder,
    "image_npz": ImageArchive,
    "long": LongTable,
    "wide": WideTable,
    "meds": Meds,
    "table": RowTable,
}


def load_mapping(directory: Path) -> Mapping:
    """Read ``dataset.toml`` in a data directory.

    Raises:
        ConfigError: it is missing or wrong; names key, value and the nearest correct key.
    """
    path = directory / "dataset.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a data mapping, got: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    kind = document.get("kind")
    if kind not in _KINDS:
        raise ConfigError(f"{path}: expected kind to be one of {', '.join(_KINDS)}, got {kind!r}")
    return validate(_KINDS[kind], document, str(path))
