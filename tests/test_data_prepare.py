"""From records to model inputs, and the federated normalisation, on numbers checked by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hospitium_client.data.prepare import carried_forward, feature_sums, prepare
from hospitium_client.data.records import Records
from hospitium_common.errors import PeerProtocolError
from hospitium_common.normalisation import SUM_SCALE, Normalisation
from tests.federation_kit import hospital, study_of
from tests.test_data_images import film_study
from tests.test_data_tables import ehr_study


def stays(values, ages) -> Records:
    return Records(
        values=np.array(values, np.float32),
        statics=np.array(ages, np.float32)[:, None],
        targets=np.zeros(len(values), np.int64),
        patients=np.array([f"p{number}" for number in range(len(values))]),
    )


def test_values_are_carried_forward_with_a_mask_and_an_age():
    nan = np.nan
    study = ehr_study()  # HR and log Lactate on 4 steps, Age
    records = stays([[[nan, nan], [80, nan], [nan, np.e], [nan, nan]]], [60])
    figures = Normalisation(
        means=np.array([100.0, 0.0, 50.0]), deviations=np.array([10.0, 0.5, 20.0])
    )
    inputs = prepare(records, figures, study).inputs[0]
    #   value HR | value Lactate | measured | measured | age | age | Age | known | valid
    expected = [
        [0.0, 0.0, 0, 0, 1.00, 1.0, 0.5, 1, 1],
        [-2.0, 0.0, 1, 0, 0.00, 1.0, 0.5, 1, 1],
        [-2.0, 2.0, 0, 1, 0.25, 0.0, 0.5, 1, 1],
        [-2.0, 2.0, 0, 0, 0.50, 0.25, 0.5, 1, 1],
    ]
    np.testing.assert_allclose(inputs, expected, atol=1e-6)
    assert inputs.shape[1] == study.data.features


@given(arrays(np.float32, (2, 6, 3), elements=st.sampled_from([np.nan, 1.0, 2.0, 3.0])))
def test_carrying_forward_agrees_with_a_loop(values):
    filled, since = carried_forward(values)
    for record in range(2):
        for variable in range(3):
            last, age = np.nan, -1
            for step in range(6):
                if not np.isnan(values[record, step, variable]):
                    last, age = values[record, step, variable], 0
                elif age >= 0:
                    age += 1
                found = filled[record, step, variable]
                assert found == last or (np.isnan(found) and np.isnan(last))
                assert since[record, step, variable] == age


def rows(values, patients) -> Records:
    return Records(
        values=np.array(values, np.float32),
        statics=np.zeros((len(values), 0), np.float32),
        targets=np.zeros(len(values), np.int64),
        patients=np.array(patients),
    )


def test_a_patient_counts_once_however_often_measured():
    nan = np.nan
    records = rows([[20, nan, 1], [40, nan, 1], [nan, 100, 1], [90, 200, 1]], ["a", "a", "a", "b"])
    count, total, squares = feature_sums(records, study_of()) / SUM_SCALE
    # age in 0…100: a has 0.2 and 0.4, b 0.9; pressure in 0…200: a has 0.5, b 1
    np.testing.assert_array_equal(count * SUM_SCALE, [2, 2, 2])
    np.testing.assert_allclose(total[:2], [0.3 + 0.9, 0.5 + 1.0], atol=1e-6)
    np.testing.assert_allclose(squares[:2], [(0.04 + 0.16) / 2 + 0.81, 0.25 + 1.0], atol=1e-6)


def test_stays_and_statics_count_patients_too():
    nan = np.nan
    records = stays([[[60, 1]] * 4, [[nan, 1]] * 4, [[nan, nan]] * 4], [60, 90, nan])
    records = replace(records, patients=np.array(["a", "a", "b"]))
    sums = feature_sums(records, ehr_study())
    assert sums[0].tolist() == [1, 1, 1]
    assert sums[1, 0] == pytest.approx((60 - 20) / 230 * SUM_SCALE, abs=1)
    assert sums[1, 2] == pytest.approx(75 / 120 * SUM_SCALE, abs=1)


def test_films_of_one_patient_count_as_one():
    values = np.stack([np.full((1, 16, 16), grey, np.float32) for grey in (0.2, 0.4, 1.0)])
    records = replace(rows([[0]] * 3, ["a", "a", "b"]), values=values)
    sums = feature_sums(records, film_study())
    assert sums[0].tolist() == [2]
    np.testing.assert_allclose(sums[1:, 0] / SUM_SCALE, [1.3, 1.1], atol=1e-6)


def test_one_patient_measured_two_dozen_times_stays_invisible():
    nan = np.nan
    lactates = rows([[nan, nan, 7.0 + hour / 10] for hour in range(24)], ["a"] * 24)
    figures = Normalisation.from_totals(feature_sums(lactates, study_of()), study_of())
    nobody = Normalisation.from_totals(np.zeros((3, 3), np.int64), study_of())
    assert (figures.means == nobody.means).all()
    assert (figures.deviations == nobody.deviations).all()


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_a_patient_moves_no_sum_by_more_than_one(records, seed):
    generator = np.random.default_rng(seed)
    values = generator.uniform([0, 0, 0.1], [100, 200, 30], (records, 3))
    values[generator.random(values.shape) < 0.5] = np.nan
    sums = feature_sums(rows(values, ["a"] * records), study_of())
    assert sums.min() >= 0
    assert sums[0].max() <= 1
    assert sums[1:].max() <= SUM_SCALE


def test_sums_over_hospitals_give_the_mean_and_spread_over_all_patients():
    study = study_of()
    everyone = [hospital(seed) for seed in range(1, 5)]
    totals = sum(feature_sums(records, study) for records in everyone)
    figures = Normalisation.from_totals(totals, study)
    values = np.concatenate([records.values for records in everyone]).astype(np.float64)
    values[:, 2] = np.log(values[:, 2])
    table = pd.DataFrame(values).groupby(np.concatenate([one.patients for one in everyone]))
    means = table.mean().mean()
    squares = pd.DataFrame(values**2).groupby(table.ngroup()).mean().mean()
    np.testing.assert_allclose(figures.means, means, rtol=1e-4)
    np.testing.assert_allclose(figures.deviations, np.sqrt(squares - means**2), rtol=1e-3)


def test_totals_that_no_honest_sites_could_send_give_figures_within_the_range():
    totals = np.array([[30] * 3, [2**40] * 3, [2**50, 0, -(2**40)]], np.int64)
    figures = Normalisation.from_totals(totals, study_of())
    assert (figures.means <= [100, 200, np.log(30) + 1e-9]).all()
    assert (figures.deviations <= [50, 100, np.log(300) / 2 + 1e-9]).all()
    assert (figures.deviations > 0).all()


def test_one_odd_value_is_clipped_to_ten_deviations():
    figures = Normalisation(means=np.array([1.0, 1, 0]), deviations=np.array([0.1, 0.1, 0.1]))
    inputs = prepare(rows([[100, 0.5, 1.0], [0, 1, 1]], ["a", "b"]), figures, study_of()).inputs
    np.testing.assert_allclose(inputs[0, :3], [10, -5, 0], atol=1e-5)
    assert inputs[1, 0] == -10
    events = stays([[[250, 30]] * 4], [120])
    inputs = prepare(events, figures, ehr_study()).inputs
    assert inputs.max() == 10
    films = replace(rows([[0]], ["a"]), values=np.ones((1, 1, 16, 16), np.float32))
    one = Normalisation(means=np.zeros(1), deviations=np.full(1, 1e-3))
    assert prepare(films, one, film_study()).inputs.max() == 10


def test_sums_are_whole_numbers_that_never_go_below_zero():
    sums = feature_sums(hospital(1), study_of())
    assert sums.dtype == np.int64
    assert sums.min() >= 0
    assert sums[1].max() <= 60 * SUM_SCALE


def test_a_feature_that_hardly_anybody_measured_says_nothing_about_those_few():
    totals = np.array([[19, 100, 100], [0, 0, 0], [0, 0, 0]], np.int64)
    totals[1] = (totals[0] * 0.9 * SUM_SCALE).astype(np.int64)
    figures = Normalisation.from_totals(totals, study_of())
    assert figures.means[0] == 50.0  # the middle of 0…100
    assert figures.means[1] == pytest.approx(180.0, rel=1e-3)


def test_normalisation_survives_its_trip_and_a_shorter_one_does_not():
    study = study_of()
    figures = Normalisation(means=np.array([1.0, 2.0, 3.0]), deviations=np.array([1.0, 1.0, 0.5]))
    again = Normalisation.decode(figures.encode(), study)
    assert (again.means == figures.means).all()
    assert (again.deviations == figures.deviations).all()
    with pytest.raises(PeerProtocolError):
        Normalisation.decode(figures.encode()[:-1], study)
    bad = Normalisation(means=np.array([1.0, np.nan, 3.0]), deviations=np.ones(3))
    with pytest.raises(PeerProtocolError, match="finite means"):
        Normalisation.decode(bad.encode(), study)
    flat = Normalisation(means=np.zeros(3), deviations=np.array([1.0, np.inf, 1.0]))
    with pytest.raises(PeerProtocolError, match="positive deviations"):
        Normalisation.decode(flat.encode(), study)


def test_table_rows_carry_a_flag_for_every_gap():
    figures = Normalisation(means=np.array([50.0, 100.0, 0.0]), deviations=np.array([10.0, 20, 1]))
    records = hospital(1).take(np.arange(3))
    values = np.array([[60, np.nan, 1.0], [50, 100, np.e], [np.nan] * 3], np.float32)
    records = Records(
        values=values, statics=records.statics, targets=records.targets, patients=records.patients
    )
    inputs = prepare(records, figures, study_of()).inputs
    expected = [[1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(inputs, expected, atol=1e-6)
