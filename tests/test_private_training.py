"""Private training as a whole: what reaches the optimizer, and whose influence is bounded."""

import dataclasses

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from hospitium_client.samples import Samples
from hospitium_client.training.private import PrivateStepPlan, train_privately
from hospitium_common.entropy import seeded_entropy
from hospitium_common.errors import ConfigError, DataRejected

PLAN = PrivateStepPlan(
    sample_rate=1.0, noise_multiplier=1e-6, clip_norm=0.1, steps=1, unit="patient",
    records_per_patient=100, engine="fast", physical_batch=100,
)  # fmt: skip
OWNERS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])


def plan(**changes):
    return dataclasses.replace(PLAN, **changes)


def patients(keep=range(6)):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(len(OWNERS), 1, 6, 6, generator=generator) * 3
    kept = torch.tensor([int(o) in keep for o in OWNERS])
    _, dense = torch.unique(OWNERS[kept], return_inverse=True)
    return Samples(inputs=inputs[kept], targets=(OWNERS % 2)[kept], patients=dense)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        )


def losses(logits, targets):
    return functional.cross_entropy(logits, targets, reduction="none")


def moved(samples, private, *, model=None, rate=1.0, entropy=b"e", **options):
    """Train with plain SGD; return how far the weights went, and the totals."""
    model = network() if model is None else model
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    totals = train_privately(
        model, samples, per_sample_loss=losses, plan=private, entropy=seeded_entropy(entropy),
        optimizer=torch.optim.SGD(model.parameters(), lr=rate), **options,
    )  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return (before - after) / rate, totals


def clipped_by_hand(samples, clip):
    model, total = network(), 0
    for patient in range(samples.patient_count):
        own = samples.patients == patient
        loss = losses(model(samples.inputs[own]), samples.targets[own]).mean()
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
        )
        total = total + gradient * min(1.0, clip / float(gradient.norm()))
    return total


@pytest.mark.parametrize("engine", ["fast", "opacus"])
@pytest.mark.parametrize("physical_batch", [1, 3, 100])
def test_the_optimizer_gets_the_mean_of_the_patients_clipped_gradients(engine, physical_batch):
    found, totals = moved(patients(), plan(engine=engine, physical_batch=physical_batch))
    want = clipped_by_hand(patients(), PLAN.clip_norm) / 6
    assert float((found - want).norm() / want.norm()) < 1e-4
    assert (totals.steps, totals.units_seen, totals.dropped_non_finite) == (1, 6, 0)
    assert totals.events == (PLAN.event,)


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_a_step_interrupted_between_its_parts_leaves_nothing_behind(engine):
    private, model, calls = plan(engine=engine, physical_batch=3), network(), []

    def stopping(logits, targets):
        calls.append(len(targets))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return losses(logits, targets)

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        train_privately(
            model, patients(), per_sample_loss=stopping, plan=private,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0), entropy=seeded_entropy(b"e"),
        )  # fmt: skip
    assert calls == [3, 3]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    again, untouched = (moved(patients(), private, model=m)[0] for m in (model, network()))
    assert torch.equal(again, untouched)


@pytest.mark.parametrize("patient", range(6))
def test_adding_or_removing_one_patient_moves_the_sum_by_at_most_the_clip_norm(patient):
    everyone, _ = moved(patients(), PLAN)
    others, _ = moved(patients([p for p in range(6) if p != patient]), PLAN)
    assert float((6 * everyone - 5 * others).norm()) <= PLAN.clip_norm * (1 + 1e-3)


def test_a_patients_many_records_count_as_one():
    samples = patients()
    flood = Samples(
        inputs=torch.cat([samples.inputs, samples.inputs[:1].repeat(50, 1, 1, 1)]),
        targets=torch.cat([samples.targets, samples.targets[:1].repeat(50)]),
        patients=torch.cat([samples.patients, torch.zeros(50).long()]),
    )
    before, after = moved(samples, PLAN)[0], moved(flood, PLAN)[0]
    assert float(6 * (after - before).norm()) <= 2 * PLAN.clip_norm
    as_records = moved(flood, plan(unit="record"))[1]
    assert as_records.units_seen == 60


