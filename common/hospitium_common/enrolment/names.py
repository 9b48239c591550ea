"""What a hospital may be called: a short name for files and commands, a title for people."""

from __future__ import annotations

import re
import unicodedata

from hospitium_common.errors import ConfigError

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,62}")
LONGEST_TITLE = 200


def name_from_title(title: str) -> str:
    """Return a short name for a hospital: ``St. Anna`` becomes ``st-anna``.

    Raises:
        ConfigError: too little of the title is left.
    """
    plain = unicodedata.normalize("NFKD", title).casefold().encode("ascii", "ignore").decode()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:63].strip("-")
    if not SITE_NAME.fullmatch(name):
        raise ConfigError(
            f"{title!r}: expected at least two Latin letters or digits to make a short name of; "
            "give one with --name"
        )
    return name


def check_name(name: str) -> None:
    """Demand a short name: it becomes part of file names and commands.

    Raises:
        ConfigError: it is none.
    """
    if not SITE_NAME.fullmatch(name):
        raise ConfigError(
            f"name: expected 2 to 63 small letters, digits and hyphens such as st-anna, "
            f"got {name!r}"
        )


def check_title(title: str) -> None:
    """Demand a title that can be shown on a terminal.

    Raises:
        ConfigError: it is empty, too long, or has control characters.
    """
    if not (1 <= len(title) <= LONGEST_TITLE and title.isprintable() and title.strip() == title):
        raise ConfigError(
            f"title: expected 1 to {LONGEST_TITLE} printable characters without spaces around "
            f"them, got {title[:LONGEST_TITLE]!a}"
        )
