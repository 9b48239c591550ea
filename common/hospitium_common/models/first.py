"""``python -m hospitium_common.models.first STUDY FILE``: write a study's first weights."""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.numpy

from hospitium_common.durable import write_durably
from hospitium_common.models import build, shared_layout, tensors_of
from hospitium_common.study import load_study


def main(study_file: Path, target: Path) -> None:
    """Write the weights that follow from the study's seed, in the order of the flat vector."""
    study = load_study(study_file)
    model = build(study)
    layout = shared_layout(study, model)
    tensors = tensors_of(model)
    # A safetensors file keeps no order; the order is the vector's meaning.
    metadata = {"study": study.digest.hex(), "names": "\n".join(layout.names)}
    data = safetensors.numpy.save({name: tensors[name] for name in layout.names}, metadata)
    write_durably(target, data)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
