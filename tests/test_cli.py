"""The command line: every command says what it does, and refuses in one line."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "study new", "study check", "site review", "site approve", "site revoke", "site ledger",
    "data check", "data convert medmnist", "coordinator init", "coordinator sign",
    "coordinator models", "coordinator enroll", "coordinator admission", "coordinator revoke",
    "coordinator renew", "coordinator roster", "simulate", "demo",
]  # fmt: skip


def hospitium(arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a person would."""
    command = [str(Path(sys.executable).parent / "hospitium"), *shlex.split(arguments)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, tmp_path):
    shown = hospitium(f"{command} --help", tmp_path)
    assert shown.returncode == 0
    assert "Usage: hospitium" in shown.stdout


def test_help_explains_arguments_too(tmp_path):
    """Some versions of click and typer together leave that out."""
    assert "Where to write it." in hospitium("study new --help", tmp_path).stdout


def test_a_coordinator_signs_a_study_and_a_hospital_reviews_approves_and_revokes_it(tmp_path):
    steps = [
        ("study new my-study.toml --task ehr_sequence_classification", "Wrote my-study.toml"),
        ("study check my-study.toml", "What is promised?"),
        ("coordinator init net --host localhost", "Fingerprints"),
        ("coordinator sign my-study.toml", "my-study.toml.sig"),
        ("site review my-study.toml", "keeps this hospital's rules"),
        ("site approve my-study.toml", "Approved icu-mortality"),
        ("site review my-study.toml", "and is approved"),
        ("site revoke my-study.toml", "Revoked icu-mortality"),
    ]
    for step, expected in steps:
        done = hospitium(step, tmp_path)
        assert done.returncode == 0, (step, done.stderr)
        assert expected in done.stdout, step
    assert (tmp_path / "coordinator/keys/coordinator.key").stat().st_mode & 0o777 == 0o600
    assert "approved = []" in (tmp_path / "policy.toml").read_text()


REFUSALS = {
    "a study that is not there": ("study check none.toml", "none.toml: expected a study file"),
    "a study file that exists": ("study new a.toml", "a.toml: expected to write a new file"),
    "no signature": ("site review a.toml", "a.toml.sig: expected the coordinator's signature"),
    "no key": ("coordinator sign a.toml", "coordinator.key: expected the coordinator's key"),
    "no registry": ("coordinator models .", "registry.sqlite: expected a registry"),
    "no ledger": ("site ledger x.sqlite", "x.sqlite: expected a ledger"),
    "no data": ("simulate a.toml --data none", "none/dataset.toml: expected a data mapping"),
    "a partition of no kind": (
        "simulate a.toml --data . --partition fair",
        "expected a partition of site, iid, pooled, dirichlet:ALPHA or quantity:ALPHA, got 'fair'",
    ),
    "a fault of no kind": (
        "simulate a.toml --data . --fault explode:1:masked",
        "expected a fault KIND:SITE:MESSAGE[:ROUND]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_is_refused_in_one_line_without_a_traceback(case, tmp_path):
    arguments, complaint = REFUSALS[case]
    assert hospitium("study new a.toml", tmp_path).returncode == 0
    done = hospitium(arguments, tmp_path)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "Traceback" in hospitium(f"{arguments} --debug", tmp_path).stderr


def test_a_changed_study_no_longer_has_its_signature(tmp_path):
    for step in ("study new a.toml", "coordinator init net --host h1", "coordinator sign a.toml"):
        assert hospitium(step, tmp_path).returncode == 0
    study = tmp_path / "a.toml"
    study.write_text(study.read_text().replace("epsilon = 8.0", "epsilon = 80.0"))
    done = hospitium("site review a.toml", tmp_path)
    assert done.returncode == 1
    assert "changed after it was signed" in done.stderr


def test_the_demo_takes_three_hospitals_from_keys_to_two_reports(tmp_path):
    done = hospitium("demo --patients 60", tmp_path)
    assert done.returncode == 0, done.stderr
    for study in ("synthetic-films", "synthetic-stays"):
        page = tmp_path / "runs" / "demo" / "coordinator" / "studies" / study / "report.html"
        assert f"coordinator/studies/{study}/report.html" in done.stdout.replace("\n", "")
        assert "it has no medical use" in page.read_text()
        for picture in ("learning_curve", "roc", "precision_recall", "calibration"):
            assert (page.parent / f"{picture}.png").stat().st_size > 5000
    again = hospitium("demo --patients 60", tmp_path)
    assert again.returncode == 0
    assert "hospitium site init" not in again.stdout
