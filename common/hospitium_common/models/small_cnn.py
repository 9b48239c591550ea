"""The small CNN: enough for 28×28 films, light enough for a hospital's office machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from hospitium_common.study.schema import SmallCnn


def small_cnn(options: SmallCnn, *, channels: int, classes: int) -> nn.Sequential:
    """Three 3×3 convolutions with GroupNorm; any image of at least 8×8 fits."""
    width = options.width
    groups = width // 4
    return nn.Sequential(  # [batch, channels, height, width]
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [batch, width, height / 2, width / 2]
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GroupNorm(groups, 2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [batch, 2 width, height / 4, width / 4]
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.GroupNorm(groups, 2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # [batch, 2 width]
        nn.Dropout(options.dropout),
        nn.Linear(2 * width, classes),
    )
