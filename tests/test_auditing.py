"""Checking finished rounds afterwards: real rounds, and archives that somebody changed."""

import hashlib
import json
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import typer
from typer.testing import CliRunner

from hospitium_client import inclusion_cli
from hospitium_client.protection.receipts import keep_receipt, read_receipts
from hospitium_client.work import SiteWork
from hospitium_common.archive import RoundArchive
from hospitium_common.auditing import audit_round
from hospitium_common.errors import ConfigError
from hospitium_common.messages import Masked, decode
from hospitium_common.study.document import canonical_json
from hospitium_common.transcript import Transcript, announced
from hospitium_server.audit_cli import audit
from hospitium_simulations.faults import Fault
from hospitium_simulations.federation import SimulationOptions, simulate
from tests.federation_kit import Notes, hospitals, study_of

TRAINING_1, TRAINING_2 = 32, 48
COMMAND = typer.Typer()
COMMAND.command()(audit)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Five hospitals, of which one drops out of round 2 after its READY."""
    directory = tmp_path_factory.mktemp("finished")
    options = SimulationOptions(keep_masked=True, faults=(Fault.parse("drop:5:masked:2"),))
    simulate(study_of(rounds=2), hospitals(5), directory, options, Notes())
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def archive_of(directory) -> RoundArchive:
    return RoundArchive(directory / "coordinator" / "rounds")


def run_audit(directory, *arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        COMMAND, [str(directory / "coordinator"), *arguments]
    )


def change(directory, number, **changes) -> None:
    """Write another transcript over a round's, as a lying coordinator could."""
    archive = archive_of(directory)
    (transcript,) = archive.transcripts(number)
    archive.keep(replace(transcript, **changes))


def test_an_honest_run_holds_in_every_round_down_to_the_models(finished):
    done = run_audit(finished)
    assert done.exit_code == 0, done.output
    assert "Nothing is broken in 4 round(s)" in done.output
    for told in (
        "version 2 is version 1 moved by this sum", "the normalisation is computed from this sum",
        "that are reported are these totals", "seeds of 4 survivors and 1 dropped sites",
        "follows round 32, and round 64 names its result",
    ):  # fmt: skip
        assert told in done.output


def test_one_round_is_asked_for_by_its_training_round_or_its_number(finished):
    by_round = run_audit(finished, "--round", "2")
    by_number = run_audit(finished, "--number", str(TRAINING_2))
    assert by_round.exit_code == by_number.exit_code == 0
    assert by_round.output == by_number.output
    assert "Round 48: training 2" in by_round.output
    with pytest.raises(ConfigError, match="training round 9 to be finished"):
        raise run_audit(finished, "--round", "9").exception


def test_without_vectors_all_but_the_sum_is_checked_and_the_gap_is_said(copy):
    shutil.rmtree(copy / "coordinator" / "rounds" / "00048" / "1")
    done = run_audit(copy, "--round", "2")
    assert done.exit_code == 0
    assert "the masked vectors were not kept" in done.output
    assert "not everything could be checked" in done.output


def other_result(directory):
    change(directory, TRAINING_1, result=bytes(64))


def other_vector(directory):
    path = directory / "coordinator" / "rounds" / "00032" / "1" / "site-003.masked"
    message = decode(path.read_bytes())
    body = bytearray(message.body)
    body[0] ^= 1
    path.write_bytes(replace(message, body=bytes(body)).encode())


def vector_gone(directory):
    (directory / "coordinator" / "rounds" / "00032" / "1" / "site-003.masked").unlink()


def other_seed(directory):
    (transcript,) = archive_of(directory).transcripts(TRAINING_1)
    released = {**transcript.released, 2: bytes(32)}
    change(directory, TRAINING_1, released=released)


def confirmations_gone(directory):
    (transcript,) = archive_of(directory).transcripts(TRAINING_1)
    change(directory, TRAINING_1, acks=dict(list(transcript.acks.items())[:3]))


def forged_digest(directory):
    (transcript,) = archive_of(directory).transcripts(TRAINING_1)
    digest, _ = transcript.digests[4]
    change(directory, TRAINING_1, digests={**transcript.digests, 4: (digest, bytes(64))})


