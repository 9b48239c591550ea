"""The coordinator's signing key, in a file of mode 0600."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def make_key(path: Path) -> Ed25519PrivateKey:
    """Make a key; an existing one is never overwritten.

    Raises:
        ConfigError: there is a file already.
    """
    if path.exists():
        raise ConfigError(f"{path}: expected no file there, got one; a key is never overwritten")
    key = Ed25519PrivateKey.generate()
    write_durably(path, key.private_bytes_raw())
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a key that only its owner can read.

    Raises:
        ConfigError: it is missing, is no key, or others can read it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: expected the coordinator's key, got: {error.strerror}; make one with "
            "`hospitium coordinator init`"
        ) from error
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path}: expected mode 0600, others can read it: `chmod 600 {path}`")
    try:
        return Ed25519PrivateKey.from_private_bytes(data)
    except ValueError as error:
        raise ConfigError(f"{path}: expected an Ed25519 key of 32 bytes") from error
