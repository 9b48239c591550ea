"""A site's records before normalisation, exactly as measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Text = NDArray[np.str_]

SPLITS = ("train", "validation", "test")
FIRST_ROW = 2
"""Records are numbered as the rows of a CSV whose row 1 holds the column names."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """Images ``[record, channel, height, width]`` in 0…1, events ``[record, step, variable]``
    or table rows ``[record, column]``; NaN means not measured.

    ``statics`` is ``[record, variable]``. ``sites`` and ``split`` are there if the data names
    them. ``synthetic`` says that no patient stands behind any of it.
    """

    values: NDArray[np.float32]
    statics: NDArray[np.float32]
    targets: NDArray[Any]
    patients: Text
    sites: Text | None = None
    split: Text | None = None
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def patient_count(self) -> int:
        """How many different patients the records belong to."""
        return len(np.unique(self.patients))

    def take(self, index: NDArray[np.int64]) -> Records:
        """Return some of the records."""
        return replace(
            self,
            values=self.values[index],
            statics=self.statics[index],
            targets=self.targets[index],
            patients=self.patients[index],
            sites=None if self.sites is None else self.sites[index],
            split=None if self.split is None else self.split[index],
        )


def check_records(records: Records, where: str) -> Records:
    """Return the records if a model may be trained on them.

    Raises:
        DataRejected: no patient at all, an unknown split, or a patient in two splits.
    """
    if len(records) == 0:
        raise DataRejected(f"{where}: expected at least one usable patient, got none")
    if records.split is None:
        return records
    unknown = ~np.isin(records.split, SPLITS)
    if unknown.any():
        raise DataRejected(
            f"{where}, row {int(np.argmax(unknown)) + FIRST_ROW}: expected a split of "
            f"{', '.join(SPLITS)}, got another"
        )
    refuse_divided_patients(records.patients, records.split, f"{where}: split")
    return records


def refuse_divided_patients(patients: Text, parts: Text, where: str) -> None:
    """Refuse a patient whose records lie in two parts (splits or sites).

    Raises:
        DataRejected: there is one; names two of the records' rows in the table of labels.
    """
    order = np.argsort(patients, kind="stable")
    changed = (patients[order][1:] == patients[order][:-1]) & (
        parts[order][1:] != parts[order][:-1]
    )
    if changed.any():
        at = int(np.argmax(changed))
        first, second = sorted(order[[at, at + 1]] + FIRST_ROW)
        raise DataRejected(
            f"{where}: expected every patient in one, got one in two (rows {first} and {second} "
            "of the table of labels, for instance); give all records of a patient the same"
        )
