"""Per-sample losses: a record's loss never depends on the other records of its batch.

A class-weighted *mean* divides by the batch's own weight sum and so couples the records; with
differential privacy that breaks the sensitivity bound. Here weights are divided by a public
constant, their own mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from hospitium_common.study import Study

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``[batch, class]`` and targets in, losses ``[batch]`` out."""


def per_sample_loss(study: Study) -> PerSampleLoss:
    """Return the study's loss: cross-entropy, or its binary form summed over independent labels."""
    given = study.training.class_weights
    weights = torch.ones(len(study.task.classes)) if given is None else torch.tensor(given)
    weights = weights / weights.mean()

    def exclusive(logits: Tensor, targets: Tensor) -> Tensor:
        scale = weights.to(logits.device)[targets]
        return scale * functional.cross_entropy(logits, targets, reduction="none")

    def multi(logits: Tensor, targets: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights.to(logits.device), reduction="none"
        )
        return losses.sum(dim=1)

    return exclusive if study.task.labels == "exclusive" else multi
