"""A site's optimizer for one round; its state begins afresh every round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import SGD, Adam, Optimizer, RMSprop

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.nn import Parameter

    from hospitium_common.study import Study


def local_optimizer(
    study: Study, parameters: Iterable[Parameter], training_round: int
) -> Optimizer:
    """Return SGD with momentum, Adam or RMSprop with the study's rate for this training round."""
    training = study.training
    rate, decay = study.learning_rate(training_round), training.weight_decay
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if training.optimizer == "adam":
        return Adam(trained, lr=rate, weight_decay=decay)
    if training.optimizer == "rmsprop":
        return RMSprop(trained, lr=rate, weight_decay=decay, momentum=training.momentum)
    return SGD(trained, lr=rate, weight_decay=decay, momentum=training.momentum)
