"""Settings in TOML: read with errors that name file and key, changed without losing a comment."""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from hospitium_common.errors import ConfigError
from hospitium_common.study.reading import validate

if TYPE_CHECKING:
    from pathlib import Path

M = TypeVar("M", bound=BaseModel)
COMMENTS_AT = 34
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def read_toml(model: type[M], path: Path, *, what: str, remedy: str) -> M:
    """Read and validate a settings file; ``what`` it is and a ``remedy`` go into errors.

    Raises:
        ConfigError: it is missing, no TOML, or a key or value is wrong: one line per mistake.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: expected {what}, got: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got other bytes") from error
    return parse_toml(model, text, name=str(path))


def parse_toml(model: type[M], text: str, *, name: str) -> M:
    """Validate the text of a settings file; ``name`` is what error messages call it.

    Raises:
        ConfigError: no TOML, or a key or value is wrong: one line per mistake.
    """
    return validate(model, _parse(text, name), name)


def quoted(text: str) -> str:
    """Return text as a TOML string; TOML's escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def with_text_value(text: str, section: str, key: str, value: str, *, name: str) -> str:
    """Return a settings file with one text value set; all other lines, comments too, are kept.

    ``section`` is a plain table name such as ``coordinator`` or ``data.studies``; ``name`` is what
    error messages call the file.

    Raises:
        ConfigError: the file is written in a way that this cannot change line by line.
    """
    before = _parse(text, name)
    lines = text.rstrip("\n").split("\n")
    entry = key if BARE_KEY.fullmatch(key) else quoted(key)
    header = f"[{section}]"
    stripped = [line.split("#")[0].strip() for line in lines]
    if header not in stripped:
        lines += ["", header, f"{entry} = {quoted(value)}"]
    else:
        start = stripped.index(header) + 1
        end = next((i for i in range(start, len(lines)) if stripped[i].startswith("[")), len(lines))
        names = [line.split("=")[0].strip().strip("\"'") for line in stripped[start:end]]
        if key in names:
            at = start + names.index(key)
            _, mark, comment = lines[at].rpartition("  #")
            changed = f"{entry} = {quoted(value)}"
            lines[at] = f"{changed:<{COMMENTS_AT}}  #{comment}" if mark else changed
        else:
            lines.insert(start, f"{entry} = {quoted(value)}")
    text = "\n".join(lines) + "\n"
    _set(before, [*section.split("."), key], value)
    if _parse(text, name) != before:
        raise ConfigError(
            f"{name}: expected a table {header} with one key on each line, got another form; "
            f"write {entry} = {quoted(value)} there yourself"
        )
    return text


def _set(document: dict[str, object], path: list[str], value: str) -> None:
    for part in path[:-1]:
        inner = document.setdefault(part, {})
        if not isinstance(inner, dict):
            return
        document = inner
    document[path[-1]] = value


def _parse(text: str, name: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from error
