"""Light augmentation for images: each picture is moved a little, on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from hospitium_common.study import Study

Augment = Callable[[Tensor, Generator], Tensor]
"""Inputs ``[batch, ...]`` and a generator in, changed inputs of the same shape out."""

LARGEST_ROTATION = math.radians(7)
LARGEST_SHIFT = 0.07  # of the image's side
LARGEST_ZOOM = 0.07
LARGEST_CONTRAST = 0.1


def augmentation(study: Study) -> Augment | None:
    """Return the study's augmentation, or none."""
    return light if study.training.augmentation == "light" else None


def light(images: Tensor, generator: Generator) -> Tensor:
    """Rotate, shift, zoom and change the contrast of ``[batch, channel, height, width]`` slightly.

    No mirroring: the side of a finding means something in medicine.
    """
    batch = len(images)

    def draw(largest: float) -> Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1).to(images) * largest

    angle, zoom = draw(LARGEST_ROTATION), 1 + draw(LARGEST_ZOOM)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    shift_x, shift_y = draw(2 * LARGEST_SHIFT), draw(2 * LARGEST_SHIFT)
    rows = [torch.stack([cosine, -sine, shift_x], 1), torch.stack([sine, cosine, shift_y], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = (1 + draw(LARGEST_CONTRAST)).view(-1, *[1] * (images.dim() - 1))
    centre = moved.mean(dim=(1, 2, 3), keepdim=True)
    return (moved - centre) * contrast + centre
