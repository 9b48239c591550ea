"""The public rotation: orthogonal, undone exactly, the same at any time, and fair to outliers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hospitium_common.secagg.rotation import AT_ONCE, rotate, rotate_back

SEED = b"s" * 32


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 5000), seed=st.binary(min_size=32, max_size=32), wide=st.booleans())
def test_any_vector_keeps_its_length_and_comes_back(size, seed, wide):
    real, tolerance = (np.float64, 1e-12) if wide else (np.float32, 1e-5)
    vector = np.random.default_rng(size).standard_t(2, size).astype(real)
    turned = vector.copy()
    rotate(turned, seed)
    np.testing.assert_allclose(
        np.linalg.norm(turned.astype(float)), np.linalg.norm(vector.astype(float)), rtol=tolerance
    )
    rotate_back(turned, seed)
    np.testing.assert_allclose(
        turned, vector, atol=tolerance * max(1, np.abs(vector).max(initial=0))
    )


@pytest.mark.parametrize("size", [1, 4, 7, 64, 70])
def test_it_is_an_orthogonal_matrix(size):
    rows = np.eye(size)
    for row in rows:
        rotate(row, SEED)
    np.testing.assert_allclose(rows @ rows.T, np.eye(size), atol=1e-12)


def test_four_values_are_mixed_as_the_hadamard_matrix_says():
    row = np.array([8.0, 0.0, 0.0, 0.0])
    rotate(row, SEED)
    np.testing.assert_allclose(np.abs(row), 4.0)


def test_one_outlier_becomes_a_thousand_small_values():
    vector = np.zeros(5000, np.float32)
    vector[1234] = 1.0
    rotate(vector, SEED)
    assert np.abs(vector).max() == pytest.approx(1 / 32)


def test_no_place_is_left_out_where_the_last_square_overlaps():
    for place in range(1030):
        vector = np.zeros(1030)
        vector[place] = 1.0
        rotate(vector, SEED)
        assert np.abs(vector).max() < 0.2


def test_another_seed_turns_another_way():
    one, other = np.ones(64), np.ones(64)
    rotate(one, SEED)
    rotate(other, bytes(32))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("turn", [rotate, rotate_back])
def test_threads_change_no_bit(turn):
    vector = np.random.default_rng(1).normal(size=3 * AT_ONCE + 77).astype(np.float32)
    alone = vector.copy()
    turn(alone, SEED)
    turn(vector, SEED, threads=3)
    assert alone.tobytes() == vector.tobytes()
