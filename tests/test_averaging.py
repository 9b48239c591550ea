"""The moving average of the versions: released instead of any of them."""

import numpy as np
import pytest
import safetensors.numpy

from hospitium_simulations.federation import SimulationOptions, simulate
from tests.federation_kit import Notes, hospitals, study_of

DECAY = 0.5


def run(directory, masked=True, notes=None, **changes):
    # A rate at which versions jump about.
    study = study_of(
        **{
            "rounds": 8, "strategy": {"averaging": DECAY},
            "training": {"local_epochs": 1, "batch_size": 8, "learning_rate": 3.0}, **changes,
        }
    )  # fmt: skip
    options = SimulationOptions(masked=masked)
    return simulate(study, hospitals(4, patients=120), directory, options, notes or Notes())


def expected_average(directory, history):
    """The average of the versions that count: a rejected round makes none."""
    average = None
    for number in (made.round for made, _ in history if made.round and not made.rejected):
        path = directory / "coordinator" / f"version-{number:04d}.safetensors"
        version = safetensors.numpy.load(path.read_bytes())["parameters"].astype(np.float64)
        average = version if average is None else DECAY * average + (1 - DECAY) * version
    return average


def test_the_average_of_the_versions_that_count_is_the_released_model(tmp_path):
    outcome = run(tmp_path)
    average = expected_average(tmp_path, outcome.history)
    assert outcome.result.averaged
    assert np.allclose(outcome.result.best.parameters, average, rtol=1e-6, atol=1e-7)
    model = safetensors.numpy.load((tmp_path / "model.safetensors").read_bytes())
    assert np.isclose(sum(float(t.sum()) for t in model.values()), average.sum(), rtol=1e-3)
    plain = run(tmp_path / "plain", strategy={"averaging": 0.0})
    assert not plain.result.averaged
    assert np.array_equal(plain.result.last.parameters, outcome.result.last.parameters)


def test_a_run_that_is_taken_up_again_has_the_same_average(tmp_path):
    whole = run(tmp_path / "whole", masked=False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", masked=False, notes=Notes(stop_after=3))
    again = run(tmp_path / "cut", masked=False)
    assert np.array_equal(whole.result.best.parameters, again.result.best.parameters)
    finished = run(tmp_path / "cut", masked=False)
    assert finished.result.test == again.result.test
