"""Book-keeping: one forward that records layer inputs, one backward for output gradients only.

No parameter requires a gradient while the batch runs, so autograd spends nothing on them; each
layer's contribution is then computed once, in its cheapest form (`layers`, `recurrent`).
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

    from torch.autograd.function import FunctionCtx

    from hospitium_client.training.clipping.contributions import Contribution

MIXES_SAMPLES = (nn.modules.batchnorm._NormBase,)
RECURRENT = (nn.LSTM, nn.GRU)
SEQUENCES = 3
IMAGES = 4
"""Inputs of so many dimensions are images ``[batch, channel, height, width]``."""


def check_layers(model: nn.Module) -> None:
    """Refuse layers that mix the records of a batch, and parameters that two layers share.

    Raises:
        ConfigError: names the layer.
    """
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        if _mixes_samples(layer):
            raise ConfigError(
                f"model layer {name!r}: {type(layer).__name__} mixes the records of a batch, which "
                "breaks the privacy guarantee; use GroupNorm"
            )
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad and owners.setdefault(id(parameter), name) != name:
                raise ConfigError(
                    f"model layers {owners[id(parameter)]!r} and {name!r} share a parameter, whose "
                    "per-sample gradient would be clipped in two parts; give each its own"
                )
        if isinstance(layer, nn.LSTM) and layer.proj_size:
            raise ConfigError(f"model layer {name!r}: expected an LSTM without proj_size")


def _mixes_samples(layer: nn.Module) -> bool:
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return bool(layer.track_running_stats)
    return isinstance(layer, MIXES_SAMPLES)


@dataclass(frozen=True)
class _Call:
    """One layer's input, and where its output ``[shape]`` enters the graph.

    The edge is noted instead of the output itself, because a later layer may change the output
    in place (MONAI's residual blocks do).
    """

    layer: nn.Module
    inputs: Tensor
    edge: GradientEdge
    shape: torch.Size
    moments: tuple[Tensor, Tensor] | None


@dataclass
class _Calls:
    """What the hooks saw in one pass through the model."""

    plain: list[_Call] = field(default_factory=list)
    recurrent: list[Recording] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def first_time(self, layer: nn.Module) -> None:
        if id(layer) in self.seen:
            raise ConfigError(
                f"model layer {type(layer).__name__} is used twice in one pass; the fast engine "
                'cannot clip it, use privacy.engine = "opacus"'
            )
        self.seen.add(id(layer))

    def check_all_seen(self, layers: list[nn.Module]) -> None:
        """Refuse to train past a layer whose gradients nobody saw."""
        for layer in layers:
            if id(layer) not in self.seen:
                raise ConfigError(
                    f"model layer {type(layer).__name__} has parameters that no forward call of "
                    "its own uses; freeze them, or call the layer"
                )


def contributions(
    model: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> tuple[list[Contribution], Tensor]:
    """Return every layer's contribution for a batch, and the losses ``[B]``.

    ``loss_of`` maps the model's outputs to ``[B]``, each entry from its own record only.
    """
    if inputs.dim() == IMAGES:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    layers = _trained_layers(model)
    with _recording(model, layers) as (calls, anchor):
        losses = loss_of(model(inputs))
        calls.check_all_seen(layers)
        edges = [call.edge for call in calls.plain]
        if calls.recurrent:
            edges.append(get_gradient_edge(anchor))
        grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True)
    found: list[Contribution] = []
    for call, grad in zip(calls.plain, grads, strict=False):
        back = losses.new_zeros(call.shape) if grad is None else grad
        found.append(contribution(call.layer, call.inputs, back, call.moments))
    for recording in calls.recurrent:
        found += recording.contributions
    return found, losses.detach()


class _Enter(torch.autograd.Function):
    """Begins the graph at a layer's output, which later layers may still change in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None


def _moments(node: object) -> tuple[Tensor, Tensor] | None:
    """Return the mean and inverse deviation that a GroupNorm's forward kept for its backward."""
    mean = getattr(node, "_saved_result1", None)
    inverse = getattr(node, "_saved_result2", None)
    return None if mean is None or inverse is None else (mean, inverse)


def _trained_layers(model: nn.Module) -> list[nn.Module]:
    return [
        layer
        for layer in model.modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
    ]


class _Recorder:
    """Puts hooks and replaced forwards on a model, and takes them off again."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.calls, self.anchor = _Calls(), torch.zeros((), requires_grad=True)
        self._layers = layers
        self._hooks = [
            layer.register_forward_hook(self._remember)
            for layer in layers
            if not isinstance(layer, RECURRENT)
        ]
        for layer in layers:
            if isinstance(layer, RECURRENT):
                layer.forward = self._replaced(layer)  # type: ignore[method-assign,assignment]  # for this batch only

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            if isinstance(layer, RECURRENT):
                del layer.forward

    def _remember(self, layer: nn.Module, given: tuple[object, ...], output: object) -> Tensor:
        self.calls.first_time(layer)
        if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            raise ConfigError(
                f"model layer {type(layer).__name__}: expected a layer that maps one tensor to one "
                "tensor; the fast engine clips no other"
            )
        moments = _moments(output.grad_fn) if isinstance(layer, nn.GroupNorm) else None
        entered: Tensor = output
        if not output.requires_grad:
            entered = _Enter.apply(output, self.anchor)  # type: ignore[no-untyped-call]  # torch types apply so
        edge = get_gradient_edge(entered)
        self.calls.plain.append(_Call(layer, given[0].detach(), edge, entered.shape, moments))
        return entered

    def _replaced(self, layer: nn.LSTM | nn.GRU) -> Callable[..., tuple[Tensor, None]]:
        def forward(given: object, state: object = None) -> tuple[Tensor, None]:
            self.calls.first_time(layer)
            if not isinstance(given, Tensor) or given.dim() != SEQUENCES or state is not None:
                raise ConfigError(
                    f"model layer {type(layer).__name__}: expected padded input [batch, time, "
                    "feature] and no first state; packed sequences reorder patients"
                )
            recording = Recording()
            self.calls.recurrent.append(recording)
            return recorded_forward(layer, given, recording, self.anchor), None

        return forward


@contextmanager
def _recording(model: nn.Module, layers: list[nn.Module]) -> Iterator[tuple[_Calls, Tensor]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    recorder = _Recorder(layers)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield recorder.calls, recorder.anchor
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        recorder.remove()
