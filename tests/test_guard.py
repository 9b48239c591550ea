"""What honest sites could have sent: weights, norms, counts and squares, with liars among them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hospitium_common.errors import PeerProtocolError
from hospitium_common.metrics import StatisticsSums, evaluation_sums
from hospitium_common.normalisation import SUM_SCALE
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_server.guard import (
    KnownWeight,
    largest_norm,
    plausible_figures,
    plausible_statistics,
    plausible_weight,
    trusted_moments,
)
from tests.federation_kit import study_of

STUDY = study_of(cohort={"weight_cap": 100})
QUANTISER = Quantiser(lengths=(16, 9), bounds=(0.5, 1.0))


def known(weight, *sites, exact=True):
    return KnownWeight(sites=frozenset(sites), weight=weight, exact=exact)


def test_a_weight_lies_between_one_and_the_cap_per_site():
    assert plausible_weight(3, (1, 2, 3), STUDY, ()) == 3
    assert plausible_weight(300, (1, 2, 3), STUDY, ()) == 300
    for lie in (2, 301, -5, 2**62):
        with pytest.raises(PeerProtocolError, match="from 3 to 300 over sites 1, 2, 3"):
            plausible_weight(lie, (1, 2, 3), STUDY, ())


KNOWN = (
    known(80, 1, 2, exact=False),  # the statistics of sites 1 and 2
    known(100, 1, 2, 3),
    known(200, 1, 2, 3, 4, 5),
)
WEIGHTS = {
    "as before": ((1, 2, 3), 100, True),
    "a little more than before": ((1, 2, 3), 125, True),
    "much more than before": ((1, 2, 3), 126, False),
    "much less than before": ((1, 2, 3), 79, False),
    "with one more site, no less than without it": ((1, 2, 3, 4), 79, False),
    "with one more site, no more than with two": ((1, 2, 3, 4), 251, False),
    "with one more site, in between": ((1, 2, 3, 4), 180, True),
    "over sites never seen together": ((4, 5, 6), 300, True),
    "fewer than were counted as records": ((1, 2), 70, True),
    "more than were counted as records": ((1, 2), 101, False),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_total_weight(case):
    sites, weight, allowed = WEIGHTS[case]
    if allowed:
        assert plausible_weight(weight, sites, STUDY, KNOWN) == weight
        return
    with pytest.raises(PeerProtocolError, match="does not keep to the study"):
        plausible_weight(weight, sites, STUDY, KNOWN)


def test_a_liar_cannot_widen_the_norm_bound_with_the_weight_it_claims():
    strict = study_of(cohort={"weight_cap": 100}, robustness={"update_norm": 2.0})
    for weight in (4, 40, 400):  # as if a liar had claimed anything
        assert largest_norm(strict, QUANTISER, 4, weight, rounding=0.0) == 2.0
    # without update_norm the bound follows from the ring: 4 · sqrt(16/4 + 9) · 100 / weight
    loose = largest_norm(STUDY, QUANTISER, 4, 40, rounding=0.0)
    assert loose == pytest.approx(4 * math.sqrt(13) * 100 / 40)


def test_rounding_has_room_beside_the_studys_norm():
    strict = study_of(cohort={"weight_cap": 100}, robustness={"update_norm": 2.0})
    assert largest_norm(strict, QUANTISER, 4, 200, rounding=0.01) == pytest.approx(2.02)


def figures_of(seed=1, records=40):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 2, records)
    ill = generator.random(records)
    probabilities = np.stack([1 - ill, ill], 1)
    return evaluation_sums(probabilities, targets, generator.random(records), STUDY)


def test_counts_of_real_records_are_plausible_and_so_are_none():
    assert plausible_figures(figures_of(), STUDY).records == 40
    nothing = type(figures_of()).nothing(STUDY)
    assert plausible_figures(nothing, STUDY) is nothing


def negative(sums):
    histogram = sums.histogram.copy()
    histogram[0, 0, 0] -= 100
    histogram[0, 1, 0] += 100
    return replace(sums, histogram=histogram)


MADE_UP = {
    "has a negative count": negative,
    "counts fewer records than scores": lambda sums: replace(sums, records=sums.records - 1),
    "has more decisions than records": lambda sums: replace(sums, confusion=sums.confusion + 1),
    "has a negative loss": lambda sums: replace(sums, loss=-1.0),
    "has a negative Brier score": lambda sums: replace(sums, brier=-1.0),
}


@pytest.mark.parametrize("case", MADE_UP)
def test_figures_are_refused_of_which_one(case):
    with pytest.raises(PeerProtocolError, match="made up its figures"):
        plausible_figures(MADE_UP[case](figures_of()), STUDY)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_honest_squares_are_believed(sites, seed):
    generator = np.random.default_rng(seed)
    updates = generator.normal(size=(sites, 25))
    claimed = [float((updates[:, :16] ** 2).sum()), float((updates[:, 16:] ** 2).sum())]
    trusted = trusted_moments(claimed, updates.sum(axis=0), QUANTISER, sites, ())
    np.testing.assert_allclose(trusted, claimed, rtol=1e-9)


def statistics(**changes):
    """Ten records of 8 patients; the second feature is measured in 3 of them."""
    step = int(SUM_SCALE)
    features = np.array([[8, 3], [4 * step, 3 * step], [2 * step, 3 * step]])
    given = {"records": 10, "class_counts": np.array([6, 4]), "features": features}
    return StatisticsSums(**{**given, **changes})


def features(row, value):
    changed = statistics().features.copy()
    changed[row, 0] = value
    return {"features": changed}


def test_statistics_of_real_records_are_plausible():
    assert plausible_statistics(statistics(), STUDY, 3).records == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"records": -10},
        {"records": 9},
        {"class_counts": np.array([11, -1])},
        features(0, 11),
        features(0, -1),
        features(1, 9 * 2**20),
        features(2, 5 * 2**20),
        features(2, -(2**20)),
    ],
    ids=[
        "negative records", "fewer records than classes", "a negative class", "more patients",
        "negative patients", "a mean above the range", "squares above the mean", "negative squares",
    ],
)  # fmt: skip
def test_statistics_are_refused_with(changes):
    with pytest.raises(PeerProtocolError, match="made up its figures"):
        plausible_statistics(statistics(**changes), STUDY, 3)


def test_squares_that_the_sum_itself_refutes_are_raised_to_what_it_shows():
    total = np.concatenate([np.full(16, 2.0), np.zeros(9)])  # 64 over 4 sites: 16 at least
    assert trusted_moments([0.0, 0.0], total, QUANTISER, 4, ()) == (16.0, 0.0)
    assert trusted_moments([math.nan, 1.0], total, QUANTISER, 4, ()) == (16.0, 1.0)


def test_squares_grow_and_shrink_a_hundredfold_at_most():
    nothing = np.zeros(25)
    assert trusted_moments([1e30, 1e-30], nothing, QUANTISER, 4, (0.5, 0.25)) == (200.0, 0.01)
    assert trusted_moments([3.0, 7.0], nothing, QUANTISER, 4, (0.5, 0.0)) == (3.0, 7.0)
