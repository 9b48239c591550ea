"""What `private` measures: models, a batch for each, and one step of every way to train them.

Plain is a forward and a backward; the others also clip every record's gradient and add up.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.clipped_sum import clipped_sum
from hospitium_client.training.clipping.contributions import Contribution, Instantiated
from hospitium_client.training.clipping.fast import contributions
from hospitium_client.training.clipping.opacus_hooks import with_private_recurrence
from hospitium_common.models.deep_cnn import deep_cnn
from hospitium_common.models.recurrent import RecurrentClassifier
from hospitium_common.models.small_cnn import small_cnn
from hospitium_common.study.schema import DeepCnn, Recurrent, SmallCnn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Step = Callable[[], None]

BATCH = 64
CLIP_NORM = 1.0
PLAIN, PLAIN_LAST = "plain", "plain, channels last"
HOOKS, GHOST, OURS = "Opacus hooks", "Opacus ghost", "ours"
SIDES = (PLAIN, PLAIN_LAST, HOOKS, GHOST, OURS)
IMAGES = 4


def subject(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model and a batch for it."""
    if "ResNet" in name:
        size = int(name[-2:])
        network = deep_cnn(DeepCnn(name="resnet18"), channels=1, size=(size, size), classes=2)
        return network, torch.randn(BATCH, 1, size, size)
    if "CNN" in name:
        options = SmallCnn(name="small_cnn", dropout=0.0)
        return small_cnn(options, channels=1, classes=2), torch.randn(BATCH, 1, 28, 28)
    kind = Recurrent(
        name="lstm" if "LSTM" in name else "gru", hidden=128, layers=1, dropout=0.0, pooling="last"
    )
    inputs = torch.randn(BATCH, 48, 40)
    inputs[..., -1] = 1.0
    return RecurrentClassifier(kind, features=40, classes=2), inputs


def side(label: str, model: nn.Module, inputs: Tensor) -> Step | None:
    """Return one step of one way to train the model; none where that way cannot."""
    if label == PLAIN:
        return _plain(model, inputs)
    if label == PLAIN_LAST:
        if inputs.dim() != IMAGES:
            return None
        last = torch.channels_last
        model.to(memory_format=last)  # type: ignore[call-overload]  # missing in torch's stub
        return _plain(model, inputs.contiguous(memory_format=last))
    if label == HOOKS:
        hooked = GradSampleModule(with_private_recurrence(model), loss_reduction="sum")
        return lambda: _hooks(hooked, inputs)
    if label == GHOST:
        ghost = GradSampleModuleFastGradientClipping(
            with_private_recurrence(model), max_grad_norm=CLIP_NORM, loss_reduction="sum"
        )
        return lambda: _ghost(ghost, inputs)
    return lambda: _clip(contributions(model, inputs, _losses)[0])


def all_sides(name: str) -> dict[str, Step]:
    """Return one step of every way, on the same weights and batch."""
    model, inputs = subject(name)
    steps = {label: side(label, copy.deepcopy(model), inputs) for label in SIDES}
    return {label: step for label, step in steps.items() if step is not None}


def _losses(logits: Tensor) -> Tensor:
    targets = torch.arange(BATCH) % 2
    return functional.cross_entropy(logits, targets, reduction="none")


def _clip(found: Sequence[Contribution]) -> None:
    clipped_sum(
        found,
        unit_of=torch.arange(BATCH),
        units=BATCH,
        weights=torch.ones(BATCH),
        clip_norm=CLIP_NORM,
    )


def _plain(model: nn.Module, inputs: Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        _losses(model(inputs)).mean().backward()  # type: ignore[no-untyped-call]  # torch types backward so

    return step


def _hooks(model: GradSampleModule, inputs: Tensor) -> None:
    model.zero_grad()
    _losses(model(inputs)).sum().backward()  # type: ignore[no-untyped-call]  # torch types backward so
    _clip([Instantiated([(p, p.grad_sample) for p in model.parameters()])])
    for parameter in model.parameters():
        parameter.grad_sample = None


def _ghost(model: GradSampleModuleFastGradientClipping, inputs: Tensor) -> None:
    model.zero_grad()
    losses = _losses(model(inputs))
    losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]  # torch types backward so
    model.zero_grad()
    factors = model.get_clipping_coef()
    model.disable_hooks()
    (factors * losses).sum().backward()
    model.enable_hooks()
