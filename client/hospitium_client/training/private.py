"""Differentially private training of one site in one round (Abadi et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from hospitium_client.training.clip_norm import clip_norm_of
from hospitium_client.training.clipping.clipped_sum import clipped_sum
from hospitium_client.training.clipping.fast import check_layers, contributions
from hospitium_client.training.clipping.opacus_hooks import OpacusHooks
from hospitium_client.training.noise import SecureNoise
from hospitium_client.training.sampling import PoissonSampler, Sample
from hospitium_common.errors import ConfigError, DataRejected
from hospitium_common.privacy import SpendEvent, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, Tensor, nn
    from torch.optim import Optimizer

    from hospitium_client.samples import Samples
    from hospitium_client.training.augment import Augment
    from hospitium_client.training.losses import PerSampleLoss
    from hospitium_common.entropy import Entropy


@dataclass(frozen=True, kw_only=True)
class PrivateStepPlan:
    """How a site trains in one round, all of it fixed before any data is touched.

    ``sample_rate`` is the probability of each unit per step; ``records_per_patient`` caps what
    a patient brings to a step; ``physical_batch`` bounds memory and changes nothing else. With
    ``honest_sites`` > 1 the site adds only its share of the noise, 1/√honest_sites of it: the
    others in the masked sum add theirs. With a ``clip_quantile`` the clipping norm follows that
    quantile of the gradients' norms, from ``clip_norm`` on, and gradients count in units of it.
    """

    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    unit: Unit
    records_per_patient: int
    engine: Literal["fast", "opacus"]
    physical_batch: int
    augmentation_multiplicity: int = 1
    honest_sites: int = 1
    clip_quantile: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"expected a sampling rate in (0, 1], got {self.sample_rate:g}")
        for name in ("noise_multiplier", "clip_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"expected a positive {name}, got {value:g}")
        counts = ("steps", "records_per_patient", "physical_batch", "augmentation_multiplicity")
        for name in (*counts, "honest_sites"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")

    @property
    def event(self) -> SpendEvent:
        """What the round costs, for the accountant and the ledger."""
        return SpendEvent(
            sampling_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
            unit=self.unit,
            honest_sites=self.honest_sites,
        )

    @property
    def own_noise(self) -> float:
        """Standard deviation of the noise that this site adds to a clipped sum."""
        return self.noise_multiplier * self.clip_norm / math.sqrt(self.honest_sites)


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What happened; exact figures of the site's own, never released as they are.

    ``events`` is what to book; it holds nothing but the plan. ``clip_norm`` is the one that the
    next round begins with.
    """

    events: tuple[SpendEvent, ...]
    steps: int
    units_seen: int
    dropped_non_finite: int
    mean_loss: float
    clip_norm: float


