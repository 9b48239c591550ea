"""Medians and trimmed means over groups: by hand, against numpy, and with bad groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hospitium_server import combination
from hospitium_server.combination import combine
from tests.federation_kit import study_of


def study_with(groups, how="median"):
    cohort = {"maximum_sites": 3 * groups}
    return study_of(robustness={"groups": groups, "combine": how}, cohort=cohort)


def rows(*given):
    return [np.array(row, float) for row in given]


def test_one_group_is_its_own_mean():
    (mean,) = rows([1.0, -2.0])
    assert combine([mean], study_of()) is mean


def test_the_median_is_taken_coordinate_by_coordinate():
    means = rows([1, 10, -1], [2, 30, 0], [9, 20, -9])
    np.testing.assert_array_equal(combine(means, study_with(3)), [2, 20, -1])


def test_the_trimmed_mean_leaves_out_one_of_five_at_each_end():
    means = rows([100], [1], [2], [3], [-100])
    assert combine(means, study_with(5, "trimmed_mean"))[0] == 2.0


def test_of_ten_groups_two_are_left_out_at_each_end():
    means = rows(*([value] for value in (9e9, 8e9, 1, 2, 3, 4, 5, 6, -8e9, -9e9)))
    assert combine(means, study_with(10, "trimmed_mean"))[0] == 3.5


@pytest.mark.parametrize("how", ["median", "trimmed_mean"])
def test_two_groups_that_are_left_after_a_bad_one_was_found_are_averaged(how):
    np.testing.assert_array_equal(combine(rows([1, 5], [3, 7]), study_with(3, how)), [2, 6])


def test_long_vectors_are_combined_in_pieces(monkeypatch):
    monkeypatch.setattr(combination, "CHUNK", 7)
    means = list(np.random.default_rng(1).normal(size=(5, 100)))
    np.testing.assert_array_equal(combine(means, study_with(5)), np.median(means, axis=0))


@settings(deadline=None, max_examples=100)
@given(
    arrays.arrays(np.float64, (3, 4), elements=st.floats(-1, 1)),
    arrays.arrays(np.float64, (2, 4), elements=st.floats(-1e12, 1e12)),
    st.permutations(range(5)),
)
def test_fewer_than_half_bad_groups_never_move_the_median_out_of_the_good_ones(good, bad, order):
    means = [np.concatenate([good, bad])[at] for at in order]
    combined = combine(means, study_with(5))
    assert (combined >= good.min(axis=0)).all()
    assert (combined <= good.max(axis=0)).all()
