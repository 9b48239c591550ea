"""What a model trains on: tensors, and which patient each record belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Records of one site, ready for a model.

    ``inputs`` is float32 ``[record, ...]``; ``targets`` is int64 ``[record]`` for exclusive classes
    or float32 ``[record, label]`` for independent labels; ``patients`` is int64 ``[record]`` and
    numbers the patients 0, 1, 2, … without gaps.
    """

    inputs: Tensor
    targets: Tensor
    patients: Tensor

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.targets) == len(self.patients):
            raise DataRejected(
                "expected as many inputs as targets and patients, got "
                f"{len(self.inputs)}, {len(self.targets)} and {len(self.patients)}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def patient_count(self) -> int:
        """How many patients the records belong to."""
        return int(self.patients.max()) + 1 if len(self) else 0

    def to(self, device: torch.device) -> Samples:
        """Return the records on a device; who they belong to stays where sampling needs it."""
        return Samples(
            inputs=self.inputs.to(device), targets=self.targets.to(device), patients=self.patients
        )

    def take(self, index: Tensor) -> Samples:
        """Return the records at ``index``, patients renumbered without gaps."""
        _, patients = torch.unique(self.patients[index], return_inverse=True)
        return Samples(inputs=self.inputs[index], targets=self.targets[index], patients=patients)
