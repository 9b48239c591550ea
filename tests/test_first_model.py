"""The first model as a file: made where torch is, read where it is not."""

import subprocess
import sys

import numpy as np
import pytest

from hospitium_common.errors import ConfigError
from hospitium_common.first_model import load_first_model, make_first_model
from hospitium_common.models import build, shared_layout, tensors_of
from hospitium_common.study import load_study
from hospitium_simulations.quick_study import write_quick_study


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    study_file = write_quick_study(folder, "first")
    target = folder / "first.safetensors"
    make_first_model(study_file, target)
    return study_file, target


def test_the_file_holds_the_weights_that_every_site_builds_from_the_seed(made):
    study = load_study(made[0])
    layout, vector = load_first_model(made[1], study)
    model = build(study)
    assert layout == shared_layout(study, model)
    assert np.array_equal(vector, layout.flatten(tensors_of(model)))


def test_reading_it_needs_no_torch(made):
    program = (
        "import sys; from pathlib import Path\n"
        "from hospitium_common.first_model import load_first_model\n"
        "from hospitium_common.study import load_study\n"
        "load_first_model(Path(sys.argv[2]), load_study(Path(sys.argv[1])))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, *map(str, made)], check=True)


def test_the_first_model_of_another_study_is_refused(made, tmp_path):
    other = load_study(write_quick_study(tmp_path, "other"))
    with pytest.raises(ConfigError, match="expected the first model of study other"):
        load_first_model(made[1], other)


def test_a_truncated_file_is_refused(made, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(made[1].read_bytes()[:-20])
    with pytest.raises(ConfigError, match="got nothing readable"):
        load_first_model(broken, load_study(made[0]))


def test_a_study_that_does_not_load_names_its_file(tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("rounds = 3")
    with pytest.raises(ConfigError, match=r"wrong\.toml"):
        make_first_model(wrong, tmp_path / "never")
