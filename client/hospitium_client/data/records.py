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
            f"{where}, row {int(np.argmax(unknown)) + 2}: expected a split of {', '.join(SPLITS)}, "
            "got another"
        )
    pairs = np.unique(np.stack([records.patients, records.split]), axis=1)
    patients, times = np.unique(pairs[0], return_counts=True)
    if (times > 1).any():
        patient = patients[np.argmax(times > 1)]
        rows = np.flatnonzero(records.patients == patient)[:2] + 2
        raise DataRejected(
            f"{where}: expected every patient in one split, got one in two (rows {rows[0]} and "
            f"{rows[1]}, for instance); put all records of a patient into the same split"
        )
    return records
