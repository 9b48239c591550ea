"""One site's training in one round: global weights in, a local update and its cost out."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hospitium_client.training.augment import augmentation
from hospitium_client.training.clip_norm import ClipNorms
from hospitium_client.training.losses import per_sample_loss
from hospitium_client.training.optimizers import local_optimizer
from hospitium_client.training.private import PrivateStepPlan, train_privately

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Generator, Tensor, nn

    from hospitium_client.samples import Samples
    from hospitium_common.entropy import Entropy
    from hospitium_common.study import Study


@dataclass(frozen=True, kw_only=True)
class LocalTotals:
    """What a training run did. Nothing here leaves the site unmasked."""

    steps: int
    mean_loss: float
    dropped_non_finite: int


def private_plan(study: Study, samples: Samples, noise_multiplier: float) -> PrivateStepPlan:
    """Return how this site trains privately in every round of the study."""
    privacy = study.privacy
    units = protected_units(study, samples)
    return PrivateStepPlan(
        sample_rate=study.sampling_rate(units),
        noise_multiplier=noise_multiplier,
        clip_norm=privacy.clip_norm,
        steps=study.steps_per_round(units),
        unit=privacy.unit,
        records_per_patient=privacy.records_per_patient,
        engine=privacy.engine,
        physical_batch=privacy.physical_batch,
        augmentation_multiplicity=privacy.augmentation_multiplicity,
        honest_sites=privacy.honest_sites,
        clip_quantile=privacy.clip_quantile,
    )


def protected_units(study: Study, samples: Samples) -> int:
    """How many patients (or records, where the study asked for that unit) are protected."""
    return samples.patient_count if study.privacy.unit == "patient" else len(samples)


def train_with_privacy(
    model: nn.Module,
    samples: Samples,
    study: Study,
    training_round: int,
    *,
    plan: PrivateStepPlan,
    home: Path,
    entropy: Entropy,
    on_step: Callable[[], None] | None = None,
) -> LocalTotals:
    """Train the model in place with the study's optimizer under differential privacy.

    A clipping norm that follows a quantile is kept in ``home`` from round to round. It depends on
    noisy counts only, whose cost is in the plan's.
    """
    norms = ClipNorms(home)
    if plan.clip_quantile is not None:
        plan = replace(plan, clip_norm=norms.before(training_round, plan.clip_norm))
    with _dropout_from(entropy("training/dropout"), samples.inputs.device):
        totals = train_privately(
            model,
            samples,
            per_sample_loss=per_sample_loss(study),
            optimizer=local_optimizer(study, model.parameters(), training_round),
            plan=plan,
            entropy=entropy,
            augment=augmentation(study),
            proximal=_proximal(model, study),
            on_step=on_step,
        )
    if plan.clip_quantile is not None:
        norms.note(training_round, totals.clip_norm)
    return LocalTotals(
        steps=totals.steps,
        mean_loss=totals.mean_loss,
        dropped_non_finite=totals.dropped_non_finite,
    )


def train_without_privacy(
    model: nn.Module,
    samples: Samples,
    study: Study,
    training_round: int,
    *,
    entropy: Entropy,
    on_step: Callable[[], None] | None = None,
) -> LocalTotals:
    """Train the model in place on shuffled batches, epoch after epoch."""
    loss_of, augment = per_sample_loss(study), augmentation(study)
    optimizer = local_optimizer(study, model.parameters(), training_round)
    proximal = _proximal(model, study)
    generator = torch.Generator().manual_seed(_seed(entropy("training/order")))
    steps = study.steps_per_round(len(samples))
    loss_sum, seen = 0.0, 0
    model.train()
    with _dropout_from(entropy("training/dropout"), samples.inputs.device):
        for index in _batches(len(samples), study.training.batch_size, steps, generator):
            inputs = samples.inputs[index]
            if augment is not None:
                inputs = augment(inputs, generator)
            losses = loss_of(model(inputs), samples.targets[index])
            optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()  # type: ignore[no-untyped-call]  # torch types backward so
            if proximal is not None:
                _pull_back(model, *proximal)
            optimizer.step()
            loss_sum += float(losses.detach().sum())
            seen += len(index)
            if on_step is not None:
                on_step()
    mean = loss_sum / seen if seen else math.nan
    return LocalTotals(steps=steps, mean_loss=mean, dropped_non_finite=0)


def _batches(records: int, size: int, steps: int, generator: Generator) -> Iterator[Tensor]:
    """Yield ``steps`` batches of shuffled record numbers, reshuffling whenever all were seen."""
    done = 0
    while done < steps:
        order = torch.randperm(records, generator=generator)
        for batch in torch.split(order, size)[: steps - done]:
            yield batch
            done += 1


def _proximal(model: nn.Module, study: Study) -> tuple[float, dict[str, Tensor]] | None:
    """FedProx's pull towards the weights that the round began with (Li et al. 2020)."""
    if study.strategy.proximal_mu == 0:
        return None
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    return study.strategy.proximal_mu, begin


def _pull_back(model: nn.Module, mu: float, begin: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - begin[name], alpha=mu)


def _seed(entropy: bytes) -> int:
    return int.from_bytes(entropy[:7], "big")


@contextmanager
def _dropout_from(entropy: bytes, device: torch.device) -> Iterator[None]:
    """Draw dropout from these bytes and leave the process's global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(entropy))
        yield
