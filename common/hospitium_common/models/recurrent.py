"""LSTM and GRU over a patient's time grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hospitium_common.study.schema import Recurrent


class RecurrentClassifier(nn.Module):
    """A recurrent network, one summary of its states, one linear layer.

    Input ``[batch, time, feature]``: the last feature is 1 for a real step and 0 for padding,
    which stands at the end. Sequences are padded and never packed: packing reorders a batch by
    length, and per-sample gradients would then mix patients.
    """

    def __init__(self, options: Recurrent, *, features: int, classes: int) -> None:
        super().__init__()
        kind = nn.LSTM if options.name == "lstm" else nn.GRU
        between = options.dropout if options.layers > 1 else 0.0
        self.recurrent = kind(
            features, options.hidden, options.layers, batch_first=True, dropout=between
        )
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(options.hidden, classes)
        self._mean = options.pooling == "mean"

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[batch, class]``."""
        valid = inputs[..., -1]  # [batch, time]
        states, _ = self.recurrent(inputs)  # [batch, time, hidden]
        steps = valid.sum(dim=1).clamp(min=1)  # an empty record is read as one padding step
        if self._mean:
            summary = torch.einsum("bth,bt->bh", states, valid) / steps[:, None]
        else:
            last = (steps.long() - 1)[:, None, None].expand(-1, 1, states.shape[-1])
            summary = states.gather(1, last)[:, 0]
        logits: Tensor = self.head(self.dropout(summary))
        return logits
