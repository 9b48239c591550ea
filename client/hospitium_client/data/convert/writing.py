"""What every converter writes: a mapping and a study to start from, beside the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hospitium_common.errors import DataRejected

if TYPE_CHECKING:
    from pathlib import Path


def write_mapping(directory: Path, text: str) -> None:
    """Write ``dataset.toml``."""
    (directory / "dataset.toml").write_text(text, encoding="utf-8")


def write_study(directory: Path, text: str) -> None:
    """Write ``study.toml``, ready for `hospitium simulate`."""
    (directory / "study.toml").write_text(text, encoding="utf-8")


def demand(path: Path, what: str) -> Path:
    """Return the path if it is there.

    Raises:
        DataRejected: it is not.
    """
    if not path.exists():
        raise DataRejected(f"{path}: expected {what}, got nothing there")
    return path
