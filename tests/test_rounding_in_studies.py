"""Rounding in whole studies: rotated rings, resumption, and what it is compared with."""

import numpy as np
import pytest

from hospitium_client.training.local import private_plan
from hospitium_client.training.update_noise import update_noise
from hospitium_client.work import SiteWork
from hospitium_common.entropy import seeded_entropy
from hospitium_common.models import build, shared_layout, tensors_of
from hospitium_common.normalisation import Normalisation
from hospitium_common.schedule import rotation_seed
from hospitium_simulations.federation import SimulationOptions, simulate
from tests.federation_kit import Notes, hospital, hospitals, private_study_of, study_of

MASKED, PLAIN = SimulationOptions(), SimulationOptions(masked=False)
NARROW = {"ring_bits": 16}


def run(study, directory, options=MASKED, notes=None):
    return simulate(study, hospitals(3), directory, options, notes or Notes())


def test_rings_of_16_bits_are_rotated_unless_the_study_says_otherwise():
    narrow, wide = study_of(cohort=NARROW), study_of(cohort={"ring_bits": 24})
    assert len(rotation_seed(narrow, 32)) == 32
    assert rotation_seed(narrow, 32) != rotation_seed(narrow, 48)
    assert rotation_seed(wide, 32) == b""
    assert rotation_seed(study_of(cohort={**NARROW, "rotation": False}), 32) == b""
    assert rotation_seed(study_of(cohort={"ring_bits": 24, "rotation": True}), 32) != b""


def test_rotated_rounds_give_the_model_of_plain_sums_up_to_the_stated_error(tmp_path):
    study = study_of(rounds=2, cohort=NARROW)
    notes = Notes()
    masked = run(study, tmp_path / "masked", notes=notes).result.last
    plain = run(study, tmp_path / "plain", PLAIN).result.last
    stated = sum(made.quantisation_error * made.update_norm for made in notes.records)
    moved = np.linalg.norm(masked.parameters - plain.parameters)
    assert 0 < moved < 4 * stated + 1e-5
    assert notes.records[1].clipped_fraction == 0.0


def test_rotation_makes_rounding_finer(tmp_path):
    errors = {}
    for rotation in (False, True):
        study, notes = study_of(rounds=2, cohort={**NARROW, "rotation": rotation}), Notes()
        run(study, tmp_path / str(rotation), notes=notes)
        errors[rotation] = notes.records[1].quantisation_error
    assert errors[True] < errors[False] / 3  # bounds of 5·√3 instead of 32 root mean squares


def test_a_rotated_study_that_was_cut_off_goes_on_bit_for_bit(tmp_path):
    study = study_of(rounds=3, cohort=NARROW)
    whole = run(study, tmp_path / "whole").result.last
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "cut", notes=Notes(stop_after=2))
    resumed = run(study, tmp_path / "cut").result.last
    assert resumed.parameters.tobytes() == whole.parameters.tobytes()


def test_rounding_is_stated_next_to_the_noise_where_there_is_noise(tmp_path):
    notes, without = Notes(), Notes()
    run(private_study_of(rounds=2, cohort=NARROW), tmp_path / "private", notes=notes)
    run(study_of(rounds=1), tmp_path / "open", notes=without)
    for made in notes.records:
        assert 0 < made.rounding_to_noise < 0.2
    assert without.records[0].rounding_to_noise == 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_noise_in_an_update_is_as_large_as_said(tmp_path, momentum):
    """With hardly any budget an update is all noise: its squared length against the figure."""
    study = private_study_of(
        privacy={"mode": "dp", "epsilon": 0.05}, training={"momentum": momentum},
        cohort={"weight_cap": 30},
    )  # fmt: skip
    model = build(study)
    layout, tensors = shared_layout(study, model), tensors_of(model)
    first = layout.flatten({name: tensors[name] for name in layout.names})
    found, said = 0.0, 0.0
    work = SiteWork(study, hospital(1), tmp_path)
    features = work.tail_layout.statistics(work.statistics().tail).features
    normalisation = Normalisation.from_totals(features, study).encode()
    for seed in range(12):
        given = work.train(1, first, normalisation, seeded_entropy(bytes([seed])))
        found += float((given.vector.astype(float) ** 2).sum())
        said += work.tail_layout.training(given.tail).noise_square
    assert len(first) * 12 > 500  # so that the ratio's standard deviation is below 7 %
    assert found / said == pytest.approx(1.0, abs=0.3)


def test_noise_is_unknown_where_the_optimizer_scales_it_by_what_it_saw():
    study = private_study_of(training={"optimizer": "adam"})
    records = hospital(1)
    plan = private_plan(study, Units(records), noise_multiplier=1.0)
    assert update_noise(study, plan, 1, 50) == 0.0


class Units:
    """As much of prepared samples as a plan looks at."""

    def __init__(self, records) -> None:
        self.patient_count = len(set(records.patients))
