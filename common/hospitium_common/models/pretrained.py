"""First weights from a file that the study pinned (`study.weights`), and which of them stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError

from hospitium_common.errors import ConfigError
from hospitium_common.study.weights import read_weights, weights_path

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from hospitium_common.study.sections import Pretrained


def load_pretrained(model: nn.Module, pretrained: Pretrained) -> None:
    """Copy the file's tensors into parameters of the same name, and freeze those that stay.

    Parameters that the file does not have keep their first weights, as a new head should.

    Raises:
        ConfigError: the file is not here, is another one, or does not fit the model.
    """
    data, path = read_weights(pretrained.sha256), weights_path(pretrained.sha256)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ConfigError(f"{path}: expected a safetensors file, got something else") from error
    parameters = dict(model.named_parameters())
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
