"""The accountant against Google's, which computes privacy loss distributions on its own."""

import itertools
import os

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from hospitium_client.training.accounting import (
    calibrate_noise,
    check_delta,
    default_delta,
    epsilon,
    is_within,
)
from hospitium_common.errors import ConfigError
from hospitium_common.privacy import SpendEvent

# (patients, batch), epochs, noise: 48 settings, and two more below that mix several mechanisms.
GRID = list(
    itertools.product(
        [(300, 32), (1000, 64), (5000, 64), (20_000, 256)], [5, 10, 30], [0.7, 1.0, 2.0, 5.0]
    )
)
SETTINGS = GRID if os.environ.get("HOSPITIUM_FULL_GRID") else GRID[::5]


def event(rate, noise, steps):
    return SpendEvent(sampling_rate=rate, noise_multiplier=noise, steps=steps, unit="patient")


def by_google(events, delta):
    accountant = PLDAccountant()
    for one in events:
        mechanism = dp_accounting.GaussianDpEvent(one.noise_multiplier)
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(one.sampling_rate, mechanism), one.steps
        )
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(("data", "epochs", "noise"), SETTINGS)
def test_epsilon_equals_googles_within_one_percent_and_is_never_below(data, epochs, noise):
    patients, batch = data
    events, delta = [event(batch / patients, noise, epochs * patients // batch)], 1e-5
    reference = by_google(events, delta)
    assert reference <= epsilon(events, delta) <= 1.01 * reference


@pytest.mark.parametrize(
    "events",
    [
        [event(0.05, 1.0, 100), event(0.05, 1.5, 200), event(0.1, 2.0, 50)],
        [event(0.01, 0.8, 300), event(0.2, 4.0, 40)],
    ],
)
def test_rounds_with_different_noise_and_rates_compose(events):
    reference = by_google(events, 1e-5)
    assert reference <= epsilon(events, 1e-5) <= 1.01 * reference


def test_rounds_add_up_to_one_long_run_in_any_order():
    apart = [event(0.05, 1.0, 60), event(0.02, 2.0, 10), event(0.05, 1.0, 40)]
    together = [event(0.02, 2.0, 10), event(0.05, 1.0, 100)]
    assert epsilon(apart, 1e-5) == epsilon(together, 1e-5)
    assert epsilon([], 1e-5) == epsilon([event(0.1, 1.0, 0)], 1e-5) == 0.0
    assert epsilon([event(0.1, 0.0, 1)], 1e-5) == float("inf")


@pytest.mark.parametrize(
    ("budget", "rate", "steps"),
    [(8.0, 0.05, 400), (1.0, 0.2, 100), (0.1, 0.01, 500), (3.0, 1.0, 20)],
)
def test_calibrated_noise_keeps_the_budget_and_wastes_little(budget, rate, steps):
    noise = calibrate_noise(epsilon=budget, delta=1e-5, sample_rate=rate, steps=steps)
    spent = epsilon([event(rate, noise, steps)], 1e-5)
    assert 0.99 * budget <= spent <= budget
    assert is_within([event(rate, noise, steps)], 1e-5, budget)
    assert not is_within([event(rate, 0.98 * noise, steps)], 1e-5, budget)


def test_what_was_spent_before_is_part_of_the_budget():
    spent = [event(0.05, 1.5, 100)]
    options = {"epsilon": 3.0, "delta": 1e-5, "sample_rate": 0.05, "steps": 100}
    fresh, after = calibrate_noise(**options), calibrate_noise(**options, spent=spent)
    assert after > fresh
    assert 0.99 * 3.0 <= epsilon([*spent, event(0.05, after, 100)], 1e-5) <= 3.0


def test_a_budget_that_is_already_gone_is_refused():
    with pytest.raises(ConfigError, match="too small"):
        calibrate_noise(
            epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=10, spent=[event(0.5, 0.7, 100)]
        )


def test_delta_is_below_one_patient_in_all():
    assert default_delta(1000) == pytest.approx(1000**-1.1)
    for patients in (2, 10, 100_000):
        check_delta(default_delta(patients), patients)
    with pytest.raises(ConfigError, match="below 1/N"):
        check_delta(0.01, 100)
