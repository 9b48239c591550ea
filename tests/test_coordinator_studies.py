"""A study's folder: what people order, how it stands, and the commands that write and read it."""

import json
from datetime import UTC, datetime

import pytest
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from hospitium_common.errors import ConfigError
from hospitium_common.first_model import load_first_model
from hospitium_common.study.signature import check_signature
from hospitium_server.founding import found
from hospitium_server.locking import is_served, only_server
from hospitium_server.settings import CoordinatorHome
from hospitium_server.studies import (
    RoundStatus,
    SiteStatus,
    State,
    Status,
    StudyFolder,
    every,
    find,
    submit,
)
from hospitium_server.study_cli import register
from hospitium_simulations.quick_study import write_quick_study
from tests.enrolment_kit import refuse, succeed


@pytest.fixture
def folder(tmp_path):
    made = StudyFolder(tmp_path / "studies" / "pneumonia")
    made.path.mkdir(parents=True)
    made.give_order(run=True)
    return made


STATUS = Status(
    state=State.RUNNING, order=1, what="training", since=5.0, round=3,
    sites={2: SiteStatus(name="ukm", what="training", since=4.0, last_round=2)},
    rounds=(RoundStatus(round=2, sites=(1, 2), missing={3: "silent"}, auroc=0.8, loss=0.4),),
)  # fmt: skip


def test_a_status_is_read_as_it_was_written(folder):
    assert folder.status() == Status(state=State.SUBMITTED)
    folder.write_status(STATUS)
    assert folder.status() == STATUS


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', '{"format": 1, "state": "odd"}'])
def test_a_damaged_status_is_an_error_that_names_its_file(folder, text):
    (folder.path / "status.json").write_text(text)
    with pytest.raises(ConfigError, match=r"status\.json: expected a status"):
        folder.status()


def test_an_order_is_wanted_until_it_is_carried_out(folder):
    assert folder.is_wanted
    folder.write_status(STATUS)
    assert folder.is_wanted  # it runs, and is taken up again after a restart
    folder.end(State.FINISHED, "")
    assert not folder.is_wanted
    assert folder.status().rounds == STATUS.rounds


def test_stop_and_resume_are_new_orders(folder):
    folder.write_status(STATUS)
    assert folder.give_order(run=False).number == 2
    assert not folder.is_wanted
    folder.end(State.STOPPED, "")
    folder.give_order(run=True)
    assert folder.is_wanted


def test_what_failed_is_not_started_again_before_somebody_resumes_it(folder):
    folder.write_status(STATUS)
    folder.end(State.FAILED, "too few sites")
    assert not folder.is_wanted
    folder.give_order(run=True)
    assert folder.is_wanted


def test_studies_without_an_order_are_not_there(tmp_path, folder):
    (tmp_path / "studies" / "cut-off").mkdir()
    assert [one.id for one in every(tmp_path / "studies")] == ["pneumonia"]
    with pytest.raises(ConfigError, match="known: pneumonia"):
        find(tmp_path / "studies", "cut-off")


def test_a_submitted_study_is_signed_has_its_first_model_and_is_wanted(tmp_path):
    key = Ed25519PrivateKey.generate()
    file = write_quick_study(tmp_path, "tiny")
    made = submit(tmp_path / "studies", file, key)
    study = made.study()
    assert check_signature(study, made.file) == key.public_key().public_bytes_raw()
    layout, first = load_first_model(made.first_model, study)
    assert first.shape == (layout.size,)
    assert made.is_wanted
    with pytest.raises(ConfigError, match="submitted before"):
        submit(tmp_path / "studies", file, key)
    other = write_quick_study(tmp_path, "tiny", hidden="[9]")
    with pytest.raises(ConfigError, match="expected a new id"):
        submit(tmp_path / "studies", other, key)


def test_one_server_per_coordinator(tmp_path):
    home = CoordinatorHome(tmp_path)
    assert not is_served(home)
    with only_server(home):
        assert is_served(home)
        with pytest.raises(ConfigError, match="only server of this coordinator"), only_server(home):
            raise AssertionError
    assert not is_served(home)


# --- commands


@pytest.fixture
def run(tmp_path):
    home = CoordinatorHome(tmp_path / "coordinator")
    found(home, "thorax-net", ("localhost",), datetime.now(UTC))
    folder = StudyFolder(home.path / "studies" / "tiny")
    folder.path.mkdir(parents=True)
    folder.file.write_bytes(write_quick_study(tmp_path, "tiny").read_bytes())
    folder.give_order(run=True)
    app = typer.Typer()
    register(app)

    def call(*words):
        return CliRunner().invoke(app, [*words, "--home", str(home.path)])

    call.folder = folder
    return call


def test_commands_say_how_a_study_stands(run):
    assert "submitted" in succeed(run("status", "tiny"))
    run.folder.write_status(STATUS)
    shown = succeed(run("status", "tiny"))
    assert "round 2 of 3: validation AUROC 0.800, loss 0.400, 2 sites" in shown
    assert "running" in shown
    assert "tiny" in succeed(run("list"))


def test_stop_and_resume_only_where_they_mean_something(run):
    assert "expected a study that was stopped" in refuse(run("resume", "tiny"))
    assert "No coordinator is running now" in succeed(run("stop", "tiny"))
    assert not run.folder.order().run
    run.folder.end(State.STOPPED, "")
    assert "expected a study that runs" in refuse(run("stop", "tiny"))
    assert "goes on" in succeed(run("resume", "tiny"))
    assert run.folder.order().run
    run.folder.end(State.FINISHED, "")
    assert "got a finished one" in refuse(run("resume", "tiny"))


def test_watching_a_study_that_failed_ends_with_its_reason(run):
    run.folder.write_status(STATUS)
    run.folder.end(State.FAILED, "expected 3 sites, got 2")
    assert "expected 3 sites, got 2" in refuse(run("watch", "tiny"))


def test_a_report_needs_a_finished_study(run):
    assert "expected a finished study" in refuse(run("report", "tiny"))


def test_unknown_studies_are_refused_with_the_known_ones(run):
    assert "known: tiny" in refuse(run("status", "pneumonia"))


def test_no_status_file_holds_more_than_totals(folder):
    folder.write_status(STATUS)
    document = json.loads((folder.path / "status.json").read_text())
    (made,) = document["rounds"]
    assert set(made) == {
        "round", "sites", "missing", "auroc", "loss", "seconds", "rejected"
    }  # fmt: skip
    assert set(document["sites"]["2"]) == {"name", "what", "since", "last_round"}
