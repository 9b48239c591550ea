"""How large the noise of differential privacy is in a site's update: a yardstick for rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hospitium_client.training.private import PrivateStepPlan
    from hospitium_common.study import Study


def update_noise(study: Study, plan: PrivateStepPlan, training_round: int, units: int) -> float:
    """Return the variance of one coordinate's noise in one round's update, or 0 if unknown.

    Every step adds noise to the mean gradient; plain SGD hands it on times the learning rate, and
    with momentum m the k-th step before the end once more in each later step, (1 - m^k) / (1 - m)
    times in all. What later gradients make of it is left out. Adam and RMSprop scale it by what
    they saw: unknown. A clipping norm that follows a quantile is taken as it begins, in units of
    itself; its count costs a little more noise.
    """
    training = study.training
    if training.optimizer != "sgd":
        return 0.0
    unit = plan.clip_norm if plan.clip_quantile is not None else 1.0
    step = study.learning_rate(training_round) * plan.own_noise / unit / (plan.sample_rate * units)
    m = training.momentum
    handed_on = sum(((1 - m**k) / (1 - m)) ** 2 for k in range(1, plan.steps + 1))
    return step * step * handed_on
