"""Which version counts: the validation gate, early stopping, and the best model of a study."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hospitium_common.study import Study
    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord

    History = Sequence[tuple[RoundRecord, Figures | None]]


def withdrawal(
    study: Study, number: int, scores: Mapping[int, float], withdrawn: Iterable[int]
) -> tuple[tuple[int, ...], str]:
    """Return the versions up to ``number`` that the validation gate takes back, and why.

    A version is compared with the newest one before it that was not withdrawn and whose score is
    known. If it is worse by more than the study's gate, or undefined where the other is not, it
    goes, and with it every version in between, none of which was found to be good.
    """
    gate, taken = study.robustness.gate, set(withdrawn)
    if gate is None or number not in scores or number in taken:
        return (), ""
    before = [n for n in scores if n < number and n not in taken and not math.isnan(scores[n])]
    if not before:
        return (), ""
    good, now = max(before), scores[number]
    if now >= scores[good] - gate:
        return (), ""
    name, sign = ("AUROC", 1) if study.robustness.gate_metric == "auroc" else ("loss", -1)
    reason = (
        f"validation {name} went from {sign * scores[good]:.3f} (version {good}) to "
        f"{sign * now:.3f}, more than {gate:g} worse"
    )
    return tuple(n for n in range(good + 1, number + 1) if n not in taken), reason


def has_stalled(study: Study, history: History) -> bool:
    """Whether the federated validation metric has stood still for the study's patience."""
    rule = study.early_stopping
    if rule is None:
        return False
    scores = [
        seen.auroc if rule.metric == "auroc" else -seen.loss
        for made, seen in history
        if seen is not None and not made.withdrawn and not math.isnan(seen.auroc)
    ]
    if len(scores) <= rule.patience:
        return False
    return max(scores[-rule.patience :]) <= max(scores[: -rule.patience]) + rule.min_delta


def merit(study: Study, seen: Figures) -> float:
    """Return by what versions are chosen: validation AUROC, or minus the loss; higher is better."""
    rule = study.early_stopping
    return -seen.loss if rule is not None and rule.metric == "loss" else seen.auroc


def best_version(study: Study, history: History) -> int | None:
    """Return the version with the best validation metric; the later one where two agree."""
    scored = [
        (merit(study, seen), made.round)
        for made, seen in history
        if seen is not None and made.round > 0 and not made.withdrawn
    ]
    usable = [pair for pair in scored if not math.isnan(pair[0])]
    return max(usable)[1] if usable else None
