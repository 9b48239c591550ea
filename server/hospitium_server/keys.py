"""The coordinator's two Ed25519 keys, each in a file of mode 0600.

The coordinator's key signs studies and requests and is needed all the time. The governance key
signs rosters: it is needed when somebody is enrolled or revoked, and is better kept elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_common.errors import ConfigError
from hospitium_common.key_file import read_key_file, write_new_key_file

if TYPE_CHECKING:
    from pathlib import Path


def make_key(path: Path) -> Ed25519PrivateKey:
    """Make a key; an existing one is never overwritten.

    Raises:
        ConfigError: there is a file already.
    """
    key = Ed25519PrivateKey.generate()
    write_new_key_file(path, key.private_bytes_raw())
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read the coordinator's key, which only its owner can read.

    Raises:
        ConfigError: it is missing, is no key, or others can read it.
    """
    remedy = "`hospitium coordinator init NAME --host HOST` makes one"
    return _load(path, "the coordinator's key", remedy)


def load_governance_key(path: Path) -> Ed25519PrivateKey:
    """Read the governance key, wherever it is kept.

    Raises:
        ConfigError: it is missing, is no key, or others can read it.
    """
    return _load(path, "the governance key", "if it is kept elsewhere, name it: --governance-key")


def _load(path: Path, what: str, remedy: str) -> Ed25519PrivateKey:
    data = read_key_file(path, what, remedy)
    try:
        return Ed25519PrivateKey.from_private_bytes(data)
    except ValueError as error:
        raise ConfigError(
            f"{path}: expected {what}, Ed25519 of 32 bytes, got another file"
        ) from error
