"""Per-sample gradients through Opacus: slower, and the yardstick for the fast engine."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, cast

import torch
from opacus import GradSampleModule
from opacus.layers import DPGRU, DPLSTM
from torch import Tensor, nn

from hospitium_client.training.clipping.contributions import Instantiated
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hospitium_client.training.clipping.contributions import Contribution


class OpacusHooks:
    """Holds a wrapped twin of the model; its weights are copied in before every batch."""

    def __init__(self, model: nn.Module) -> None:
        self._twin = GradSampleModule(
            with_private_recurrence(copy.deepcopy(model)), loss_reduction="sum"
        )
        self._by_name = _named(self._twin._module)

    def contributions(
        self, model: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor]
    ) -> tuple[list[Contribution], Tensor]:
        """Return the gradients of every parameter, one by one, and the losses ``[B]``."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self._by_name[name].copy_(parameter)
                self._by_name[name].requires_grad_(parameter.requires_grad)
        self._twin.train(model.training)
        self._twin.zero_grad(set_to_none=True)
        try:
            losses = loss_of(self._twin(inputs))
        except RuntimeError as refused:
            if "modified inplace" not in str(refused):
                raise
            raise ConfigError(
                'model: privacy.engine = "opacus" expects layers that leave their inputs alone, '
                'got one that works in place; use privacy.engine = "fast"'
            ) from None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch types backward so
        gradients: list[tuple[Tensor, Tensor]] = [
            (parameter, cast("Tensor", self._by_name[name].grad_sample))  # type: ignore[attr-defined]  # Opacus sets it
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        return [Instantiated(gradients)], losses.detach()


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that the ordinary model gives them.

    Opacus's recurrent layers keep theirs in cells, but read and write ordinary names in their
    state: a marker value in each parameter tells which is which.
    """
    parameters = list(module.parameters())
    kept = [p.detach().clone() for p in parameters]
    found = {}
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.fill_(float(number))
        for name, value in module.state_dict().items():
            found[name] = parameters[int(value.flatten()[0])]
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return found


def with_private_recurrence(model: nn.Module) -> nn.Module:
    """Replace recurrent layers by Opacus's, which work step by step; the weights stay."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.LSTM | nn.GRU):
            kind = DPLSTM if isinstance(layer, nn.LSTM) else DPGRU
            private = kind(
                layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias,
                batch_first=layer.batch_first, dropout=layer.dropout,
                bidirectional=layer.bidirectional,
            )  # fmt: skip
            private.to(layer.weight_ih_l0).load_state_dict(layer.state_dict())
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], private)
    return model
