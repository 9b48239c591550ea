"""A study's first model as a file: made once, where torch is installed, read where it is not.

The coordinator's server needs no learning framework. `hospitium study submit` makes the file in a
process of its own: ``python -m hospitium_common.models.first STUDY FILE``.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import safetensors

from hospitium_common.errors import ConfigError
from hospitium_common.parameters import Layout

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hospitium_common.study import Study

MAKER = "hospitium_common.models.first"


def make_first_model(study_file: Path, target: Path) -> None:
    """Write the study's first weights, drawn from its seed, to ``target`` (safetensors).

    Raises:
        ConfigError: torch is not installed here, or the study does not build.
    """
    command = [sys.executable, "-m", MAKER, str(study_file), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - own interpreter, own module
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(
            f"{study_file}: expected to build the first model, got: {last}. It needs the client "
            "packages: `pip install 'hospitium[client]'`, or make it on another machine with "
            f"`python -m {MAKER} {study_file.name} {target.name}` and put it at {target}"
        )


def load_first_model(path: Path, study: Study) -> tuple[Layout, NDArray[np.float32]]:
    """Read the first weights: their layout and one vector float32 ``[size]``.

    Raises:
        ConfigError: the file is missing, broken, or belongs to another study.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = metadata.get("names", "").split("\n")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{path}: expected the study's first model, got nothing readable"
        ) from error
    if metadata.get("study") != study.digest.hex():
        raise ConfigError(
            f"{path}: expected the first model of study {study.study.id}, got another's"
        )
    layout = Layout.of(tensors)
    return layout, layout.flatten(tensors)
