"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hospitium_common.errors import HospitiumError

if TYPE_CHECKING:
    from pathlib import Path

OWNER_ONLY = 0o600


def write_durably(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 through a temporary one, on disk before this returns.

    Raises:
        HospitiumError: the disk is full or the place is not writable; what was there before
            is still there.
    """
    beside = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise HospitiumError(
            f"{path}: expected to write {len(data)} bytes, got: {error.strerror}; everything "
            "finished before is kept. Make room and run it again"
        ) from error
