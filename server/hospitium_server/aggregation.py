"""Server optimizers: the mean update is a pseudo-gradient (Reddi et al. 2021, algorithm 2).

All arithmetic is in float64 on flat vectors ``[size]``; the model itself stays float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.errors import PeerProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hospitium_common.study import Study

    Vector = NDArray[np.float64]

CHUNK = 1 << 16
SUSPICIOUS = 10.0
"""An aggregate whose norm is this many times the median of the rounds before is refused."""


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """First and second moment of the pseudo-gradient, and the moving average of the parameters.

    Each is empty where the strategy keeps none; the average also before the first round.
    """

    first: Vector
    second: Vector
    average: Vector


def start(study: Study, size: int) -> OptimizerState:
    """Return the state before the first round."""
    strategy, nothing = study.strategy, np.zeros(0)
    adaptive = strategy.name in ("fedadam", "fedyogi", "fedadagrad")
    keeps_first = adaptive or strategy.name == "fedavgm"
    return OptimizerState(
        first=np.zeros(size) if keeps_first else nothing,
        second=np.full(size, strategy.tau**2) if adaptive else nothing,
        average=nothing,
    )


def apply(
    study: Study, state: OptimizerState, parameters: NDArray[np.float32], mean_update: Vector
) -> tuple[OptimizerState, NDArray[np.float32]]:
    """Take one step along the mean update; return the new state and the new parameters.

    FedProx differs from FedAvg at the sites only.
    """
    moved = np.empty_like(parameters)
    first, second, average = (
        np.empty(len(parameters)) if len(kept) else kept
        for kept in (state.first, state.second, state.average)
    )
    if study.strategy.averaging and not len(average):
        average = np.empty(len(parameters))
    # In pieces: a large model has room for its own vectors, not for temporary ones beside them.
    for begin in range(0, len(parameters), CHUNK):
        part = slice(begin, begin + CHUNK)
        before = OptimizerState(
            first=state.first[part], second=state.second[part], average=state.average[part]
        )
        after, moved[part] = _apply(study, before, parameters[part], mean_update[part])
        first[part], second[part], average[part] = after.first, after.second, after.average
    return OptimizerState(first=first, second=second, average=average), moved


def _apply(
    study: Study, state: OptimizerState, parameters: NDArray[np.float32], mean_update: Vector
) -> tuple[OptimizerState, NDArray[np.float32]]:
    """Move some coordinates; every coordinate moves by itself."""
    strategy, rate = study.strategy, study.strategy.server_learning_rate
    first, second = state.first, state.second
    if strategy.name in ("fedavg", "fedprox"):
        step = rate * mean_update
    elif strategy.name == "fedavgm":
        first = strategy.server_momentum * first + mean_update
        step = rate * first
    else:
        first = strategy.beta_1 * first + (1 - strategy.beta_1) * mean_update
        square = mean_update**2
        if strategy.name == "fedadagrad":
            second = second + square
        elif strategy.name == "fedadam":
            second = strategy.beta_2 * second + (1 - strategy.beta_2) * square
        else:
            second = second - (1 - strategy.beta_2) * square * np.sign(second - square)
        step = rate * first / (np.sqrt(second) + strategy.tau)
    moved = (parameters.astype(np.float64) + step).astype(np.float32)
    average = _averaged(state.average, moved, strategy.averaging)
    return OptimizerState(first=first, second=second, average=average), moved


def _averaged(average: Vector, parameters: NDArray[np.float32], decay: float) -> Vector:
    """Return the moving average with one more version; the first one is the average of itself."""
    if decay == 0.0:
        return average
    if len(average) == 0:
        return parameters.astype(np.float64)
    return decay * average + (1 - decay) * parameters


def check_aggregate(mean_update: Vector, norms_before: Sequence[float], bound: float) -> float:
    """Return the norm of the mean update, if it is one that honest sites could have made.

    ``bound`` is the norm that the sites' own clipping bounds allow; the rounds before bound it
    too, once there are three of them.

    Raises:
        PeerProtocolError: the aggregate is not finite or far too large; it must not be applied.
    """
    norm = float(np.linalg.norm(mean_update))
    if not np.isfinite(norm):
        raise PeerProtocolError("expected a finite mean update, got NaN or infinity")
    if norm > bound:
        raise PeerProtocolError(f"expected a mean update of norm ≤ {bound:.3g}, got {norm:.3g}")
    usual = float(np.median(norms_before)) if len(norms_before) >= 3 else 0.0
    if usual and norm > SUSPICIOUS * usual:
        raise PeerProtocolError(
            f"expected a mean update of norm about {usual:.3g} as in the rounds "
            f"before, got {norm:.3g}: a site may be poisoning the model"
        )
    return norm
