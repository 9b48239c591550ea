"""Studies on a hospital's disk, and what it agrees to: by file, by id, by digest."""

import pytest
from typer.testing import CliRunner

from hospitium_client.approval_cli import app
from hospitium_client.approvals import load_policy
from hospitium_client.enrolment import PinnedRosters
from hospitium_client.studies import all_studies, find_study, open_study, receive
from hospitium_common.errors import ConfigError, NotApproved, PeerProtocolError
from hospitium_common.study import parse_study
from hospitium_common.study.signature import sign_study, signature_path
from tests.site_kit import STUDY, Hospitals


@pytest.fixture
def hospitals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Hospitals(tmp_path, count=1)


@pytest.fixture
def home(hospitals):
    return hospitals.homes[1]


def arrive(hospitals, text=STUDY):
    study = parse_study(text)
    path = hospitals.folder / "offered.toml"
    path.write_text(text)
    signature = sign_study(study, path, hospitals.coordinator).read_bytes()
    public = hospitals.coordinator.public_key().public_bytes_raw()
    return receive(hospitals.homes[1].studies, text.encode(), signature, public)


def site(home, *words):
    done = CliRunner().invoke(app, [*words, "--home", str(home.path)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_study_that_arrived_is_listed_reviewed_approved_and_revoked_by_its_id(hospitals, home):
    assert "No study" in site(home, "studies")
    arrive(hospitals)
    assert "waits for approval" in site(home, "studies")
    assert "To agree: `hospitium site approve small-study`" in site(home, "review", "small-study")
    assert "Approved small-study" in site(home, "approve", "small-study")
    assert hospitals.study.digest.hex() in load_policy(home.policy).approved
    assert "approved" in site(home, "studies")
    assert "Revoked small-study" in site(home, "revoke", "small-study")
    assert not load_policy(home.policy).approved


def test_an_approval_may_name_the_folder_with_the_data(hospitals, home, tmp_path):
    arrive(hospitals)
    other = tmp_path / "films"
    other.mkdir()
    with pytest.raises(ConfigError, match=r"dataset\.toml"):
        site(home, "approve", "small-study", "--data", str(other))
    assert not load_policy(home.policy).approved
    (other / "dataset.toml").write_text('kind = "table"\nfile = "rows.csv"\n')
    before = home.settings_file.read_text()
    site(home, "approve", "small-study", "--data", "films")
    assert home.data_of("small-study") == other
    assert set(before.splitlines()) <= set(home.settings_file.read_text().splitlines())


def test_two_versions_of_a_study_are_told_apart_by_their_digests(hospitals, home):
    first = arrive(hospitals)
    second = arrive(hospitals, STUDY.replace("rounds = 2", "rounds = 3"))
    with pytest.raises(ConfigError, match=second.digest[:16]):
        find_study(home.studies, "small-study")
    assert find_study(home.studies, first.digest[:12]).study.rounds == 2
    assert find_study(home.studies, second.digest).study.rounds == 3
    assert [one.study.rounds for one in all_studies(home.studies)] == [2, 3]


def test_a_study_file_from_another_coordinator_is_not_approved(hospitals, home):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    sign_study(hospitals.study, hospitals.study_path, Ed25519PrivateKey.generate())
    with pytest.raises(ConfigError, match="this hospital's coordinator"):
        site(home, "approve", str(hospitals.study_path))
    assert PinnedRosters(home).is_admitted


def test_a_study_that_breaks_a_rule_is_shown_but_not_approved(hospitals, home):
    arrive(hospitals)
    home.policy.write_text(home.policy.read_text().replace("= 3", "= 5"))
    assert "breaks a rule" in site(home, "studies")
    with pytest.raises(NotApproved, match="at least 5 sites"):
        site(home, "approve", "small-study")


def test_a_study_that_was_changed_on_disk_is_not_used(hospitals, home):
    stored = arrive(hospitals)
    stored.path.write_text(STUDY.replace("rounds = 2", "rounds = 9"))
    with pytest.raises(ConfigError, match="got a changed one"):
        open_study(home.studies, hospitals.study.digest)
    with pytest.raises(ConfigError, match="got a changed one"):
        find_study(home.studies, "small-study")


def test_a_study_that_never_arrived_is_not_found(hospitals, home):
    with pytest.raises(ConfigError, match="hospitium site studies"):
        find_study(home.studies, "another-study")
    with pytest.raises(PeerProtocolError, match="offered before"):
        open_study(home.studies, bytes(32))
    assert signature_path(hospitals.study_path).exists()
