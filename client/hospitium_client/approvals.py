"""`policy.toml` on disk: read strictly, and changed without losing a comment."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

from hospitium_client.policy import NEW_POLICY, SitePolicy
from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError, NotApproved
from hospitium_common.messages import StudyState
from hospitium_common.study.reading import validate

if TYPE_CHECKING:
    from pathlib import Path

    from hospitium_common.study import Study


def load_policy(path: Path) -> SitePolicy:
    """Read the rules; a file that is not there is made, with the strict defaults.

    Raises:
        ConfigError: it is no valid policy.
    """
    if not path.exists():
        write_durably(path, NEW_POLICY.encode())
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return validate(SitePolicy, document, str(path))


def check_rules(policy: SitePolicy, study: Study) -> None:
    """Compare a study with every rule but the approval itself.

    Raises:
        NotApproved: the first rule that it breaks.
    """
    approved = policy.approved | {study.digest.hex()}
    policy.model_copy(update={"approved": approved}).check(study)


def standing(policy: SitePolicy, study: Study) -> StudyState:
    """Return where a study stands by the rules and approvals of today; no data is looked at."""
    try:
        check_rules(policy, study)
    except NotApproved:
        return StudyState.REFUSED
    approved = study.digest.hex() in policy.approved
    return StudyState.APPROVED if approved else StudyState.WAITING


def approve_study(path: Path, study: Study) -> None:
    """Add a study to the approved ones.

    Raises:
        NotApproved: it breaks a rule.
        ConfigError: the file cannot be read or changed.
    """
    policy = load_policy(path)
    check_rules(policy, study)
    _store(path, policy, sorted(policy.approved | {study.digest.hex()}))


def revoke_study(path: Path, study: Study) -> None:
    """Take an approval back.

    Raises:
        ConfigError: it was not approved, or the file cannot be read or changed.
    """
    policy, digest = load_policy(path), study.digest.hex()
    if digest not in policy.approved:
        raise ConfigError(f"{path}: expected {study.study.id} to be approved, it is not")
    _store(path, policy, sorted(policy.approved - {digest}))


def _store(path: Path, rules: SitePolicy, approved: list[str]) -> None:
    """Write the list of approvals back; every other line, and its comment, stays as it was."""
    lines, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("approved"):
            quoted = "".join(f'  "{digest}",\n' for digest in approved)
            lines.append(f"approved = [\n{quoted}]" if approved else "approved = []")
            inside = "]" not in line
        elif inside:
            inside = "]" not in line
        else:
            lines.append(line)
    text = "\n".join(lines) + "\n"
    changed = validate(SitePolicy, tomllib.loads(text), str(path))
    if changed != rules.model_copy(update={"approved": frozenset(approved)}):
        raise ConfigError(f"{path}: expected a line `approved = [...]` to change, found none")
    write_durably(path, text.encode())
