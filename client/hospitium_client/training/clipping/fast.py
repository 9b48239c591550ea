"""Book-keeping: one forward that records layer inputs, one backward for output gradients only.

No parameter requires a gradient while the batch runs, so autograd spends nothing on them; each layer's
contribution is then computed once, in its cheapest form (`layers`, `recurrent`).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hospitium_client.training.clipping.layers import contribution
from hospitium_client.training.clipping.recurrent import Recording, recorded_forward
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hospitium_client.training.clipping.contributions import Contribution

MIXES_SAMPLES = (nn.modules.batchnorm._NormBase,)
RECURRENT = (nn.LSTM, nn.GRU)


def check_layers(model: nn.Module) -> None:
    """Refuse layers that mix the records of a batch.

    Raises:
        ConfigError: names the layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, MIXES_SAMPLES) and not isinstance(
            layer, nn.modules.instancenorm._InstanceNorm
        ):
            raise ConfigError(
                f"model layer {name!r}: {type(layer).__name__} mixes the records of a batch, which "
                "breaks the privacy guarantee; use GroupNorm"
            )


@dataclass
class _Calls:
    """What the hooks saw: per layer its input and where its output enters the graph.

    The edge is noted instead of the output itself, because a later layer may change the output
    in place (MONAI's residual blocks do).
    """

    plain: list[tuple[nn.Module, Tensor, GradientEdge, torch.Size]] = field(default_factory=list)
    recurrent: list[Recording] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def first_time(self, layer: nn.Module) -> None:
        if id(layer) in self.seen:
            raise ConfigError(
                f"model layer {type(layer).__name__} is used twice in one pass; the fast engine "
                'cannot clip it, use privacy.engine = "opacus"'
            )
        self.seen.add(id(layer))


def contributions(
    model: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> tuple[list[Contribution], Tensor]:
    """Return every layer's contribution for a batch, and the losses ``[B]``.

    ``loss_of`` maps the model's outputs to ``[B]``, each entry from its own record only.
    """
    with _recording(model) as (calls, anchor):
        losses = loss_of(model(inputs))
        edges = [edge for _, _, edge, _ in calls.plain]
        if calls.recurrent:
            edges.append(get_gradient_edge(anchor))
        grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True)
    found: list[Contribution] = []
    for (layer, given, _, shape), grad in zip(calls.plain, grads, strict=False):
        found.append(contribution(layer, given, losses.new_zeros(shape) if grad is None else grad))
    for recording in calls.recurrent:
        found += recording.contributions
    return found, losses.detach()


@contextmanager
def _recording(model: nn.Module) -> Iterator[tuple[_Calls, Tensor]]:
    calls, anchor = _Calls(), torch.zeros((), requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = [
        layer
        for layer in model.modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
    ]

    def remember(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.first_time(layer)
        if not output.requires_grad:
            output.requires_grad_()
        calls.plain.append((layer, given[0].detach(), get_gradient_edge(output), output.shape))
        return output

    def replaced(layer: nn.LSTM | nn.GRU) -> Callable[..., tuple[Tensor, None]]:
        def forward(given: Tensor, state: None = None) -> tuple[Tensor, None]:
            calls.first_time(layer)
            recording = Recording()
            calls.recurrent.append(recording)
            return recorded_forward(layer, given, recording, anchor), None

        return forward

    hooks = []
    try:
        for layer in layers:
            if isinstance(layer, RECURRENT):
                layer.forward = replaced(layer)  # type: ignore[method-assign,assignment]  # for this batch only
            else:
                hooks.append(layer.register_forward_hook(remember))
        for parameter in trained:
            parameter.requires_grad_(False)
        yield calls, anchor
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if isinstance(layer, RECURRENT):
                del layer.forward
