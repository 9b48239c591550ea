"""Weights from a local file: pinned, checked, frozen where the study says so."""

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from hospitium_common.errors import ConfigError
from hospitium_common.models import build, shared_layout, tensors_of
from hospitium_common.study import parse_study
from hospitium_common.study.cli import app
from hospitium_common.study.explain import explain
from hospitium_common.study.weights import keep_weights
from hospitium_simulations.federation import SimulationOptions, simulate
from tests.federation_kit import Notes, hospitals, private_study_of, study_of


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A weights directory of the test's own."""
    monkeypatch.setenv("HOSPITIUM_WEIGHTS", str(tmp_path / "store"))
    return tmp_path / "store"


def weights_of(study, directory, keep=lambda name: True, scale=2.0):
    """Write a file with (some of) a model's tensors, all of them changed; return its digest."""
    tensors = {
        name: (tensor * scale + 0.1).astype(np.float32)
        for name, tensor in tensors_of(build(study)).items()
        if keep(name)
    }
    file = directory / "weights.safetensors"
    file.write_bytes(safetensors.numpy.save(tensors))
    return keep_weights(file), tensors


def test_a_model_begins_from_the_file_and_keeps_first_weights_for_what_is_not_in_it(tmp_path):
    plain = study_of()
    digest, tensors = weights_of(plain, tmp_path, keep=lambda name: name.startswith("0."))
    found = tensors_of(build(study_of(pretrained={"sha256": digest})))
    before = tensors_of(build(plain))
    assert len(tensors) == 2 and len(found) > 2
    for name, value in found.items():
        assert np.array_equal(value, tensors.get(name, before[name]))


@pytest.mark.parametrize("private", [True, False])
def test_frozen_parameters_do_not_travel_and_do_not_move(tmp_path, private):
    digest, tensors = weights_of(study_of(), tmp_path)
    make = private_study_of if private else study_of
    study = make(pretrained={"sha256": digest, "frozen": ["0."]})
    layout = shared_layout(study, build(study))
    assert layout.names and not any(name.startswith("0.") for name in layout.names)
    outcome = simulate(study, hospitals(3), tmp_path / "run", SimulationOptions(), Notes())
    assert len(outcome.result.last.parameters) == layout.size
    start = layout.flatten({name: tensors[name] for name in layout.names})
    assert np.abs(outcome.result.last.parameters - start).max() > 1e-4
    assert (
        f"SHA-256 {digest}, of which 0. are not trained" in dict(explain(study))["What is trained?"]
    )


def test_a_file_that_is_not_there_or_was_changed_is_refused(tmp_path, store):
    digest, _ = weights_of(study_of(), tmp_path)
    path = store / f"{digest}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="got another"):
        build(study_of(pretrained={"sha256": digest}))
    path.unlink()
    with pytest.raises(ConfigError, match="hospitium study weights"):
        build(study_of(pretrained={"sha256": digest}))


MISFITS = {
    "another model's shape": ({"0.weight": np.zeros((3, 3))}, [], "does not fit"),
    "a name that the model lacks": ({"9.weight": np.zeros(3)}, [], "none of that name"),
    "a weight that is not a number": ({"0.bias": np.full(6, np.nan)}, [], "not finite"),
    "frozen, but not in the file": ({"0.bias": np.zeros(6)}, ["0."], "0.weight"),
    "frozen, but not in the model": ({"0.bias": np.zeros(6)}, ["encoder."], "encoder."),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_the_study_are_refused_by_name(case, tmp_path):
    tensors, frozen, complaint = MISFITS[case]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(
        safetensors.numpy.save({name: t.astype(np.float32) for name, t in tensors.items()})
    )
    digest = keep_weights(file)
    with pytest.raises(ConfigError, match=complaint):
        build(study_of(pretrained={"sha256": digest, "frozen": frozen}))


def test_a_model_with_nothing_left_to_train_is_refused(tmp_path):
    digest, _ = weights_of(study_of(), tmp_path)
    frozen = [name for name, _ in build(study_of()).named_parameters()]
    with pytest.raises(ConfigError, match="something left to train"):
        build(study_of(pretrained={"sha256": digest, "frozen": frozen}))


def test_the_command_keeps_a_file_and_says_what_to_write(tmp_path, store):
    digest, _ = weights_of(study_of(), tmp_path)
    done = CliRunner().invoke(app, ["weights", str(tmp_path / "weights.safetensors")])
    assert done.exit_code == 0
    section = done.output[done.output.index("[pretrained]") :].split("\n\n")[0]
    study = parse_study(TEMPLATE + section)
    assert study.pretrained is not None and study.pretrained.sha256 == digest
    (tmp_path / "no.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="safetensors"):
        keep_weights(tmp_path / "no.safetensors")


TEMPLATE = """
format = 1
rounds = 1
study = { id = "small-study", title = "A small study" }
task = { kind = "image_classification", classes = ["a", "b"] }
data = { size = [28, 28] }
model = { name = "small_cnn" }
training = { local_steps = 1 }
privacy = { mode = "none" }
"""
