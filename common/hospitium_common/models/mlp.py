"""A multilayer perceptron for tabular rows; without hidden layers it is logistic regression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from hospitium_common.study.schema import Mlp


def mlp(options: Mlp, *, features: int, classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them: ``[batch, feature]`` to ``[batch, class]``."""
    layers: list[nn.Module] = []
    width = features
    for hidden in options.hidden:
        layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(options.dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, classes))