def train_privately(
    model: nn.Module,
    samples: Samples,
    *,
    per_sample_loss: PerSampleLoss,
    optimizer: Optimizer,
    plan: PrivateStepPlan,
    entropy: Entropy,
    augment: Augment | None = None,
    proximal: tuple[float, dict[str, Tensor]] | None = None,
    on_step: Callable[[], None] | None = None,
) -> StepTotals:
    """Train the model in place for ``plan.steps`` steps.

    Model and samples are on one device, where everything but the coins and the noise is computed.

    The gradient of a step is (clipped sum + noise) / (expected number of units). A step that
    drew nobody still adds noise and still counts. ``proximal`` pulls towards public weights
    after the noise, so it costs nothing.

    **Guarantees:** the released weights are (epsilon, delta)-private for the units of the plan,
    with the epsilon that `accounting` computes from ``plan.event``. With ``honest_sites`` > 1 that
    is true of the sum over the sites only, and for one step of plain SGD.
    """
    check_layers(model)
    if len(samples) == 0:
        raise DataRejected("expected at least one training patient, got none")
    sampler = PoissonSampler(
        samples,
        unit=plan.unit,
        rate=plan.sample_rate,
        cap=plan.records_per_patient,
        coins=SecureNoise(entropy("training/sampling")),
    )
    noise = SecureNoise(entropy("training/noise"))
    generator = torch.Generator().manual_seed(
        int.from_bytes(entropy("training/augmentation")[:7], "big")
    )
    gradients_of = OpacusHooks(model).contributions if plan.engine == "opacus" else contributions
    units = samples.patient_count if plan.unit == "patient" else len(samples)
    expected = plan.sample_rate * units
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes, device = [parameter.numel() for parameter in trained], samples.inputs.device
    names = {id(p): name for name, p in model.named_parameters()}
    clipping = clip_norm_of(plan, expected)
    loss_sum, seen, records, dropped = 0.0, 0, 0, 0
    model.train()
    for _ in range(plan.steps):
        total = {id(p): torch.zeros_like(p) for p in trained}
        drawn = sampler.draw()
        for part in _physical(drawn, plan.physical_batch):
            inputs, targets, part = _views(samples, part, plan, augment, generator)
            found, losses = gradients_of(model, inputs, _against(targets, per_sample_loss))
            clipped = clipped_sum(
                found, unit_of=part.unit_of.to(device), units=part.units,
                weights=part.weights.to(device), clip_norm=clipping.value,
            )  # fmt: skip
            clipping.see(clipped.norms)
            for parameter, gradient in clipped.gradients:
                total[id(parameter)] += gradient
            dropped += clipped.dropped
            loss_sum += float(torch.nan_to_num(losses, posinf=0.0, neginf=0.0).sum())
            records += len(losses)
        seen += drawn.units
        spread = noise.normal((sum(sizes),), clipping.noise).to(device)
        for parameter, own in zip(trained, torch.split(spread, sizes), strict=True):
            gradient = (total[id(parameter)] + own.view_as(parameter)) / clipping.divisor
            if proximal is not None:
                pull = parameter.detach() - proximal[1][names[id(parameter)]]
                gradient = gradient + proximal[0] * pull
            parameter.grad = gradient
        clipping.step(noise)
        optimizer.step()
        if on_step is not None:
            on_step()
    optimizer.zero_grad(set_to_none=True)
    return StepTotals(
        events=(plan.event,),
        steps=plan.steps,
        units_seen=seen,
        dropped_non_finite=dropped,
        mean_loss=loss_sum / records if records else math.nan,
        clip_norm=clipping.value,
    )


def _against(targets: Tensor, loss: PerSampleLoss) -> Callable[[Tensor], Tensor]:
    return lambda logits: loss(logits, targets)


def _physical(drawn: Sample, limit: int) -> Iterator[Sample]:
    """Cut a step's sample into parts of about ``limit`` records, never through a unit."""
    begin, count = 0, len(drawn.records)
    while begin < count:
        end = min(begin + limit, count)
        while end < count and drawn.unit_of[end] == drawn.unit_of[end - 1]:
            end += 1
        yield Sample(
            records=drawn.records[begin:end],
            unit_of=drawn.unit_of[begin:end] - drawn.unit_of[begin],
            weights=drawn.weights[begin:end],
        )
        begin = end


def _views(
    samples: Samples, part: Sample, plan: PrivateStepPlan, augment: Augment | None,
    generator: Generator,
) -> tuple[Tensor, Tensor, Sample]:  # fmt: skip
    """Return inputs and targets; with multiplicity, several views of each record side by side.

    The gradients of a record's views are averaged before clipping (De et al. 2022).
    """
    inputs, targets = samples.inputs[part.records], samples.targets[part.records]
    if augment is None:
        return inputs, targets, part
    views = plan.augmentation_multiplicity
    if views > 1:
        inputs = inputs.repeat_interleave(views, 0)
        targets = targets.repeat_interleave(views, 0)
        part = Sample(
            records=part.records.repeat_interleave(views),
            unit_of=part.unit_of.repeat_interleave(views),
            weights=part.weights.repeat_interleave(views) / views,
        )
    return augment(inputs, generator), targets, part
