"""What layers leave behind while a batch runs, and where autograd enters them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hospitium_client.training.clipping.contributions import Contribution


@dataclass(frozen=True)
class Recording:
    """Contributions, filled in on the way back.

    ``anchor`` is a number that requires a gradient: layers take it as an input, so that autograd
    comes back to them although no parameter requires one.
    """

    anchor: Tensor
    contributions: list[Contribution] = field(default_factory=list)
