"""Files that only their owner may read: keys and passphrases."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

LARGEST_KEY_FILE = 64 * 1024
OTHERS = stat.S_IRWXG | stat.S_IRWXO
OTHERS_BUT_READING_GROUP = OTHERS & ~stat.S_IRGRP


def write_new_key_file(path: Path, data: bytes) -> None:
    """Write a key into a file of mode 0600, and its folder, if new, of mode 0700.

    Raises:
        ConfigError: there is a file already; a key is never overwritten.
    """
    demand_absent(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(path, data)


def demand_absent(*paths: Path) -> None:
    """Demand that nothing is there yet: keys and settings are never overwritten.

    Raises:
        ConfigError: one of the files is there.
    """
    for path in paths:
        if path.is_symlink() or path.exists():
            raise ConfigError(
                f"{path}: expected no file there, got one; nothing was overwritten. Choose another "
                "folder with --home, or move the old one away"
            )


def read_key_file(path: Path, what: str, remedy: str, *, group_may_read: bool = False) -> bytes:
    """Read a file that others cannot read; ``what`` it holds and a ``remedy`` go into errors.

    The mode is asked of the opened file, so that it cannot be swapped between check and reading.

    Raises:
        ConfigError: it is missing, unreadable, too large for a key, or others can read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(LARGEST_KEY_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected {what}, got: {error.strerror}; {remedy}") from error
    if mode & (OTHERS_BUT_READING_GROUP if group_may_read else OTHERS):
        right = "0640" if group_may_read else "0600"
        raise ConfigError(
            f"{path}: expected mode {right}, got {stat.S_IMODE(mode):04o}: others can get at "
            f"{what}; `chmod {right[1:]} {path}`"
        )
    if len(data) > LARGEST_KEY_FILE:
        raise ConfigError(f"{path}: expected {what}, got a file far too large for that; {remedy}")
    return data
