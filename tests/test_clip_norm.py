"""The clipping norm that follows a quantile: where it goes, what it costs, what it never does."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hospitium_client.training.clip_norm import (
    LARGEST_NORM,
    SMALLEST_NORM,
    ClipNorms,
    FixedNorm,
    FollowedNorm,
    clip_norm_of,
    count_noise,
    gradient_noise,
)
from hospitium_client.training.noise import SecureNoise
from hospitium_client.training.private import PrivateStepPlan
from hospitium_common.study.reading import validate
from tests.federation_kit import Notes, hospitals, private_study_of


def plan_of(**changes) -> PrivateStepPlan:
    settings = {
        "sample_rate": 0.1, "noise_multiplier": 1.0, "clip_norm": 1.0, "steps": 1,
        "unit": "patient", "records_per_patient": 4, "engine": "fast", "physical_batch": 256,
    }  # fmt: skip
    return PrivateStepPlan(**settings | changes)


@given(st.floats(0.3, 100), st.floats(1, 10_000))
def test_gradients_and_count_together_cost_what_the_plan_says(multiplier, expected):
    gradients, count = gradient_noise(multiplier, expected), count_noise(multiplier, expected)
    # Two Gaussian releases of sensitivity 1 and 1/2 are one whose squared ratios add up.
    together = 1 / gradients**2 + 0.5**2 / count**2
    assert math.isclose(together, 1 / multiplier**2, rel_tol=1e-9)
    assert multiplier < gradients < 1.0207 * multiplier


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_the_norm_settles_at_the_wanted_quantile_of_the_norms(quantile):
    generator, noise = np.random.default_rng(1), SecureNoise(b"n" * 32)
    norm = FollowedNorm(plan_of(clip_norm=0.01), quantile, expected=500.0)
    for _ in range(400):
        norm.see(torch.from_numpy(generator.lognormal(1.0, 0.5, 250)))
        norm.see(torch.from_numpy(generator.lognormal(1.0, 0.5, 250)))  # two parts of one step
        norm.step(noise)
    settled = np.exp(1.0 + 0.5 * {0.3: -0.5244, 0.5: 0.0, 0.9: 1.2816}[quantile])
    assert 0.85 * settled < norm.value < 1.15 * settled


def test_infinite_and_undefined_norms_count_as_clipped_and_empty_steps_move_little():
    noise = SecureNoise(b"n" * 32)
    norm = FollowedNorm(plan_of(), 0.5, expected=1000.0)
    norm.see(torch.full((1000,), math.nan))
    norm.step(noise)
    assert norm.value > 1.05  # nobody unclipped: the norm grows
    before = norm.value
    norm.step(noise)
    assert math.isclose(norm.value, before, rel_tol=0.1)


def test_the_norm_stays_within_bounds_whatever_is_counted():
    noise = SecureNoise(b"n" * 32)
    for norms, bound in ((torch.zeros(10), SMALLEST_NORM), (torch.full((10,), 1e9), LARGEST_NORM)):
        norm = FollowedNorm(plan_of(), 0.5, expected=10.0)
        for _ in range(400):
            norm.see(norms)
            norm.step(noise)
        assert math.isclose(norm.value, bound)


def test_gradients_count_in_units_of_the_norm():
    followed = clip_norm_of(plan_of(clip_norm=4.0, clip_quantile=0.5), 100.0)
    assert isinstance(followed, FollowedNorm)
    assert followed.divisor == 400.0
    assert math.isclose(followed.noise, 4.0 * gradient_noise(1.0, 100.0))
    fixed = clip_norm_of(plan_of(clip_norm=4.0), 100.0)
    assert isinstance(fixed, FixedNorm)
    assert (fixed.divisor, fixed.noise) == (100.0, 4.0)


def test_a_round_done_again_begins_with_the_norm_of_the_round_before(tmp_path):
    norms = ClipNorms(tmp_path)
    assert norms.before(1, first=1.0) == 1.0
    norms.note(1, 2.0)
    norms.note(2, 3.0)
    assert ClipNorms(tmp_path).before(2, first=1.0) == 2.0
    assert norms.before(3, first=1.0) == 3.0


def test_a_study_may_ask_for_it_and_every_site_follows_its_own(tmp_path):
    from hospitium_simulations.federation import SimulationOptions, simulate

    study = private_study_of(privacy={"mode": "dp", "epsilon": 8.0, "clip_quantile": 0.5})
    outcome = simulate(
        study, hospitals(3), tmp_path, SimulationOptions(masked=False), Notes()
    )  # fmt: skip
    found = {
        ClipNorms(home).before(study.rounds + 1, first=1.0)
        for home in (tmp_path / "sites").iterdir()
    }
    assert len(found) == 3 and 1.0 not in found
    assert np.isfinite(outcome.result.last.parameters).all()


@pytest.mark.parametrize("quantile", [0, 1, -0.5])
def test_a_quantile_is_between_0_and_1(quantile):
    from hospitium_common.errors import ConfigError
    from hospitium_common.study import Study

    document = private_study_of().model_dump(mode="json")
    document["privacy"]["clip_quantile"] = quantile
    with pytest.raises(ConfigError, match="clip_quantile"):
        validate(Study, document, "study.toml")
