"""`hospitium site`: the studies that reached a hospital, and what it agrees to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hospitium_client.approvals import (
    approve_study,
    check_rules,
    load_policy,
    revoke_study,
    standing,
)
from hospitium_client.data.mapping import load_mapping
from hospitium_client.enrolment import PinnedRosters
from hospitium_client.enrolment_cli import HERE, Home
from hospitium_client.settings import SiteHome, SiteSettings
from hospitium_client.studies import StoredStudy, all_studies, find_study
from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError
from hospitium_common.messages import StudyState
from hospitium_common.study.explain import explain
from hospitium_common.study.signature import fingerprint
from hospitium_common.toml_file import parse_toml, with_text_value

app = typer.Typer()

PolicyFile = Annotated[
    Path | None,
    typer.Option(
        help="The rules, made if not there; else policy.toml in the hospital's folder, or here."
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(help="A study's id, the beginning of its digest, or its file with .sig beside."),
]
STATES = {
    StudyState.APPROVED: "approved",
    StudyState.WAITING: "waits for approval",
    StudyState.REFUSED: "breaks a rule",
}


@app.command()
def studies(home: Home = HERE, policy: PolicyFile = None) -> None:
    """List the studies that reached this hospital, and where each stands."""
    folder = SiteHome(home)
    rules = load_policy(_policy_file(folder, policy))
    stored = all_studies(folder.studies)
    if not stored:
        Console().print("No study has reached this hospital yet.")
        return
    table = Table(title=f"Studies at {home}", title_justify="left")
    for column in ("study", "title", "state", "digest", "data"):
        table.add_column(column, overflow="fold")
    for one in stored:
        about = one.study.study
        state = standing(rules, one.study)
        table.add_row(
            escape(about.id), escape(about.title), STATES[state], one.digest[:16],
            _data_folder(folder, about.id),
        )  # fmt: skip
    Console().print(table)
    Console().print("`hospitium site review STUDY` explains one, `approve STUDY` agrees to it.")


@app.command()
def review(study: StudyName, home: Home = HERE, policy: PolicyFile = None) -> None:
    """Explain a study in plain words and compare it with this hospital's rules."""
    folder = SiteHome(home)
    stored = find_study(folder.studies, study)
    document = stored.study
    rules = load_policy(_policy_file(folder, policy))
    table = Table(title=f"{stored.path}", show_header=False, show_lines=True, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for question, answer in explain(document):
        table.add_row(question, answer)
    table.add_row("Who signed it?", f"the coordinator with key {fingerprint(stored.coordinator)}")
    Console().print(table)
    _demand_own_coordinator(folder, stored)
    check_rules(rules, document)
    approved = standing(rules, document) is StudyState.APPROVED
    Console().print(
        "It keeps this hospital's rules"
        + (" and is approved." if approved else f". To agree: `hospitium site approve {study}`."),
        soft_wrap=True,
    )


@app.command()
def approve(
    study: StudyName,
    home: Home = HERE,
    policy: PolicyFile = None,
    data: Annotated[
        Path | None,
        typer.Option(help="The folder with the records for this study; else data.default."),
    ] = None,
) -> None:
    """Agree to exactly this study; a changed one needs a new approval."""
    folder = SiteHome(home)
    stored = find_study(folder.studies, study)
    _demand_own_coordinator(folder, stored)
    identifier = stored.study.study.id
    rules_file = _policy_file(folder, policy)
    check_rules(load_policy(rules_file), stored.study)
    if data is not None:
        load_mapping(data)
        settings = folder.settings_file
        text = with_text_value(
            settings.read_text(encoding="utf-8"), "data.studies", identifier,
            str(data.resolve()), name=str(settings),
        )  # fmt: skip
        parse_toml(SiteSettings, text, name=str(settings))
        write_durably(settings, text.encode())
    approve_study(rules_file, stored.study)
    Console().print(
        f"Approved {identifier}. `hospitium site revoke {study}` undoes it.", soft_wrap=True
    )
    if data is None and folder.settings_file.exists() and not _data_folder(folder, identifier):
        Console().print(
            f"No folder with its data is known yet: say --data FOLDER, or set data.default in "
            f"{folder.settings_file}.",
            soft_wrap=True,
        )


@app.command()
def revoke(study: StudyName, home: Home = HERE, policy: PolicyFile = None) -> None:
    """Take an approval back: from the next request on the study is refused."""
    folder = SiteHome(home)
    document = find_study(folder.studies, study).study
    revoke_study(_policy_file(folder, policy), document)
    Console().print(f"Revoked {document.study.id}.")


def _policy_file(folder: SiteHome, given: Path | None) -> Path:
    """Return the rules' file: the one that was named, or this hospital's."""
    if given is not None:
        return given
    return folder.policy if folder.settings_file.exists() else Path("policy.toml")


def _demand_own_coordinator(folder: SiteHome, stored: StoredStudy) -> None:
    """Refuse a study that another coordinator signed than the one that this hospital pinned."""
    rosters = PinnedRosters(folder)
    if rosters.is_admitted and rosters.pinned().coordinator != stored.coordinator:
        raise ConfigError(
            f"{stored.path}: expected the signature of this hospital's coordinator "
            f"({fingerprint(rosters.pinned().coordinator)}), got that of "
            f"{fingerprint(stored.coordinator)}"
        )


def _data_folder(folder: SiteHome, study: str) -> str:
    try:
        return str(folder.data_of(study))
    except ConfigError:
        return ""