def site_left_out(directory):
    (transcript,) = archive_of(directory).transcripts(TRAINING_1)
    others = {site: row for site, row in transcript.digests.items() if site != 4}
    change(directory, TRAINING_1, digests=others)


def round_gone(directory):
    shutil.rmtree(directory / "coordinator" / "rounds" / "00016")


def summed_twice(directory):
    home = directory / "coordinator" / "rounds" / "00032"
    shutil.copy(home / "1.transcript", home / "2.transcript")


def other_model(directory):
    rewritten(directory, 1, "parameters", lambda data: data + np.float32(0.001))


LIES = {
    "announced another result": (other_result, "not the sum of the vectors", "the coordinator"),
    "put another vector in": (other_vector, "site 3: another vector was signed", "coordinator"),
    "hid a vector": (vector_gone, "masked vector of every survivor", "the coordinator"),
    "released another seed": (other_seed, "something else than it committed to", "coordinator"),
    "had too few confirmations": (confirmations_gone, "expected 4 confirmations", "coordinator"),
    "forged a signature": (forged_digest, "its digest is not signed by it", "the coordinator"),
    "left a site out afterwards": (site_left_out, "expected 4 confirmations", "the coordinator"),
    "hid a round": (round_gone, "names another previous result", "the coordinator"),
    "summed twice": (summed_twice, "site 1 is in two sums of this round and confirmed both",
                     "site 1, site 2, site 3, site 4, site 5"),
    "used another model": (other_model, "they differ by 0.001", "the coordinator"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_audit_names_a_coordinator_that(copy, lie):
    tell, told, named = LIES[lie]
    tell(copy)
    done = run_audit(copy, "--round", "1")
    assert done.exit_code == 1
    assert told in done.output
    assert "Do not trust round 32" in done.output
    assert named in done.output.split("The evidence names")[1]


def rewritten(directory, number, name, change):
    """Change one tensor of a version, and the digest of its file in the registry."""
    path = directory / "coordinator" / f"version-{number:04d}.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    tensors[name] = change(tensors[name])
    data = safetensors.numpy.save(tensors)
    path.write_bytes(data)
    with sqlite3.connect(directory / "coordinator" / "registry.sqlite") as database:
        made = hashlib.sha256(data).hexdigest()
        database.execute("UPDATE versions SET digest = ? WHERE number = ?", (made, number))


def other_normalisation(directory):
    rewritten(directory, 0, "normalisation", lambda data: data ^ (np.arange(len(data)) == 4))


def other_figures(directory):
    with sqlite3.connect(directory / "coordinator" / "registry.sqlite") as database:
        database.execute("UPDATE evaluations SET totals = zeroblob(length(totals))")


def models_never_sent(directory):
    for number in (0, 1, 2):
        rewritten(directory, number, "parameters", lambda data: data + np.float32(1))


@pytest.mark.parametrize(
    ("tell", "number", "told"),
    [
        (other_normalisation, 16, "the normalisation is another"),
        (other_figures, 64, "the figures kept are others"),
        (models_never_sent, 48, "no version of the registry was sent"),
    ],
    ids=["normalisation", "figures", "model sent"],
)
def test_what_came_of_a_sum_is_compared_with_the_registry(copy, tell, number, told):
    tell(copy)
    done = run_audit(copy, "--number", str(number))
    assert done.exit_code == 1
    assert told in done.output
    assert "The evidence names the coordinator" in done.output


def test_sites_of_several_groups_in_one_sum_are_noticed(copy):
    path = copy / "coordinator" / "rounds" / "study.json"
    document = json.loads(path.read_text())
    document["study"]["robustness"]["groups"] = 3
    document["study"]["cohort"]["maximum_sites"] = 9
    path.write_text(json.dumps(document))
    checks = {one.what: one for one in audit_round(archive_of(copy), TRAINING_1).checks}
    once = checks["Every site is in one sum only"]
    assert once.details == ("sites of several groups were summed together",)
    assert once.blamed == (0,)


def test_a_wrong_result_breaks_the_chain_of_the_round_after_too(copy):
    other_result(copy)
    after = audit_round(archive_of(copy), TRAINING_2)
    assert [check.what for check in after.checks if check.outcome == "broken"] == [
        "Results form one chain"
    ]
    assert after.blamed == (0,)


def test_keys_are_compared_with_a_roster_from_elsewhere(finished, tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.federation import FederationRoster, Member
    from hospitium_common.secagg.keys import SiteKeys

    archive = archive_of(finished)
    (transcript,) = archive.transcripts(TRAINING_1)
    used = archive.roster(transcript.roster_digest)
    governance = Ed25519PrivateKey.generate()

    def written(sites):
        members = tuple(
            Member(index=i, name=f"s{i}", title="S", keys=keys, node_key=bytes([i]), expires=2**40)
            for i, keys in sites.items()
        )
        roster = FederationRoster(
            name="audit", version=3, coordinator=used.coordinator, members=members,
            governance=governance.public_key().public_bytes_raw(),
        )  # fmt: skip
        path = tmp_path / "roster.json"
        path.write_bytes(roster.signed_by(governance).encode())
        return path

    good = run_audit(finished, "--round", "1", "--roster", str(written(used.sites)))
    assert good.exit_code == 0, good.output
    swapped = {**used.sites, 2: SiteKeys.generate().public()}
    bad = run_audit(finished, "--round", "1", "--roster", str(written(swapped)))
    assert bad.exit_code == 1
    assert "site 2: its keys are not those of the roster" in bad.output
    key = bytes(32).hex()
    other = run_audit(finished, "--round", "1", "--roster", str(written(used.sites)),
                      "--governance", key)  # fmt: skip
    assert "governance key" in str(other.exception)


def test_an_archive_holds_what_it_was_given_and_names_the_last_result(finished):
    archive = archive_of(finished)
    assert archive.rounds() == (16, 32, 48, 64)
    assert [message.site for message in archive.vectors(TRAINING_2, 1)] == [1, 2, 3, 4]
    (last,) = archive.transcripts(64)
    assert archive.last_result() == last.result == announced([last.result])
    archived = archive.study()
    assert archived.digest == archived.study.digest == study_of(rounds=2).digest
    assert archived.tail_words == len(next(archive.vectors(64, 1)).tail) // 8
    with pytest.raises(ConfigError, match="expected round 7, got rounds 16, 32, 48, 64"):
        archive.transcripts(7)


def test_a_study_that_was_signed_before_an_option_existed_keeps_its_digest(copy):
    path = copy / "coordinator" / "rounds" / "study.json"
    document = json.loads(path.read_text())
    del document["study"]["robustness"]  # as if written by a version that did not know it
    path.write_text(json.dumps(document))
    archived = archive_of(copy).study()
    older = hashlib.sha256(canonical_json(document["study"])).digest()
    assert archived.digest == archived.policy(TRAINING_1).study == older
    assert archived.study == study_of(rounds=2)
    assert archived.study.digest != older


def test_an_archive_with_other_files_in_it_is_refused(copy):
    rounds = copy / "coordinator" / "rounds"
    (rounds / "00032" / "1.transcript").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="expected a transcript, got something else"):
        archive_of(copy).transcripts(TRAINING_1)
    document = json.loads((rounds / "study.json").read_text())
    (rounds / "study.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(ConfigError, match="expected the study of an archive"):
        archive_of(copy).study()


def test_nothing_in_an_archive_tells_of_one_update(finished, tmp_path):
    """Two runs over other data of one site leave archives that differ in random bytes alone."""
    assert not list((finished / "coordinator" / "rounds").rglob("*.safetensors"))
    for path in (finished / "coordinator" / "rounds").rglob("*.transcript"):
        task = Transcript.decode(path.read_bytes()).task
        assert task.model == task.public == b""
    bodies = [message.body for message in archive_of(finished).vectors(TRAINING_2, 1)]
    assert all(isinstance(message, Masked) for message in archive_of(finished).vectors(48, 1))
    assert len({bytes(body) for body in bodies}) == 4


def test_vectors_of_a_failed_attempt_are_not_kept(tmp_path):
    options = SimulationOptions(
        keep_masked=True,
        faults=(Fault.parse("drop:1:masked:1"), Fault.parse("drop:2:masked:1")),
    )
    study = study_of(rounds=1, cohort={"minimum_sites": 3})
    simulate(study, hospitals(5), tmp_path, options, Notes())
    archive = archive_of(tmp_path)
    (transcript,) = archive.transcripts(TRAINING_1)
    assert transcript.task.attempt == 2
    assert list(archive.vectors(TRAINING_1, 1)) == []
    assert len(list(archive.vectors(TRAINING_1, 2))) == 3


def test_rounds_that_were_rejected_or_undone_hold_too_and_so_does_an_average(tmp_path, monkeypatch):
    train = SiteWork.train

    def poisoned(self, number, *arguments, **more):
        honest, factor = train(self, number, *arguments, **more), {2: 500, 4: -30}.get(number, 1)
        if self.home.name != "hospital-1":
            return honest
        return replace(honest, vector=honest.vector * np.float32(factor))

    monkeypatch.setattr(SiteWork, "train", poisoned)
    # a wide ring, so that the poison passes the quantiser
    study = study_of(
        rounds=6, robustness={"gate": 0.05, "update_norm": 0.8}, strategy={"averaging": 0.5},
        cohort={"ring_bits": 32, "update_bound": 50.0},
    )  # fmt: skip
    options = SimulationOptions(keep_masked=True)
    outcome = simulate(study, hospitals(4), tmp_path, options, Notes())
    history = [made for made, _ in outcome.history]
    assert history[2].rejected
    assert history[4].withdrawn
    assert history[5].rejected
    done = run_audit(tmp_path)
    assert done.exit_code == 0, done.output
    for told in (
        "version 2 keeps the model of version 1: not used",
        "version 5 keeps the model of version 3: not used",
        "version 4 is version 3 moved by this sum", "version 6 is version 3 moved by this sum",
        "the moving average up to version 6",
    ):  # fmt: skip
        assert told in done.output


def inclusion(directory, site, rounds=None):
    home = directory / "sites" / f"hospital-{site}"
    archive = rounds or directory / "coordinator"
    return CliRunner(env={"COLUMNS": "200"}).invoke(inclusion_cli.app, [str(home), str(archive)])


def test_every_site_finds_its_vectors_counted(finished):
    for site in range(1, 6):
        done = inclusion(finished, site)
        assert done.exit_code == 0, done.output
        assert done.output.count("counted") >= 4


def test_a_site_whose_vector_was_lost_on_the_way_hears_that_its_round_went_on_without_it(finished):
    done = inclusion(finished, 5)
    assert "its vector is not in the announced sum" not in done.output
    assert "counted without this site" in done.output


def test_transcripts_of_another_story_do_not_hold(copy, tmp_path):
    simulate(study_of(rounds=2), hospitals(5), tmp_path / "other", SimulationOptions(), Notes())
    done = inclusion(copy, 1, tmp_path / "other" / "coordinator")
    assert done.exit_code == 1
    assert "the coordinator told two stories" in done.output
    assert "is it another study?" in done.output


def test_a_site_notices_that_its_vector_is_not_the_one_that_was_counted(copy):
    home = copy / "sites" / "hospital-1" / "receipts"
    first = read_receipts(home)[0]
    keep_receipt(home, replace(first, digest=bytes(64)))
    done = inclusion(copy, 1)
    assert done.exit_code == 1
    assert "its vector is not in the announced sum" in done.output
    assert "another study" not in done.output
    keep_receipt(home, replace(first, previous_result=bytes([1]) * 64))
    assert "another previous result" in inclusion(copy, 1).output


def test_receipts_that_are_none_are_refused(copy):
    home = copy / "sites" / "hospital-1" / "receipts"
    next(home.iterdir()).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="expected a receipt"):
        read_receipts(home)
