"""Where a site computes: its processor, or a graphics processor."""

from __future__ import annotations

import torch

from hospitium_common.errors import ConfigError

PROCESSOR = torch.device("cpu")


def device_named(name: str) -> torch.device:
    """Return the device with torch's name for it: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Raises:
        ConfigError: this machine has no such device; nothing falls back in silence.
    """
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return PROCESSOR
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise ConfigError(
            f'compute.device: expected "cpu", "cuda" or "cuda:NUMBER", got {name!r}; correct it '
            "in site.toml"
        )
    found = torch.cuda.device_count()
    if int(number or 0) >= found:
        raise ConfigError(
            f"compute.device: expected a device that torch can use, got {name!r} where it sees "
            f"{found} graphics processors; install torch for CUDA and its driver, let the trainer "
            'open /dev/nvidia*, or write device = "cpu" in site.toml'
        )
    return torch.device("cuda", int(number or 0))
