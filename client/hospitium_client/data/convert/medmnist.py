"""MedMNIST v2 (Yang et al. 2023): one ``.npz`` per data set, classes named as published."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from hospitium_client.data.convert.writing import demand, write_mapping, write_study
from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = {
    "pneumoniamnist": ("normal", "pneumonia"),
    "breastmnist": ("malignant", "normal or benign"),
}
STUDY = """\
# {name}: MedMNIST's films, cut into simulated hospitals (the data names none).
format = 1
rounds = 20

[study]
id = "{name}"
title = "{name} across simulated hospitals"
seed = 1

[task]
kind = "image_classification"
classes = {classes}

[data]
channels = 1
size = [28, 28]

[model]
name = "small_cnn"

[training]
local_epochs = 2
batch_size = 64
optimizer = "adam"
learning_rate = 0.001
schedule = "cosine"
augmentation = "light"

[privacy]
mode = "none"

[cohort]
minimum_sites = 3
maximum_sites = 4
ring_bits = 24

[strategy]
name = "fedavg"
"""


def convert(source: Path, target: Path) -> None:
    """Copy a MedMNIST archive beside a mapping and a study."""
    path = demand(source, "a MedMNIST .npz file")
    if path.stem not in CLASSES:
        raise DataRejected(f"{path}: expected one of {', '.join(CLASSES)}, got another file name")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target / path.name)
    write_mapping(target, f'kind = "image_npz"\nfile = "{path.name}"\n')
    classes = "[" + ", ".join(f'"{name}"' for name in CLASSES[path.stem]) + "]"
    write_study(target, STUDY.format(name=path.stem, classes=classes))
