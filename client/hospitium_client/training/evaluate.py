"""How a model does on a site's own held-out records, as sums that can be masked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hospitium_client.training.losses import per_sample_loss
from hospitium_common.metrics import EvaluationSums, evaluation_sums

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hospitium_client.samples import Samples
    from hospitium_common.study import Study

BATCH = 512


def scores(model: nn.Module, samples: Samples) -> Tensor:
    """Return logits ``[record, class]``, computed in batches without gradients."""
    model.eval()
    with torch.no_grad():
        parts = [model(batch) for batch in torch.split(samples.inputs, BATCH)]
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def evaluate(
    model: nn.Module, samples: Samples, study: Study, smallest_count: int = 0
) -> EvaluationSums:
    """Evaluate on ``samples``; fewer than ``smallest_count`` records say nothing at all."""
    if len(samples) == 0 or len(samples) < smallest_count:
        return EvaluationSums.nothing(study)
    logits = scores(model, samples).cpu()
    targets = samples.targets.cpu()
    losses = per_sample_loss(study)(logits, targets)
    exclusive = study.task.labels == "exclusive"
    probabilities = logits.double().softmax(dim=1) if exclusive else logits.double().sigmoid()
    return evaluation_sums(
        np.nan_to_num(probabilities.numpy(), nan=0.5),
        targets.numpy(),
        np.nan_to_num(losses.double().numpy(), nan=1e6, posinf=1e6),
        study,
    )
