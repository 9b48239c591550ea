"""The small CNN: enough for 28×28 films, light enough for a hospital's office machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from hospitium_common.study.schema import SmallCnn


SMALLEST_NORM = 1e-4
"""Added to a filter's norm before anything is divided by it."""


def standardised(weights: Tensor) -> Tensor:
    """Return filters ``[out, in, height, width]`` of mean 0 and norm 1 from such weights."""
    flat = weights.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return (centred / (norms + SMALLEST_NORM)).view_as(weights)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and norm 1, whatever its weights (Qiao et al. 2019).

    Depends on the weights alone, so no record is mixed with another.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[batch, out, height, width]``."""
        return functional.conv2d(
            input, standardised(self.weight), self.bias, self.stride, self.padding
        )


def small_cnn(options: SmallCnn, *, channels: int, classes: int) -> nn.Sequential:
    """Three 3×3 convolutions with GroupNorm; any image of at least 8×8 fits."""
    width = options.width
    groups = options.norm_groups or width // 4
    convolution = StandardisedConv2d if options.weight_standardisation else nn.Conv2d
    return nn.Sequential(  # [batch, channels, height, width]
        convolution(channels, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [batch, width, height / 2, width / 2]
        convolution(width, 2 * width, 3, padding=1),
        nn.GroupNorm(groups, 2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [batch, 2 width, height / 4, width / 4]
        convolution(2 * width, 2 * width, 3, padding=1),
        nn.GroupNorm(groups, 2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # [batch, 2 width]
        nn.Dropout(options.dropout),
        nn.Linear(2 * width, classes),
    )
