"""Train, validation and test: by patient, and the same every time."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hospitium_client.data.records import Records
    from hospitium_common.study import Study

    Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Record numbers of the three parts; no patient is in two of them."""

    train: Index
    validation: Index
    test: Index


def split(records: Records, study: Study) -> Split:
    """Split by a keyed hash of the patient: adding patients never moves the others.

    A split that the data brings is kept; where it has no validation part, that is taken from
    its training patients. A site so small that nobody would be left to train on trains on all
    its patients that are not given as test.
    """
    draw = _draws(records, study)
    training = study.training
    if records.split is None:
        test = draw < training.test_fraction
        validation = ~test & (draw < training.test_fraction + training.validation_fraction)
    else:
        test = records.split == "test"
        validation = records.split == "validation"
        if not validation.any():
            validation = ~test & (draw < training.validation_fraction)
    train = ~test & ~validation
    if not train.any():
        given = np.zeros(len(records), bool) if records.split is None else records.split == "test"
        train, test, validation = ~given, given, np.zeros(len(records), bool)
    return Split(
        train=np.flatnonzero(train),
        validation=np.flatnonzero(validation),
        test=np.flatnonzero(test),
    )


def _draws(records: Records, study: Study) -> NDArray[np.float64]:
    """Return one number in [0, 1) per record, the same for all records of a patient."""
    key = f"hospitium/split/{study.study.seed}".encode()
    patients, inverse = np.unique(records.patients, return_inverse=True)
    draws = [
        int.from_bytes(hmac.digest(key, str(patient).encode(), hashlib.sha256)[:7], "big") / 2**56
        for patient in patients
    ]
    return np.array(draws)[inverse]
