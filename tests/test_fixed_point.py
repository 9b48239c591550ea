"""Reals as ring elements: unbiased rounding, the exact sum, rotation, bounds, and their bytes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hospitium_common.errors import LocalProtocolError, PeerProtocolError
from hospitium_common.secagg import rounding
from hospitium_common.secagg.fixed_point import (
    largest_value,
    quantise,
    rounding_error,
    sum_to_reals,
)
from hospitium_common.secagg.masks import keystream
from hospitium_common.secagg.packing import pack_words, unpack_words
from hospitium_common.secagg.quantiser import Quantiser, quantiser_for
from tests.secagg_kit import policy_of

KEY, SEED = b"k" * 32, b"r" * 32
BITS = (16, 24, 32)


def rotated(*lengths, bound=1.0, mixed=None):
    return Quantiser(
        lengths=lengths, bounds=(bound,) * len(lengths), rotation=SEED,
        mixed=mixed or (True,) * len(lengths),
    )  # fmt: skip


def summed(words, bits):
    total = sum(one.astype(np.int64) for one in words) % (1 << bits)
    return total.astype(np.uint16 if bits == 16 else np.uint32)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=40),
    bits=st.sampled_from(BITS), bound=st.sampled_from([1.0, 0.37, 1e-9]),
)  # fmt: skip
def test_every_value_is_rounded_as_the_formula_says(values, bits, bound):
    policy, values = policy_of(bits), np.array(values, np.float32)
    words, clipped = quantise(
        values, Quantiser(lengths=(len(values),), bounds=(bound,)), policy, KEY
    )
    real, limit = rounding.real_type(bits, wraps=False), largest_value(policy) - 1
    dither = np.frombuffer(keystream(KEY, 2 * len(values)), np.uint16)
    factor = limit * 2**16 / bound
    scaled = values.astype(real) * real(factor)
    top = limit * 2**16
    expected = [
        math.floor((math.floor(min(max(float(one), -top), top) + 0.5) + int(d)) / 2**16)
        for one, d in zip(scaled, dither, strict=True)
    ]
    halfway = np.abs(np.mod(scaled.astype(float), 1) - 0.5) < 1e-6  # rint takes the even one
    agree = words.astype(np.int64) == np.array(expected) % (1 << bits)
    assert (agree | halfway).all()
    assert clipped == int((np.abs(scaled) > top).sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1e-6, 0.123456, -0.5, -0.999, 1.0])
def test_over_all_dithers_the_mean_is_the_value(bits, value, monkeypatch):
    """Each of the 2^16 dithers once: the sum of the rounded values is exactly r."""
    policy = policy_of(bits)
    monkeypatch.setattr(
        rounding.Keystream, "words", lambda _, count: np.arange(count, dtype=np.uint16)
    )
    values = np.full(1 << 16, value, np.float32)
    words, _ = quantise(values, Quantiser(lengths=(1 << 16,), bounds=(1.0,)), policy, KEY)
    signed = sum_to_reals(words, Quantiser(lengths=(1 << 16,), bounds=(1.0,)), policy)
    limit = largest_value(policy) - 1
    exact = float(values[0]) * limit
    tolerance = 2**-17 + abs(exact) * 2**-23 if bits == 16 else 2**-17 + 1e-6
    assert abs((signed * limit).mean() - exact) <= tolerance


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("turned", [False, True])
def test_threads_change_no_word(bits, turned):
    size = 3 * rounding.CHUNK + 5
    values = np.random.default_rng(2).normal(0, 0.1, size).astype(np.float32)
    quantiser = rotated(size) if turned else Quantiser(lengths=(size,), bounds=(1.0,))
    alone, one = quantise(values, quantiser, policy_of(bits), KEY)
    words, many = quantise(values, quantiser, policy_of(bits), KEY, threads=3)
    assert alone.tobytes() == words.tobytes()
    assert one == many == 0


@pytest.mark.parametrize("bits", BITS)
def test_a_sum_of_rotated_updates_is_their_sum(bits):
    policy, quantiser = policy_of(bits), rotated(3000, 7, 1200)
    updates = [np.random.default_rng(i).normal(0, 0.02, 4207).astype(np.float32) for i in range(5)]
    words = [quantise(x, quantiser, policy, bytes([i]) * 32)[0] for i, x in enumerate(updates)]
    found = sum_to_reals(summed(words, bits), quantiser, policy)
    error = float(np.linalg.norm(found - np.sum(updates, axis=0, dtype=float)))
    stated = rounding_error(quantiser, policy, 5)
    assert 0.5 * stated < error <= stated * 1.05  # a mixed value lies anywhere between two steps


def test_rotation_is_unbiased():
    """Mean of 400 roundings of one vector within 5 standard errors of it, coordinate by
    coordinate on average: false alarm about once in 10^6."""
    policy, quantiser = policy_of(16), rotated(64)
    values = np.random.default_rng(4).normal(0, 0.05, 64).astype(np.float32)
    found = np.mean(
        [
            sum_to_reals(
                quantise(values, quantiser, policy, i.to_bytes(32, "big"))[0], quantiser, policy
            )
            for i in range(400)
        ],
        axis=0,
    )
    step = 1 / (largest_value(policy) - 1)
    distance = float(((found - values) ** 2).sum())
    assert distance < 64 * (step**2 / 4) / 400 * 2


def test_tensors_that_are_not_mixed_stay_exactly_where_they_are():
    policy, quantiser = policy_of(16), rotated(500, 40, 500, mixed=(True, False, True))
    values = np.random.default_rng(5).normal(0, 0.05, 1040).astype(np.float32)
    values[500:540] = 0.0
    words, _ = quantise(values, quantiser, policy, KEY)
    found = sum_to_reals(words, quantiser, policy)
    assert not found[500:540].any()
    np.testing.assert_allclose(found, values, atol=5 / largest_value(policy))


def test_mixing_nothing_is_allowed():
    policy, quantiser = policy_of(16), rotated(9, mixed=(False,))
    words, _ = quantise(np.zeros(9, np.float32), quantiser, policy, KEY)
    assert not sum_to_reals(words, quantiser, policy).any()


def test_rotation_spares_a_heavy_tailed_update():
    """Student's t with 2 degrees of freedom; bounds from the root mean square, as in a study."""
    policy, size = policy_of(16), 50_000
    values = (0.01 * np.random.default_rng(6).standard_t(2, size)).astype(np.float32)
    square = float((values.astype(float) ** 2).sum())
    errors = {}
    for seed in (b"", SEED):
        quantiser = quantiser_for((square,), (size,), 2.0, policy=policy, rotation=seed, sites=4)
        words, _ = quantise(values, quantiser, policy, KEY)
        errors[seed] = np.linalg.norm(sum_to_reals(words, quantiser, policy) - values)
    assert errors[SEED] < errors[b""] / 2.5


