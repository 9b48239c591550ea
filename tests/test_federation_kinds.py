"""Federations over images, stays and several labels; norms that stay at home; Ctrl-C."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from hospitium_client.data.loading import load_records
from hospitium_client.data.records import Records
from hospitium_common.study import Study, load_study
from hospitium_simulations.federation import SimulationOptions, simulate
from hospitium_simulations.partition import Partition, cut
from hospitium_simulations.synthetic_ehr import write_stays
from tests.federation_kit import Notes, study_of

SCENARIOS = Path(__file__).parents[1] / "simulations" / "hospitium_simulations" / "scenarios"


def film_study(**changes) -> Study:
    document = study_of().model_dump(mode="json")
    document["task"].update(kind="image_classification", **changes.pop("task", {}))
    document["data"] = {"channels": 1, "size": [12, 12]}
    document["model"] = {"name": "small_cnn", "width": 4}
    for key, value in changes.items():
        document[key] = document[key] | value if isinstance(value, dict) else value
    return Study.model_validate(document)


def films(seed: int, targets: np.ndarray) -> Records:
    """Class 1 is bright on the left, class 2 on the right; several may be true at once."""
    generator = np.random.default_rng(seed)
    of_class = np.eye(3)[targets] if targets.ndim == 1 else np.pad(targets, [(0, 0), (1, 0)])
    pixels = generator.random((len(targets), 1, 12, 12)) * 0.4 + 0.05 * seed
    pixels[:, :, :, :6] += 0.4 * of_class[:, 1][:, None, None, None]
    pixels[:, :, :, 6:] += 0.4 * of_class[:, 2][:, None, None, None]
    return Records(
        values=pixels.astype(np.float32),
        statics=np.zeros((len(targets), 0), np.float32),
        targets=targets,
        patients=np.array([f"{seed}-{number}" for number in range(len(targets))]),
        synthetic=True,
    )


def film_hospitals(draw, count: int = 3) -> dict[str, Records]:
    generator = np.random.default_rng(7)
    return {f"site-{n}": films(n, draw(generator)) for n in range(1, count + 1)}


def test_three_classes_and_norms_that_never_leave_their_hospital(tmp_path):
    study = film_study(
        task={"classes": ["none", "left", "right"]},
        strategy={"local_norms": True},
        training={"local_epochs": 4, "batch_size": 16, "learning_rate": 0.1},
        rounds=4,
    )
    everyone = film_hospitals(lambda generator: generator.integers(0, 3, 90))
    outcome = simulate(study, everyone, tmp_path, SimulationOptions(), Notes())
    assert outcome.result.test.auroc > 0.8
    shared = set(safetensors.numpy.load_file(tmp_path / "model.safetensors"))
    assert shared == {f"{n}.{p}" for n in (0, 4, 8, 14) for p in ("weight", "bias")}
    homes = [tmp_path / "sites" / name / "norms.safetensors" for name in everyone]
    norms = [safetensors.numpy.load_file(home)["1.weight"] for home in homes]
    assert not np.allclose(norms[0], norms[1])


def test_independent_labels_are_learned_and_judged_one_by_one(tmp_path):
    study = film_study(
        task={"classes": ["left", "right"], "labels": "multi"},
        training={"local_epochs": 4, "batch_size": 16, "learning_rate": 0.1},
        rounds=4,
    )
    everyone = film_hospitals(
        lambda generator: generator.integers(0, 2, (90, 2)).astype(np.float32)
    )
    outcome = simulate(study, everyone, tmp_path, SimulationOptions(), Notes())
    assert outcome.result.test_sums.histogram.shape[0] == 2
    assert outcome.result.test.auroc > 0.8


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_patients_with_several_stays_train_an_lstm_privately(tmp_path, engine):
    write_stays(tmp_path / "data", sites=3, patients_per_site=60, seed=5)
    text = (SCENARIOS / "stays.toml").read_text()
    text = text.replace("rounds = 8 ", "rounds = 2 ").replace("hidden = 64", "hidden = 8 ")
    (tmp_path / "study.toml").write_text(text.replace('engine = "fast"', f'engine = "{engine}"'))
    study = load_study(tmp_path / "study.toml")
    records = load_records(tmp_path / "data", study)
    assert records.patient_count < len(records)
    parts = cut(records, Partition(kind="site"), 3, 1)
    everyone = {name: records.take(index) for name, index in parts.items()}
    outcome = simulate(study, everyone, tmp_path / "run", SimulationOptions(), Notes())
    assert np.isfinite(outcome.result.last.parameters).all()
    assert outcome.result.test.records > 20


def test_ctrl_c_keeps_what_was_finished_and_the_same_command_goes_on(tmp_path):
    write_stays(tmp_path / "data", sites=4, patients_per_site=60, seed=5)
    text = (SCENARIOS / "stays.toml").read_text().replace("epsilon = 8.0", "")
    text = text.replace('mode = "dp"', 'mode = "none"').replace("rounds = 8 ", "rounds = 40")
    (tmp_path / "study.toml").write_text(text)
    command = [
        str(Path(sys.executable).parent / "hospitium"), "simulate", "study.toml",
        "--data", "data", "--partition", "site", "--name", "one",
    ]  # fmt: skip
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    versions = tmp_path / "runs" / "one" / "coordinator"
    deadline = time.monotonic() + 120
    while not (versions / "version-0002.safetensors").exists():
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors.strip() == "stopped; what was finished is kept"
    finished = len(list(versions.glob("version-*.safetensors")))
    assert 3 <= finished < 41
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Going on with the run" in done.stdout
    assert f"round {finished:3d}/40" in done.stdout
    assert "round   1/40" not in done.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "this run is finished" in again.stderr
