"""The trainer: what it believes, what it refuses, and a whole study through it."""

import logging
import threading
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.approvals import approve_study, revoke_study
from hospitium_client.enrolment import PinnedRosters
from hospitium_client.protection.ledger import Ledger
from hospitium_client.studies import MOST_STUDIES, all_studies, find_study
from hospitium_client.trainer import NO_ANSWER, Trainer
from hospitium_client.work import SiteWork
from hospitium_common.errors import ConfigError
from hospitium_common.messages import PairRequest, Reason, Refusal, StudyState
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.study.signature import sign_study
from tests.federation_kit import Notes
from tests.site_kit import STUDY, Hospitals


def no_passphrase():
    raise AssertionError("these keys have none")


@pytest.fixture
def hospitals(tmp_path):
    return Hospitals(tmp_path)


@pytest.fixture
def trainer(hospitals):
    made = Trainer(hospitals.homes[1], no_passphrase)
    yield made
    made.close()


def pair_request(hospitals, sites=(1, 2, 3), version=1):
    roster = hospitals.roster.for_study(hospitals.study.digest, 1, sites)
    return PairRequest(version=version, epoch=1, sites=sites, roster=roster.digest)


def refusal(hospitals, trainer, message, **options):
    _, answer = hospitals.ask(trainer.answer, message, **options)
    assert isinstance(answer, Refusal), answer
    return answer.reason


def test_an_offered_study_waits_for_a_person_and_then_is_approved(hospitals, trainer):
    assert hospitals.standing(trainer.answer).state is StudyState.WAITING
    stored = find_study(hospitals.homes[1].studies, "small-study")
    assert stored.study == hospitals.study
    approve_study(hospitals.homes[1].policy, stored.study)
    standing = hospitals.standing(trainer.answer)
    assert (standing.state, standing.roster_version) == (StudyState.APPROVED, 1)
    revoke_study(hospitals.homes[1].policy, stored.study)
    assert hospitals.standing(trainer.answer).state is StudyState.WAITING


def test_a_study_that_breaks_the_rules_is_refused_even_if_it_was_approved(hospitals, trainer):
    home = hospitals.homes[1]
    approve_study(home.policy, hospitals.study)
    home.policy.write_text(home.policy.read_text().replace("= 3", "= 4"))
    assert hospitals.standing(trainer.answer).state is StudyState.REFUSED
    assert refusal(hospitals, trainer, pair_request(hospitals)) is Reason.NOT_APPROVED


def test_an_approved_study_without_data_says_so(hospitals, trainer):
    hospitals.approve()
    (hospitals.homes[1].path / "records" / "dataset.toml").unlink()
    assert hospitals.standing(trainer.answer).state is StudyState.DATA_MISSING


@pytest.mark.parametrize("part", ["document", "signature", "roster"])
def test_an_offer_with_garbage_in_it_is_refused(hospitals, trainer, part):
    assert refusal(hospitals, trainer, hospitals.offer(**{part: b"{"})) is Reason.PROTOCOL
    assert not all_studies(hospitals.homes[1].studies)


def test_a_study_that_somebody_else_signed_is_refused(hospitals, trainer, tmp_path):
    path = tmp_path / "other.toml"
    path.write_text(STUDY)
    signature = sign_study(hospitals.study, path, Ed25519PrivateKey.generate()).read_bytes()
    assert refusal(hospitals, trainer, hospitals.offer(signature=signature)) is Reason.PROTOCOL


def test_another_study_under_the_same_signature_is_refused(hospitals, trainer):
    changed = STUDY.replace("rounds = 2", "rounds = 3").encode()
    assert refusal(hospitals, trainer, hospitals.offer(document=changed)) is Reason.PROTOCOL


def test_an_offer_about_another_study_than_the_request_is_refused(hospitals, trainer):
    assert refusal(hospitals, trainer, hospitals.offer(), study=bytes(32)) is Reason.PROTOCOL


def test_a_coordinator_cannot_fill_the_disk_with_studies(hospitals, trainer):
    for number in range(MOST_STUDIES):
        (hospitals.homes[1].studies / f"{number:064x}").mkdir(parents=True)
    assert refusal(hospitals, trainer, hospitals.offer()) is Reason.PROTOCOL


def test_a_stranger_gets_no_answer_and_a_log_line(hospitals, trainer, caplog):
    from hospitium_common.envelope import Request, seal_request

    stranger = Ed25519PrivateKey.generate()
    request = Request(
        study=hospitals.study.digest, nonce=bytes(16), payload=hospitals.offer().encode()
    )
    assert trainer.answer(seal_request(request, stranger)) == NO_ANSWER
    assert trainer.answer(b"garbage") == NO_ANSWER
    assert "the pinned coordinator" in caplog.text


def test_an_unknown_study_is_refused(hospitals, trainer):
    assert refusal(hospitals, trainer, pair_request(hospitals)) is Reason.PROTOCOL


def test_a_study_that_nobody_approved_is_not_worked_on(hospitals, trainer):
    hospitals.standing(trainer.answer)
    assert refusal(hospitals, trainer, pair_request(hospitals)) is Reason.NOT_APPROVED


def test_a_newer_roster_is_pinned_and_a_revoked_hospital_not_paired_with(hospitals, trainer):
    hospitals.approve()
    newer = hospitals.revoking(3)
    assert hospitals.standing(trainer.answer, roster=newer.encode()).roster_version == 2
    assert PinnedRosters(hospitals.homes[1]).pinned().version == 2
    request = pair_request(hospitals, version=2)
    assert refusal(hospitals, trainer, request) is Reason.PROTOCOL


