"""Secure noise. Each statistical test says how often it fails although nothing is wrong."""

import hashlib
import math
import time

import pytest
import torch
from scipy import stats

from hospitium_client.training.noise import SecureNoise


def key(name):
    return hashlib.sha256(name.encode()).digest()


def test_the_same_key_gives_the_same_noise_and_another_key_another():
    first, again, other = (SecureNoise(key(n)).normal((1000,), 1.0) for n in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    source = SecureNoise(key("a"))
    assert not torch.equal(source.normal((10,), 1.0), source.normal((10,), 1.0))


@pytest.mark.parametrize("deviation", [0.3, 1.0, 41.0])
def test_noise_has_the_asked_standard_deviation(deviation):
    """False alarms: 1 in a million for each figure (two-sided chi-squared and normal bounds)."""
    count = 200_000
    drawn = SecureNoise(key("deviation")).normal((count,), deviation).double() / deviation
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], count)
    assert low < float(drawn.square().sum()) < high
    assert abs(float(drawn.mean())) < stats.norm.ppf(1 - 5e-7) / math.sqrt(count)


def test_noise_is_normal_also_in_its_tails():
    """False alarms: 1 in a million each (Kolmogorov and Smirnov; Poisson count past 4 sigma)."""
    drawn = SecureNoise(key("tails")).normal((300_000,), 1.0).double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    expected = 2 * stats.norm.sf(4) * len(drawn)
    low, high = stats.poisson.ppf([5e-7, 1 - 5e-7], expected)
    assert low <= (abs(drawn) > 4).sum() <= high


def test_neighbours_and_halves_are_uncorrelated():
    """False alarms: 1 in a million per lag. What shares deviates lies quarters of a part apart."""
    count = 1 << 17
    drawn = SecureNoise(key("pairs")).normal((count,), 1.0).double()
    limit = stats.norm.ppf(1 - 5e-7)
    for values in (drawn, drawn.square() - 1):
        for lag in (1, 2, 1 << 13, 1 << 14, 3 << 13, 1 << 15):
            products = values[:-lag] * values[lag:]
            deviation = float(products.std()) / math.sqrt(count - lag)
            assert abs(float(products.mean())) < limit * deviation, lag


def test_uniform_numbers_fill_the_open_unit_interval_evenly():
    """False alarms: 1 in a million (chi-squared over 256 cells)."""
    drawn = SecureNoise(key("uniform")).uniform(256_000)
    assert drawn.dtype == torch.float64
    assert 0.0 < float(drawn.min()) < float(drawn.max()) < 1.0
    cells = torch.bincount((drawn * 256).long(), minlength=256).double()
    assert float(((cells - 1000) ** 2 / 1000).sum()) < stats.chi2.ppf(1 - 1e-6, 255)


@pytest.mark.parametrize("count", [0, 1, 3, (1 << 15) + 1])
def test_any_shape_is_filled(count):
    drawn = SecureNoise(key("shape")).normal((count, 1), 2.0)
    assert drawn.shape == (count, 1)
    assert drawn.dtype == torch.float32
    assert bool(torch.isfinite(drawn).all())


def test_a_million_numbers_take_a_moment():
    begin = time.perf_counter()
    SecureNoise(key("time")).normal((1_000_000,), 1.0)
    assert time.perf_counter() - begin < 1.0
