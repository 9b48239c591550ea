"""Models by name: one tensor in, logits out.

Every model here trains with differential privacy: nothing mixes the records of a batch
(GroupNorm, never BatchNorm), nothing works in place, and no buffer carries state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hospitium_common.models.pretrained import load_pretrained
from hospitium_common.parameters import Layout
from hospitium_common.study.schema import DeepCnn, Mlp, Recurrent, SmallCnn

if TYPE_CHECKING:
    from torch import nn

    from hospitium_common.parameters import Tensors
    from hospitium_common.study import Study


def build(study: Study) -> nn.Module:
    """Build the study's model; every site and the coordinator get the same first weights.

    Inputs are float32: images ``[batch, channel, height, width]``; events
    ``[batch, time, feature]`` whose last feature is 1 for a real step and 0 for padding at the
    end; tables ``[batch, feature]``. The output is logits ``[batch, class]``.

    Raises:
        ConfigError: the weights that the study begins from are not on this machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.study.seed)
        model = _build(study)
    if study.pretrained is not None:
        load_pretrained(model, study.pretrained)
    return model


def _build(study: Study) -> nn.Module:
    model, data, classes = study.model, study.data, len(study.task.classes)
    if data.kind == "image":
        if isinstance(model, SmallCnn):
            from hospitium_common.models.small_cnn import small_cnn

            return small_cnn(model, channels=data.channels, classes=classes)
        assert isinstance(model, DeepCnn)  # noqa: S101 - the study's validator pairs data and model
        from hospitium_common.models.deep_cnn import deep_cnn

        return deep_cnn(model, channels=data.channels, size=data.size, classes=classes)
    if data.kind == "events":
        from hospitium_common.models.recurrent import RecurrentClassifier

        assert isinstance(model, Recurrent)  # noqa: S101 - the study's validator pairs data and model
        return RecurrentClassifier(model, features=data.features, classes=classes)
    from hospitium_common.models.mlp import mlp

    assert isinstance(model, Mlp)  # noqa: S101 - the study's validator pairs data and model
    return mlp(model, features=data.features, classes=classes)


def tensors_of(model: nn.Module) -> Tensors:
    """Return a copy of the model's parameters as float32 arrays by name."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


def load_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Write arrays into the model's parameters of the same name and shape."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(tensors[name]))


def is_norm_parameter(name: str, model: nn.Module) -> bool:
    """Whether a parameter belongs to a normalisation layer (kept at the sites by FedBN)."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, torch.nn.GroupNorm | torch.nn.LayerNorm)


def shared_layout(study: Study, model: nn.Module) -> Layout:
    """Return the layout of the tensors that travel: all but frozen ones and FedBN's local norms."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {name: tensor for name, tensor in tensors_of(model).items() if name in trained}
    if study.strategy.local_norms:
        tensors = {n: t for n, t in tensors.items() if not is_norm_parameter(n, model)}
    return Layout.of(tensors)
