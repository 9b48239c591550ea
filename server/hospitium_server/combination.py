"""The means of several groups as one update that a minority of bad groups does not decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hospitium_common.study import Study

    Vector = NDArray[np.float64]

CHUNK = 1 << 16


def combine(means: Sequence[Vector], study: Study) -> Vector:
    """Return one update ``[size]`` from the groups' means: theirs if there is one group.

    Otherwise the median or the trimmed mean, coordinate by coordinate (Yin et al. 2018). The
    trimmed mean leaves out the highest and the lowest fifth, and at least one of each of three
    and more. Groups count alike: a group's claimed weight does not buy it influence.

    **Guarantees:** with fewer than half of the groups bad, every coordinate of the median lies
    within the range of the good ones; for the trimmed mean, with no more bad ones than are left
    out at each end.
    """
    trimmed = 0
    if study.robustness.combine == "trimmed_mean":
        trimmed = min(max(1, len(means) // 5), (len(means) - 1) // 2)
    if len(means) == 1:
        return means[0]
    combined = np.empty_like(means[0])
    for begin in range(0, len(combined), CHUNK):
        part = np.stack([mean[begin : begin + CHUNK] for mean in means])
        if trimmed:
            part.sort(axis=0)
            combined[begin : begin + CHUNK] = part[trimmed : len(means) - trimmed].mean(axis=0)
        else:
            combined[begin : begin + CHUNK] = np.median(part, axis=0)
    return combined
