"""`hospitium audit-round`: check a finished round without trusting the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hospitium_common.archive import RoundArchive
from hospitium_common.auditing import COORDINATOR, Check, RoundAudit, audit_round, check
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.federation import FederationRoster
from hospitium_common.schedule import NUMBERS_PER_STAGE, STATISTICS_STAGE
from hospitium_common.study import Study
from hospitium_common.study.signature import fingerprint
from hospitium_server.model_audit import check_models
from hospitium_server.registry import Registry

MARKS = {"holds": "[green]holds[/]", "broken": "[bold red]BROKEN[/]", "not checked": "–"}
PURPOSES = {"STATISTICS": "statistics", "TRAIN": "training", "EVALUATE": "evaluation"}


def audit(
    directory: Annotated[
        Path, typer.Argument(help="A run's coordinator/ directory, or a copy of its rounds/.")
    ],
    round_: Annotated[
        int | None, typer.Option("--round", help="Training round, 0 for the statistics.")
    ] = None,
    number: Annotated[
        int | None, typer.Option(help="Instead: the protocol's own number, as in rounds/.")
    ] = None,
    roster: Annotated[
        Path | None,
        typer.Option(help="The federation's roster.json, from somewhere you trust."),
    ] = None,
    governance: Annotated[
        str, typer.Option(help="Governance key (hexadecimal) that must have signed the roster.")
    ] = "",
) -> None:
    """Check one finished round, or all of them: signatures, seeds, sum, chain, and the model.

    Recomputes the integer sum from the signed masked vectors and the released seeds, compares it
    with the result that was announced and that the next task names, follows it to the next model,
    and names whoever the evidence points at. Ends with status 1 if anything is broken.

    The masked vectors are there only if the coordinator keeps them; everything else is checked
    without them. Nothing that is read here tells of a single site's update.
    """
    console = Console(soft_wrap=True, highlight=False)
    home = directory / "rounds" if (directory / "rounds").is_dir() else directory
    archive = RoundArchive(home)
    study = archive.study().study
    trusted = _trusted(roster, governance)
    registry = _registry(home.parent)
    try:
        audits = [
            _audited(archive, one, study, trusted, registry)
            for one in _numbers(archive, round_, number)
        ]
    finally:
        if registry is not None:
            registry.close()
    for one in audits:
        _show(console, one)
    _verdict(console, archive, audits, trusted)
    if not all(one.holds for one in audits):
        raise typer.Exit(1)


def _audited(
    archive: RoundArchive, number: int, study: Study, trusted: FederationRoster | None,
    registry: Registry | None,
) -> RoundAudit:  # fmt: skip
    found = audit_round(archive, number)
    more: tuple[Check, ...] = ()
    if trusted is not None:
        more += (_keys(found, archive, trusted),)
    if registry is not None:
        more += check_models(found, registry, study)
    return found.with_checks(more)


def _numbers(archive: RoundArchive, training: int | None, number: int | None) -> tuple[int, ...]:
    if training is not None and number is not None:
        raise ConfigError("expected one of --round and --number, got both")
    if number is not None:
        return (number,)
    finished = archive.rounds()
    if training is None:
        if not finished:
            raise ConfigError(f"{archive.directory}: expected finished rounds, got none")
        return finished
    stage = training + STATISTICS_STAGE
    found = tuple(one for one in finished if one // NUMBERS_PER_STAGE == stage)
    if not found:
        raise ConfigError(
            f"{archive.directory}: expected training round {training} to be finished, it is not "
            "(it may have been lost: see the report)"
        )
    return found


def _trusted(roster: Path | None, governance: str) -> FederationRoster | None:
    if roster is None:
        return None
    try:
        found = FederationRoster.decode(roster.read_bytes())
        key = bytes.fromhex(governance) if governance else found.governance
    except (OSError, ValueError) as error:
        raise ConfigError(f"{roster}: expected a roster and a key, got: {error}") from error
    found.check(key)
    return found


def _registry(directory: Path) -> Registry | None:
    if not (directory / "registry.sqlite").exists():
        return None
    return Registry.open_existing(directory)


def _keys(audit: RoundAudit, archive: RoundArchive, trusted: FederationRoster) -> Check:
    """Compare the keys that signed with those of a roster that the auditor trusts."""
    faults = []
    for transcript in audit.transcripts:
        used = archive.roster(transcript.roster_digest)
        if used.coordinator != trusted.coordinator:
            faults.append(PeerProtocolError("another coordinator signed", COORDINATOR))
        known = {member.index: member.keys for member in trusted.members}
        faults += [
            PeerProtocolError(f"site {site}: its keys are not those of the roster", COORDINATOR)
            for site, keys in used.sites.items()
            if known.get(site) != keys
        ]
    return check("The keys are those of the given roster", faults, f"version {trusted.version}")


def _show(console: Console, audit: RoundAudit) -> None:
    stage, retry = divmod(audit.number, NUMBERS_PER_STAGE)
    purpose = PURPOSES[audit.purpose.name]
    which = f" {stage - STATISTICS_STAGE}" if purpose == "training" else ""
    again = f", try {retry + 1}" if retry else ""
    table = Table(
        title=f"Round {audit.number}: {purpose}{which}{again}", title_justify="left",
        show_header=False, title_style="bold",
    )  # fmt: skip
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column(overflow="fold")
    for one in audit.checks:
        table.add_row(MARKS[one.outcome], one.what, "\n".join(one.details))
    console.print(table)


def _verdict(
    console: Console, archive: RoundArchive, audits: list[RoundAudit],
    trusted: FederationRoster | None,
) -> None:  # fmt: skip
    broken = [one for one in audits if not one.holds]
    skipped = sum(any(c.outcome == "not checked" for c in one.checks) for one in audits)
    if broken:
        blamed = sorted({who for one in broken for who in one.blamed})
        names = ", ".join("the coordinator" if who == 0 else f"site {who}" for who in blamed)
        numbers = ", ".join(str(one.number) for one in broken)
        console.print(f"[bold red]Do not trust round {numbers}.[/] The evidence names {names}.")
    else:
        console.print(f"[bold green]Nothing is broken[/] in {len(audits)} round(s).")
    if skipped:
        console.print(f"In {skipped} of them not everything could be checked; see above.")
    if trusted is None:
        digests = {one.transcripts[0].roster_digest for one in audits}
        keys = sorted({archive.roster(digest).coordinator for digest in digests})
        console.print(
            "The keys are those that the archive says; give --roster, or compare the "
            f"coordinator's: {'; '.join(fingerprint(key) for key in keys)}"
        )
