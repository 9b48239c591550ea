"""`hospitium site`: what a hospital decides, and what its own books say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hospitium_client import enrolment_cli, inclusion_cli
from hospitium_client.policy import NEW_POLICY, SitePolicy
from hospitium_client.protection.ledger import Ledger
from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError
from hospitium_common.study import load_study
from hospitium_common.study.explain import explain
from hospitium_common.study.reading import validate
from hospitium_common.study.signature import check_signature, fingerprint

app = typer.Typer(help="A hospital's own decisions and books.", no_args_is_help=True)
app.add_typer(enrolment_cli.app)
app.add_typer(inclusion_cli.app)

PolicyFile = Annotated[Path, typer.Option(help="The site's rules; made if it is not there.")]
StudyFile = Annotated[Path, typer.Argument(help="The study file, its .sig beside it.")]


@app.command()
def review(study: StudyFile, policy: PolicyFile = Path("policy.toml")) -> None:
    """Explain a study in plain words and compare it with this hospital's rules."""
    document = load_study(study)
    coordinator = check_signature(document, study)
    rules = _load(policy)
    table = Table(title=f"{study}", show_header=False, show_lines=True, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for question, answer in explain(document):
        table.add_row(question, answer)
    table.add_row("Who signed it?", f"the coordinator with key {fingerprint(coordinator)}")
    Console().print(table)
    approving = rules.model_copy(update={"approved": rules.approved | {document.digest.hex()}})
    approving.check(document)
    approved = document.digest.hex() in rules.approved
    Console().print(
        "It keeps this hospital's rules"
        + (" and is approved." if approved else f". To agree: `hospitium site approve {study}`."),
        soft_wrap=True,
    )


@app.command()
def approve(study: StudyFile, policy: PolicyFile = Path("policy.toml")) -> None:
    """Agree to exactly this study; a changed one needs a new approval."""
    document = load_study(study)
    check_signature(document, study)
    rules = _load(policy)
    digest = document.digest.hex()
    rules.model_copy(update={"approved": rules.approved | {digest}}).check(document)
    _store(policy, rules, sorted(rules.approved | {digest}))
    Console().print(f"Approved {document.study.id}. `hospitium site revoke {study}` undoes it.")


@app.command()
def revoke(study: StudyFile, policy: PolicyFile = Path("policy.toml")) -> None:
    """Take an approval back: from now on the study is refused."""
    document, rules = load_study(study), _load(policy)
    digest = document.digest.hex()
    if digest not in rules.approved:
        raise ConfigError(f"{policy}: expected {document.study.id} to be approved, it is not")
    _store(policy, rules, sorted(rules.approved - {digest}))
    Console().print(f"Revoked {document.study.id}.")


@app.command("ledger")
def show_ledger(
    file: Annotated[Path, typer.Argument(help="A site's ledger.sqlite.")],
    delta: Annotated[float, typer.Option(help="At which delta to state epsilon.")] = 1e-5,
) -> None:
    """Check the chain of a ledger and show what was spent; nothing is changed."""
    from hospitium_client.training.accounting import epsilon  # torch takes seconds to load

    if not file.exists():
        raise ConfigError(f"{file}: expected a ledger, got nothing there")
    ledger = Ledger(file)
    spends = ledger.spends()
    ledger.close()
    table = Table(title=f"{file}: {len(spends)} entries, chain intact", title_justify="left")
    for column in ("study", "round", "what", "unit", "rate", "noise", "steps"):
        table.add_column(column)
    for one in spends:
        event = one.event
        numbers = (
            ("", "", "", "")
            if event is None
            else (event.unit, f"{event.sampling_rate:.4f}", f"{event.noise_multiplier:.3f}",
                  str(event.steps))
        )  # fmt: skip
        table.add_row(one.study.hex()[:8], str(one.round), one.kind, *numbers)
    Console().print(table)
    events = [one.event for one in spends if one.event is not None]
    Console().print(f"All together: epsilon {epsilon(events, delta):.3f} at delta {delta:g}.")


def _load(path: Path) -> SitePolicy:
    if not path.exists():
        write_durably(path, NEW_POLICY.encode())
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return validate(SitePolicy, document, str(path))


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
