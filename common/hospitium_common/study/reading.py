"""Reads a study file and says in one line per mistake what is wrong with it."""

from __future__ import annotations

import difflib
import tomllib
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from hospitium_common.errors import ConfigError
from hospitium_common.study.document import Study

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)


def load_study(path: Path) -> Study:
    """Read and validate ``study.toml``.

    Raises:
        ConfigError: one line per mistake: file, key, value, what was expected, nearest key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: expected a study file, got: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got other bytes") from error
    return parse_study(text, name=str(path))


def parse_study(text: str, *, name: str = "study.toml") -> Study:
    """Validate the text of a study file; ``name`` is what error messages call it."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from error
    return validate(Study, document, name)


def validate(model: type[M], document: object, name: str) -> M:
    """Validate a parsed document against a pydantic model, with errors for people."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = [f"{name}: {_explain(model, problem)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _explain(model: type[BaseModel], problem: ErrorDetails) -> str:
    where = [part for part in problem["loc"] if not _is_union_tag(part, problem)]
    key = ".".join(str(part) for part in where)
    if problem["type"] == "extra_forbidden":
        known = sorted(_keys(model))
        close = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
    if problem["type"] == "missing":
        return f"{key}: expected this key, it is missing"
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    return f"{key} = {problem['input']!r}: {reason[0].lower()}{reason[1:]}"


def _is_union_tag(part: object, problem: ErrorDetails) -> bool:
    """Pydantic puts the chosen member of a union into the location; people did not write it."""
    return part in _UNION_TAGS and part != problem["loc"][-1]


_UNION_TAGS = {
    "image", "events", "table",
    "small_cnn", "resnet18", "densenet121", "lstm", "gru", "mlp",
}  # fmt: skip


def _keys(model: type[BaseModel]) -> Iterator[str]:
    """Every key that may appear somewhere in a document of this model."""
    for name, field in model.model_fields.items():
        yield name
        yield from _keys_within(field.annotation)


def _keys_within(annotation: object) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _keys(annotation)
    for argument in getattr(annotation, "__args__", ()):
        yield from _keys_within(argument)
