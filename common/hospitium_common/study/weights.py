"""Weights files that studies begin from: where a machine keeps them, under which name.

Nobody downloads anything: a file is put on every machine beforehand, in the directory that
``HOSPITIUM_WEIGHTS`` names (default ``~/.local/share/hospitium/weights``), as
``<sha256>.safetensors``; `hospitium study weights FILE` does it.

Weights may come from public or synthetic data only. What was trained on patients of a hospital in
the study is outside the study's promise to them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError

DIRECTORY = "HOSPITIUM_WEIGHTS"


def weights_path(sha256: str) -> Path:
    """Return where this machine keeps the weights file of that digest."""
    given = os.environ.get(DIRECTORY)
    directory = Path(given) if given else Path.home() / ".local/share/hospitium/weights"
    return directory / f"{sha256}.safetensors"


def keep_weights(file: Path) -> str:
    """Put a weights file where studies find it; return the SHA-256 that a study pins.

    Raises:
        ConfigError: it is not there, or no safetensors file.
    """
    try:
        data = file.read_bytes()
        safetensors.numpy.load(data)
    except OSError as error:
        raise ConfigError(f"{file}: expected a weights file, got: {error.strerror}") from error
    except SafetensorError as error:
        raise ConfigError(f"{file}: expected a safetensors file, got something else") from error
    digest = hashlib.sha256(data).hexdigest()
    target = weights_path(digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, data)
    return digest


def read_weights(sha256: str) -> bytes:
    """Return the file that a study pinned.

    Raises:
        ConfigError: it is not on this machine, or another file stands in its place.
    """
    path = weights_path(sha256)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: expected the weights that the study begins from, got: {error.strerror}; "
            "ask the coordinator for the file and run `hospitium study weights FILE`"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ConfigError(f"{path}: expected the file that the study pinned, got another")
    return data
