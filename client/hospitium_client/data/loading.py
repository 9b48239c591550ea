"""One way in: a data directory and a study give checked records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hospitium_client.data.events import load_long, load_wide
from hospitium_client.data.images import load_archive, load_folder
from hospitium_client.data.mapping import (
    ImageArchive,
    ImageFolder,
    LongTable,
    Mapping,
    Meds,
    RowTable,
    WideTable,
    load_mapping,
)
from hospitium_client.data.meds import load_meds
from hospitium_client.data.records import Records, check_records
from hospitium_client.data.tables import labels, numbers, optional, read_table, refuse_twice, texts
from hospitium_common.errors import ConfigError, DataRejected
from hospitium_common.study.schema import EventSchema, ImageSchema, TableSchema

if TYPE_CHECKING:
    from pathlib import Path

    from hospitium_common.study import Study


def load_records(directory: Path, study: Study) -> Records:
    """Read a data directory for a study, refusing whatever a model should not be trained on.

    Raises:
        ConfigError: ``dataset.toml`` is wrong or of another kind than the study.
        DataRejected: names file, row and column, and never a value.
    """
    mapping = load_mapping(directory)
    return check_records(_load(directory, mapping, study), str(directory))


def _load(directory: Path, mapping: Mapping, study: Study) -> Records:
    schema = study.data
    if isinstance(schema, ImageSchema):
        if isinstance(mapping, ImageFolder):
            return load_folder(directory, mapping, study, schema)
        if isinstance(mapping, ImageArchive):
            return load_archive(directory, mapping, study, schema)
    if isinstance(schema, EventSchema):
        if isinstance(mapping, LongTable):
            return load_long(directory, mapping, study, schema)
        if isinstance(mapping, WideTable):
            return load_wide(directory, mapping, study, schema)
        if isinstance(mapping, Meds):
            return load_meds(directory, mapping, study, schema)
    if isinstance(schema, TableSchema) and isinstance(mapping, RowTable):
        return _load_rows(directory, mapping, study, schema)
    raise ConfigError(
        f"{directory / 'dataset.toml'}: the study needs {schema.kind} data, this directory holds "
        f"{mapping.kind!r}"
    )


def _load_rows(directory: Path, mapping: RowTable, study: Study, schema: TableSchema) -> Records:
    path = directory / mapping.file
    columns = [mapping.columns.get(column.name, column.name) for column in schema.columns]
    table = read_table(path, [mapping.patient_column, mapping.label_column, *columns])
    refuse_twice(table, list(table.columns), path, "every row once")
    values = np.stack([numbers(table, c, path, mapping.missing) for c in columns], axis=1)
    for at, (column, name) in enumerate(zip(schema.columns, columns, strict=True)):
        implausible = (values[:, at] < column.low) | (values[:, at] > column.high)
        values[implausible, at] = np.nan
        gaps = np.isnan(values[:, at])
        if schema.missing == "refuse" and gaps.any():
            raise DataRejected(
                f"{path}, row {table.index[int(np.argmax(gaps))]}, column {name!r}: expected a "
                f"value from {column.low:g} to {column.high:g}, got none"
            )
    return Records(
        values=values.astype(np.float32),
        statics=np.zeros((len(table), 0), np.float32),
        targets=labels(table, mapping.label_column, study.task.classes, path),
        patients=texts(table, mapping.patient_column, path),
        sites=optional(table, mapping.site_column, path),
        split=optional(table, mapping.split_column, path),
        synthetic=mapping.synthetic,
    )
