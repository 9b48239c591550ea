"""From records to model inputs, and the federated normalisation, on numbers checked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hospitium_client.data.prepare import carried_forward, feature_sums, prepare
from hospitium_client.data.records import Records
from hospitium_common.errors import PeerProtocolError
from hospitium_common.normalisation import SUM_SCALE, Normalisation
from tests.federation_kit import hospital, study_of
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


def test_sums_over_hospitals_give_the_mean_and_spread_of_all_values_together():
    study = study_of()
    everyone = [hospital(seed) for seed in range(1, 5)]
    totals = sum(feature_sums(records, study) for records in everyone)
    figures = Normalisation.from_totals(totals, study)
    values = np.concatenate([records.values for records in everyone]).astype(np.float64)
    values[:, 2] = np.log(values[:, 2])
    np.testing.assert_allclose(figures.means, np.nanmean(values, 0), rtol=1e-4)
    np.testing.assert_allclose(figures.deviations, np.nanstd(values, 0), rtol=1e-3)


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
