"""A study's first model as a file: made once, where torch is installed, read where it is not.

The coordinator's server needs no learning framework. `hospitium study submit` makes the file in a
process of its own: ``python -m hospitium_common.first_model STUDY FILE``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.numpy

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError
from hospitium_common.parameters import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hospitium_common.study import Study


def make_first_model(study_file: Path, target: Path) -> None:
    """Write the study's first weights, drawn from its seed, to ``target`` (safetensors).

    Raises:
        ConfigError: torch is not installed here, or the study does not build.
    """
    command = [sys.executable, "-m", __name__, str(study_file), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - own interpreter, own module
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(
            f"{study_file}: expected to build the first model, got: {last}. It needs the client "
            "packages: `pip install 'hospitium[client]'`, or make it on another machine with "
            f"`python -m {__name__} {study_file.name} {target.name}`"
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


def _main() -> None:
    from hospitium_common.models import build, shared_layout, tensors_of
    from hospitium_common.study import load_study

    study_file, target = map(Path, sys.argv[1:])
    study = load_study(study_file)
    model = build(study)
    layout = shared_layout(study, model)
    tensors = tensors_of(model)
    # A safetensors file keeps no order; the order is the vector's meaning.
    metadata = {"study": study.digest.hex(), "names": "\n".join(layout.names)}
    data = safetensors.numpy.save({name: tensors[name] for name in layout.names}, metadata)
    write_durably(target, data)


if __name__ == "__main__":
    _main()