def test_a_changed_key_waits_for_the_administrator(hospitals, trainer):
    hospitals.approve()
    other = SiteKeys.generate().public()
    members = [replace(m, keys=other) if m.index == 2 else m for m in hospitals.roster.members]
    offered = hospitals.sign(2, members)
    standing = hospitals.standing(trainer.answer, roster=offered.encode())
    assert (standing.state, standing.roster_version) == (StudyState.ROSTER_WAITING, 1)
    PinnedRosters(hospitals.homes[1]).accept(offered.digest)
    standing = hospitals.standing(trainer.answer, roster=offered.encode())
    assert (standing.state, standing.roster_version) == (StudyState.APPROVED, 2)


def test_an_older_roster_is_refused(hospitals, trainer):
    hospitals.standing(trainer.answer, roster=hospitals.revoking(3).encode())
    assert refusal(hospitals, trainer, hospitals.offer()) is Reason.PROTOCOL


def test_a_roster_that_another_governance_key_signed_is_not_gone_over_to(hospitals, trainer):
    forged = hospitals.sign(2, key=Ed25519PrivateKey.generate())
    standing = hospitals.standing(trainer.answer, roster=forged.encode())
    assert (standing.state, standing.roster_version) == (StudyState.ROSTER_WAITING, 1)


def test_a_hospital_that_was_revoked_takes_no_part(hospitals, trainer):
    hospitals.approve()
    offer = hospitals.offer(roster=hospitals.revoking(1).encode())
    assert refusal(hospitals, trainer, offer) is Reason.NOT_APPROVED
    assert refusal(hospitals, trainer, pair_request(hospitals, version=2)) is Reason.NOT_APPROVED


def test_an_enrolment_that_is_over_is_over(hospitals):
    hospitals.approve()
    trainer = Trainer(hospitals.homes[1], no_passphrase, clock=lambda: 2.0**41)
    assert refusal(hospitals, trainer, hospitals.offer()) is Reason.NOT_APPROVED
    trainer.close()


def test_three_trainers_finish_a_study_and_answer_a_second_one_after_a_restart(hospitals, tmp_path):
    hospitals.approve()
    trainers = {i: Trainer(home, no_passphrase) for i, home in hospitals.homes.items()}
    answers = {i: trainer.answer for i, trainer in trainers.items()}
    for answer in answers.values():
        assert hospitals.standing(answer).state is StudyState.APPROVED
    notes = Notes(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        hospitals.run(answers, tmp_path, notes)
    for index, trainer in trainers.items():  # the machine was switched off
        trainer.close()
        answers[index] = Trainer(hospitals.homes[index], no_passphrase).answer
    result = hospitals.run(answers, tmp_path)
    assert result.best.number > 0
    ledger = Ledger(hospitals.homes[2].ledger)
    kinds = [spend.kind for spend in ledger.spends()]
    ledger.close()
    assert kinds.count("training") == 2


def test_an_approval_taken_back_in_mid_study_counts_at_once(hospitals, tmp_path):
    hospitals.approve()
    answers = {i: Trainer(home, no_passphrase).answer for i, home in hospitals.homes.items()}
    for answer in answers.values():
        hospitals.standing(answer)
    with pytest.raises(KeyboardInterrupt):
        hospitals.run(answers, tmp_path, Notes(stop_after=1))
    revoke_study(hospitals.homes[3].policy, hospitals.study)
    with pytest.raises(Exception, match="policy does not allow"):
        hospitals.run(answers, tmp_path)


def test_an_offer_is_answered_while_an_exchange_is_being_worked_on(hospitals, trainer, monkeypatch):
    hospitals.approve()
    hospitals.standing(trainer.answer)
    gate, began = threading.Event(), threading.Event()

    def slow(*arguments):
        began.set()
        assert gate.wait(20)
        raise ConfigError("enough")

    monkeypatch.setattr("hospitium_client.trainer.load_policy", slow)
    busy = threading.Thread(target=hospitals.ask, args=(trainer.answer, pair_request(hospitals)))
    busy.start()
    assert began.wait(10)
    monkeypatch.undo()
    assert hospitals.standing(trainer.answer).state is StudyState.APPROVED
    gate.set()
    busy.join()


def test_running_out_of_memory_is_one_word_and_the_trainer_goes_on(
    hospitals, tmp_path, monkeypatch, caplog
):
    hospitals.approve()
    trainers = {i: Trainer(home, no_passphrase) for i, home in hospitals.homes.items()}
    answers = {i: trainer.answer for i, trainer in trainers.items()}
    for answer in answers.values():
        hospitals.standing(answer)
    with monkeypatch.context() as short_of_memory:
        short_of_memory.setattr(SiteWork, "statistics", _out_of_memory)
        with pytest.raises(Exception, match="fault at the site"):
            hospitals.run(answers, tmp_path)
    assert "4711" not in caplog.text
    assert not trainers[1]._open
    assert hospitals.run(answers, tmp_path).best.number > 0


def _out_of_memory(self):
    raise RuntimeError("[enforce fail] alloc: can't allocate 4711 bytes")


def test_nothing_that_is_logged_holds_a_patient_or_a_value(hospitals, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hospitals.approve()
    data = hospitals.homes[2].path / "records" / "rows.csv"
    rows = data.read_text().splitlines()
    patient, label, *values = rows[1].split(",")
    rows[1] = ",".join([patient, label, "secret-value", *values[1:]])
    data.write_text("\n".join(rows) + "\n")
    answers = {i: Trainer(home, no_passphrase).answer for i, home in hospitals.homes.items()}
    for answer in answers.values():
        hospitals.standing(answer)
    with pytest.raises(Exception, match="quality check"):
        hospitals.run(answers, tmp_path)
    assert "secret-value" not in caplog.text
    assert patient not in caplog.text
