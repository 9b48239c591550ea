"""Small JSON files with bytes in hexadecimal, read strictly: keys, requests, admissions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

M = TypeVar("M", bound=BaseModel)
LARGEST_RECEIVED = 4 * 1024 * 1024
"""In bytes; a full roster of 255 hospitals is below 1 MB."""


def _from_hexadecimal(value: object) -> object:
    return bytes.fromhex(value) if isinstance(value, str) else value


Hex = Annotated[
    bytes,
    BeforeValidator(_from_hexadecimal),
    PlainSerializer(lambda value: value.hex(), return_type=str),
]


class JsonPart(BaseModel):
    """A frozen object of such a file; unknown keys and other types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def to_json(document: JsonPart) -> bytes:
    """Return a document as the text of its file."""
    return (document.model_dump_json(indent=2) + "\n").encode()


def from_json(model: type[M], data: bytes, what: str) -> M:
    """Read a document; ``what`` it is goes into errors, what is in it does not.

    Raises:
        ConfigError: the bytes are something else.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the file"
    raise ConfigError(f"expected {what}, got something else or a damaged file (at {where})")


def read_received(path: Path, what: str) -> bytes:
    """Read a file that somebody sent.

    Raises:
        ConfigError: it is missing, or far too large for what it should be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_RECEIVED + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected {what}, got: {error.strerror}") from error
    if len(data) > LARGEST_RECEIVED:
        raise ConfigError(f"{path}: expected {what}, got a file far too large for that")
    return data
