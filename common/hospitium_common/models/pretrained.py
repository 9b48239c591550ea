"""Weights that a study begins from: a local file, pinned by its SHA-256 in the study.

Nobody downloads anything: the file is put on every machine beforehand, in the directory that
``HOSPITIUM_WEIGHTS`` names (default ``~/.local/share/hospitium/weights``), as
``<sha256>.safetensors``; `hospitium study weights FILE` does it. Frozen parameters are not trained
and do not travel: every site reads them from the file.

Weights may come from public or synthetic data only. What was trained on patients of a hospital in
the study is outside the study's promise to them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hospitium_common.study.sections import Pretrained

DIRECTORY = "HOSPITIUM_WEIGHTS"


def weights_directory() -> Path:
    """Return where this machine keeps weights files."""
    given = os.environ.get(DIRECTORY)
    return Path(given) if given else Path.home() / ".local/share/hospitium/weights"


def keep_weights(file: Path) -> str:
    """Put a weights file where studies find it; return the SHA-256 that a study pins.

    Raises:
        ConfigError: it is not there, or no safetensors file.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: expected a weights file, got: {error.strerror}") from error
    _tensors(data, file)
    digest = hashlib.sha256(data).hexdigest()
    target = weights_directory() / f"{digest}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, data)
    return digest


def load_pretrained(model: nn.Module, pretrained: Pretrained) -> None:
    """Copy the file's tensors into parameters of the same name, and freeze those that stay.

    Parameters that the file does not have keep their first weights, as a new head should.

    Raises:
        ConfigError: the file is not here, is another one, or does not fit the model.
    """
    path = weights_directory() / f"{pretrained.sha256}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: expected the weights that the study begins from, got: {error.strerror}; "
            "ask the coordinator for the file and run `hospitium study weights FILE`"
        ) from error
    if hashlib.sha256(data).hexdigest() != pretrained.sha256:
        raise ConfigError(f"{path}: expected the file that the study pinned, got another")
    tensors, parameters = _tensors(data, path), dict(model.named_parameters())
    for name, tensor in tensors.items():
        wanted = parameters.get(name)
        if wanted is None or wanted.shape != tensor.shape or not bool(tensor.isfinite().all()):
            shape = "none of that name" if wanted is None else f"one of shape {list(wanted.shape)}"
            raise ConfigError(
                f"{path}: tensor {name!r} of shape {list(tensor.shape)} does not fit the study's "
                f"model, which has {shape}, or is not finite"
            )
        with torch.no_grad():
            wanted.copy_(tensor)
    _freeze(parameters, set(tensors), pretrained, path)


def _freeze(
    parameters: dict[str, nn.Parameter], known: set[str], pretrained: Pretrained, path: Path
) -> None:
    for prefix in pretrained.frozen:
        names = [name for name in parameters if name.startswith(prefix)]
        unknown = [name for name in names if name not in known]
        if not names or unknown:
            missing = unknown[0] if unknown else prefix
            raise ConfigError(
                f"{path}: expected weights for everything that pretrained.frozen names, got none "
                f"for {missing!r}"
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("pretrained.frozen: expected something left to train, got nothing")


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ConfigError(f"{path}: expected a safetensors file, got something else") from error
