"""Book-keeping: one forward that records layer inputs, one backward for output gradients only.

No parameter requires a gradient while the batch runs, so autograd spends nothing on them. Each
layer's contribution is computed once, in its cheapest form, at the moment when the gradient of its
output is there: then both are still in cache, and their memory is free again right away.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hospitium_client.training.clipping.convolution import is_narrow, recorded_convolution
from hospitium_client.training.clipping.group_norm import recorded_group_norm
from hospitium_client.training.clipping.layers import contribution
from hospitium_client.training.clipping.recording import Recording
from hospitium_client.training.clipping.recurrent import recorded_states
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.autograd.function import FunctionCtx

    from hospitium_client.training.clipping.contributions import Contribution

    RecordedForward = Callable[..., object]  # the recording, then what the layer is given

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


def contributions(
    model: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> tuple[list[Contribution], Tensor]:
    """Return every layer's contribution for a batch, and the losses ``[B]``.

    ``loss_of`` maps the model's outputs to ``[B]``, each entry from its own record only. A layer
    whose output does not reach the losses contributes nothing.
    """
    if inputs.dim() == IMAGES:
        # A copy: of one channel, both layouts look alike until the strides say which it is.
        inputs = torch.empty_like(inputs, memory_format=torch.channels_last).copy_(inputs)
    with _recording(model, inputs) as recorder:
        losses = loss_of(model(inputs))
        recorder.check_all_seen()
    recording = recorder.recording
    torch.autograd.grad(losses.sum(), recording.anchor, allow_unused=True)
    return recording.contributions, losses.detach()


class _Enter(torch.autograd.Function):
    """Begins the graph at a layer's output, which later layers may still change in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None


def _trained_layers(model: nn.Module) -> list[nn.Module]:
    return [
        layer
        for layer in model.modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
    ]


class _Recorder:
    """Puts hooks and replaced forwards on a model, and takes them off again."""

    def __init__(self, model: nn.Module, like: Tensor) -> None:
        anchor = torch.zeros((), device=like.device, requires_grad=True)
        self.recording = Recording(anchor)
        self._layers = _trained_layers(model)
        self._seen: set[int] = set()
        self._replaced: list[nn.Module] = []
        self._hooks = []
        for layer in self._layers:
            instead = _recorded_forward(layer)
            if instead is None:
                self._hooks.append(layer.register_forward_hook(self._remember))
            else:
                layer.forward = self._replacement(layer, instead)  # for this batch only
                self._replaced.append(layer)

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._replaced:
            del layer.forward

    def check_all_seen(self) -> None:
        """Refuse to train past a layer whose gradients nobody saw."""
        for layer in self._layers:
            if id(layer) not in self._seen:
                raise ConfigError(
                    f"model layer {type(layer).__name__} has parameters that no forward call of "
                    "its own uses; freeze them, or call the layer"
                )

    def _first_time(self, layer: nn.Module) -> None:
        if id(layer) in self._seen:
            raise ConfigError(
                f"model layer {type(layer).__name__} is used twice in one pass; the fast engine "
                'cannot clip it, use privacy.engine = "opacus"'
            )
        self._seen.add(id(layer))

    def _remember(self, layer: nn.Module, given: tuple[object, ...], output: object) -> Tensor:
        self._first_time(layer)
        if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            raise ConfigError(
                f"model layer {type(layer).__name__}: expected a layer that maps one tensor to one "
                "tensor; the fast engine clips no other"
            )
        entered: Tensor = output
        if not output.requires_grad:
            entered = _Enter.apply(output, self.recording.anchor)  # type: ignore[no-untyped-call]  # torch types apply so
        held = [given[0].detach()]  # popped when used, so that its memory is free again

        def on_the_way_back(grad: Tensor) -> None:
            self.recording.contributions.append(contribution(layer, held.pop(), grad))

        entered.register_hook(on_the_way_back)  # type: ignore[no-untyped-call]  # torch types it so
        return entered

    def _replacement(self, layer: nn.Module, instead: RecordedForward) -> Callable[..., object]:
        def forward(*given: object) -> object:
            self._first_time(layer)
            return instead(self.recording, *given)

        return forward


def _recorded_forward(layer: nn.Module) -> RecordedForward | None:
    """Return the forward that a layer has here in place of its own, if it has one."""
    if isinstance(layer, RECURRENT):
        return partial(_states, layer)
    if type(layer) is nn.GroupNorm:
        return lambda recording, given: recorded_group_norm(layer, given, recording)
    if isinstance(layer, nn.Conv2d) and is_narrow(layer):
        return lambda recording, given: recorded_convolution(layer, given, recording)
    return None


def _states(
    layer: nn.LSTM | nn.GRU, recording: Recording, given: object, state: object = None
) -> tuple[Tensor, None]:
    if not isinstance(given, Tensor) or given.dim() != SEQUENCES or state is not None:
        raise ConfigError(
            f"model layer {type(layer).__name__}: expected padded input [batch, time, feature] and "
            "no first state; packed sequences reorder patients"
        )
    return recorded_states(layer, given, recording), None


@contextmanager
def _recording(model: nn.Module, inputs: Tensor) -> Iterator[_Recorder]:
    trained = [p for p in model.parameters() if p.requires_grad]
    recorder = _Recorder(model, inputs)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield recorder
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        recorder.remove()
