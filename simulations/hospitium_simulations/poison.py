"""A hospital that means harm: it changes its update after training, past its own site's rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hospitium_client.work import Contribution, SiteWork
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hospitium_common.entropy import Entropy


@dataclass(frozen=True, kw_only=True)
class Poison:
    """A site multiplies its update: -20 turns it around and makes it long, 100 only makes it long.

    Without a round it does so in all of them.
    """

    site: int
    factor: float
    round: int | None = None

    @classmethod
    def parse(cls, text: str) -> Poison:
        """Read ``SITE:FACTOR[:ROUND]``.

        Raises:
            ConfigError: it is something else.
        """
        parts = text.split(":")
        try:
            if 2 <= len(parts) <= 3:
                number = int(parts[2]) if len(parts) == 3 else None
                return cls(site=int(parts[0]), factor=float(parts[1]), round=number)
        except ValueError:
            pass
        raise ConfigError(
            f"expected SITE:FACTOR[:ROUND], for instance 1:-20 or 2:100:3, got {text!r}"
        )


class PoisonedWork(SiteWork):
    """The work of a site that poisons; everything else about it is honest."""

    poisons: Sequence[Poison] = ()

    def train(
        self,
        training_round: int,
        parameters: NDArray[np.float32],
        normalisation: bytes,
        entropy: Entropy,
    ) -> Contribution:
        """Train as told, then change the update. Masked, it still passes the site's quantiser."""
        made = super().train(training_round, parameters, normalisation, entropy)
        for poison in self.poisons:
            if poison.round in (None, training_round):
                made = replace(made, vector=made.vector * np.float32(poison.factor))
        return made
