"""Poisson sampling over patients. Statistical tests state how often they fail by chance."""

import hashlib

import torch
from scipy import stats

from hospitium_client.samples import Samples
from hospitium_client.training.noise import SecureNoise
from hospitium_client.training.sampling import PoissonSampler


def sampler(patients, *, rate, cap=100, unit="patient", name="coins"):
    owners = torch.tensor(patients)
    samples = Samples(
        inputs=torch.zeros(len(owners), 1), targets=torch.zeros(len(owners)).long(), patients=owners
    )
    coins = SecureNoise(hashlib.sha256(name.encode()).digest())
    return PoissonSampler(samples, unit=unit, rate=rate, cap=cap, coins=coins)


def test_every_patient_is_drawn_alone_at_the_booked_rate():
    """False alarms: 1 in 100,000 per patient and pair (binomial bounds)."""
    patients, rate, steps = [0, 1, 1, 2, 2, 2, 3], 0.3, 4000
    source, drawn = sampler(patients, rate=rate), torch.zeros(steps, 4)
    for step in range(steps):
        found = source.draw()
        drawn[step, torch.tensor(patients)[found.records].unique()] = 1
    pairs = torch.stack([(drawn[:, a] * drawn[:, b]).sum() for a, b in [(0, 1), (1, 2), (2, 3)]])
    for share, hits in ((rate, drawn.sum(0)), (rate**2, pairs)):
        low, high = stats.binom.ppf([5e-6, 1 - 5e-6], steps, share)
        assert bool(((hits >= low) & (hits <= high)).all())


def test_a_drawn_patient_brings_all_records_with_equal_weights():
    found = sampler([2, 0, 1, 1, 2, 2], rate=1.0).draw()
    assert found.records.tolist() == [1, 2, 3, 0, 4, 5]
    assert found.unit_of.tolist() == [0, 1, 1, 2, 2, 2]
    torch.testing.assert_close(found.weights, torch.tensor([1, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3]))
    assert found.units == 3


def test_the_cap_keeps_records_chosen_evenly():
    """False alarms: 1 in 100,000 per record (binomial bounds)."""
    source, counts, steps = sampler([0, 0, 0, 0, 1], rate=1.0, cap=2), torch.zeros(5), 2000
    for _ in range(steps):
        found = source.draw()
        assert found.unit_of.tolist() == [0, 0, 1]
        assert len(set(found.records.tolist())) == 3
        counts[found.records] += 1
    low, high = stats.binom.ppf([5e-6, 1 - 5e-6], steps, 0.5)
    assert bool(((counts[:4] >= low) & (counts[:4] <= high)).all())
    assert counts[4] == steps


def test_records_are_units_only_where_asked_for():
    found = sampler([0, 0, 0, 1], rate=1.0, cap=1, unit="record").draw()
    assert found.records.tolist() == [0, 1, 2, 3]
    assert found.units == 4


def test_a_step_may_draw_nobody():
    for patients in ([0, 1, 2], [0, 0, 1]):
        found = sampler(patients, rate=1e-9).draw()
        assert found.units == 0
        assert len(found.records) == len(found.weights) == 0


def test_the_coins_come_from_the_key():
    draws = [
        [tuple(source.draw().records.tolist()) for _ in range(20)]
        for source in (sampler(list(range(30)), rate=0.5, name=n) for n in ("a", "a", "b"))
    ]
    assert draws[0] == draws[1] != draws[2]