def test_rotated_values_beyond_the_bound_are_counted_and_no_sum_is_longer_than_said():
    policy, quantiser = policy_of(16), rotated(1024, 100)
    values = np.full(1124, 50.0, np.float32)
    words, clipped = quantise(values, quantiser, policy, KEY)
    assert clipped > 500
    norm = float(np.linalg.norm(sum_to_reals(words, quantiser, policy)))
    assert norm <= quantiser.largest_norm * (1 + 1e-9)
    assert quantiser.largest_norm == pytest.approx(math.sqrt(1124))


def test_the_largest_norm_takes_the_widest_bound_of_what_is_mixed():
    plain = Quantiser(lengths=(4, 9), bounds=(1.0, 2.0))
    assert plain.largest_norm == pytest.approx(math.sqrt(4 * 1 + 9 * 4))
    mixed = Quantiser(
        lengths=(4, 9, 1), bounds=(1.0, 2.0, 5.0), rotation=SEED, mixed=(True, True, False)
    )
    assert mixed.largest_norm == pytest.approx(math.sqrt(13 * 4 + 25))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_wrapping_loses_nothing_where_the_sum_is_small(bits, turned):
    policy = policy_of(bits)
    quantiser = rotated(300) if turned else Quantiser(lengths=(300,), bounds=(1.0,))
    large = np.full(300, 30.0, np.float32)
    small = np.random.default_rng(7).normal(0, 0.1, 300).astype(np.float32)
    words = [
        quantise(values, quantiser, policy, bytes([i]) * 32, wraps=True)[0]
        for i, values in enumerate((large, -large, small))
    ]
    found = sum_to_reals(summed(words, bits), quantiser, policy)
    np.testing.assert_allclose(found, small, atol=12 / largest_value(policy) + 1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_values_that_are_not_finite_are_refused(bits, turned):
    quantiser = rotated(20) if turned else Quantiser(lengths=(20,), bounds=(1.0,))
    for odd in (np.nan, np.inf, -np.inf):
        values = np.ones(20, np.float32)
        values[3] = odd
        with pytest.raises(LocalProtocolError, match="finite"):
            quantise(values, quantiser, policy_of(bits), KEY)


def test_a_bound_that_no_honest_coordinator_sends_is_refused_too():
    for bound in (1e-35, 1e-320):
        quantiser = Quantiser(lengths=(2,), bounds=(bound,))
        with pytest.raises(LocalProtocolError, match="far beyond its bound"):
            quantise(np.array([0.0, 1.0], np.float32), quantiser, policy_of(16), KEY)


def test_bounds_follow_the_root_mean_square_and_mixing_narrows_them():
    policy = policy_of(16)
    given = ((4.0, 0.0, 1e9), (100, 10, 10), 2.0)  # root mean squares 0.2, 0, 10000
    plain = quantiser_for(*given, policy=policy, sites=9)
    assert plain.bounds == pytest.approx((2.0, 2.0, 2.0))  # 32 · 0.2 is beyond the study's bound
    finer = quantiser_for((4e-4, 0.0, 1e9), *given[1:], policy=policy, sites=9)
    assert finer.bounds == pytest.approx((32 * 0.002, 2.0, 2.0))
    mixed = quantiser_for((4e-4, 0.0, 1e9), *given[1:], policy=policy, rotation=SEED, sites=9)
    assert mixed.bounds == pytest.approx((5 * 3 * 0.002, 2.0, 2.0))
    assert mixed.mixed == (True, False, True)
    many = quantiser_for((4e-4,), (100,), 2.0, policy=policy, rotation=SEED, sites=200)
    assert many.bounds == pytest.approx((32 * 0.002,))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_quantisers_come_back_from_their_bytes(data):
    count = data.draw(st.integers(0, 6))
    seed = data.draw(st.sampled_from([b"", SEED]))
    quantiser = Quantiser(
        lengths=tuple(data.draw(st.integers(0, 2**30)) for _ in range(count)),
        bounds=tuple(data.draw(st.floats(1e-300, 1e300)) for _ in range(count)),
        rotation=seed,
        mixed=tuple(data.draw(st.booleans()) for _ in range(count if seed else 0)),
    )
    assert Quantiser.decode(quantiser.encode()) == quantiser
    bare = Quantiser(lengths=quantiser.lengths, bounds=quantiser.bounds)
    assert (bare.digest == quantiser.digest) == (not seed)


def test_a_quantiser_whose_marks_do_not_fit_is_refused():
    with pytest.raises(LocalProtocolError, match="mark for each tensor"):
        Quantiser(lengths=(3,), bounds=(1.0,), rotation=SEED)
    with pytest.raises(LocalProtocolError, match="mark for each tensor"):
        Quantiser(lengths=(3,), bounds=(1.0,), rotation=b"short", mixed=(True,))
    with pytest.raises(LocalProtocolError, match="mark for each tensor"):
        Quantiser(lengths=(3,), bounds=(1.0,), mixed=(True,))
    good = rotated(3, 4).encode()
    for at in range(len(good) - 2, len(good)):
        bad = bytearray(good)
        bad[at] = 2
        with pytest.raises(PeerProtocolError, match="mark of 0 or 1"):
            Quantiser.decode(bytes(bad))


@pytest.mark.parametrize("bits", BITS)
def test_words_come_back_from_their_bytes(bits):
    words = np.random.default_rng(8).integers(0, 1 << bits, 1001)
    words = words.astype(np.uint16 if bits == 16 else np.uint32)
    packed = pack_words(words, bits)
    assert len(packed) == 1001 * bits // 8
    assert np.array_equal(unpack_words(packed, bits, 1001), words)
    with pytest.raises(PeerProtocolError, match="expected 1001 ring elements"):
        unpack_words(packed[:-1], bits, 1001)