@pytest.mark.parametrize("engine", ["fast", "opacus"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_one_broken_record_drops_its_patient_and_nobody_else(engine, poison):
    samples = patients()
    inputs = samples.inputs.clone()
    inputs[4] = poison
    broken = Samples(inputs=inputs, targets=samples.targets, patients=samples.patients)
    found, totals = moved(broken, plan(engine=engine))
    if totals.dropped_non_finite == 0:  # normalisation may tame a huge constant image
        assert bool(torch.isfinite(found).all())
        return
    assert totals.dropped_non_finite == 1
    want = clipped_by_hand(patients([0, 1, 3, 4, 5]), PLAN.clip_norm) / 6
    assert float((found - want).norm() / want.norm()) < 1e-4


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_a_step_without_patients_still_adds_noise_and_is_booked(engine):
    """False alarms: 1 in a million (chi-squared over the weights of 20 empty steps)."""
    private = plan(sample_rate=1e-9, noise_multiplier=2.0, steps=20, engine=engine)
    _, totals = moved(patients(), private, rate=1e-12)
    assert totals.units_seen == 0
    assert totals.events[0].steps == 20
    model, gradients = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    )
    train_privately(
        model, patients(), per_sample_loss=losses, plan=private, optimizer=optimizer,
        entropy=seeded_entropy(b"noise"),
    )  # fmt: skip
    drawn = torch.stack(gradients).double() * (1e-9 * 6) / (2.0 * PLAN.clip_norm)
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], drawn.numel())
    assert low < float(drawn.square().sum()) < high
    assert len({float(row[0]) for row in drawn}) == 20


def test_the_proximal_pull_is_added_after_the_noise_and_unclipped():
    model = network()
    begin = {n: p.detach() - 5.0 for n, p in model.named_parameters()}
    without, _ = moved(patients(), PLAN)
    with_pull, _ = moved(patients(), PLAN, proximal=(2.0, begin))
    torch.testing.assert_close(
        with_pull - without, torch.full_like(without, 10.0), rtol=1e-3, atol=1e-3
    )


def test_augmented_views_are_averaged_before_clipping():
    views = []

    def augment(inputs, generator):
        views.append(len(inputs))
        return inputs

    once, _ = moved(patients(), PLAN)
    thrice, totals = moved(patients(), plan(augmentation_multiplicity=3), augment=augment)
    assert views == [30]
    assert totals.units_seen == 6
    torch.testing.assert_close(once, thrice, rtol=1e-3, atol=1e-5)


def test_training_repeats_with_the_same_entropy_and_differs_with_another():
    private = plan(sample_rate=0.5, noise_multiplier=1.0, steps=5)
    first, again, other = (moved(patients(), private, entropy=e)[0] for e in (b"a", b"a", b"b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_step_is_announced_and_no_gradient_is_left_behind():
    model, steps = network(), []
    moved(patients(), plan(steps=3), model=model, on_step=lambda: steps.append(1))
    assert len(steps) == 3
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize(
    "wrong",
    [{"sample_rate": 0.0}, {"sample_rate": 1.1}, {"noise_multiplier": 0.0}, {"clip_norm": -1.0},
     {"noise_multiplier": float("nan")}, {"steps": 0}, {"physical_batch": 0}],
)  # fmt: skip
def test_a_plan_that_cannot_be_private_is_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        plan(**wrong)


def test_batch_norm_and_empty_data_are_refused_before_any_step():
    with pytest.raises(ConfigError, match="mixes the records"):
        moved(patients(), PLAN, model=nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(DataRejected, match="at least one training patient"):
        moved(patients([]), PLAN)
