"""Who stands ready for a study, and what people see of where every site is."""

from __future__ import annotations

import io

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from hospitium_common.errors import HospitiumError
from hospitium_common.messages import (
    ConfirmRequest,
    Reason,
    Refusal,
    Standing,
    StudyOffer,
    StudyState,
    decode,
)
from hospitium_common.study import load_study
from hospitium_common.study.signature import sign_study
from hospitium_server.attendance import Attendance
from hospitium_server.bulletin import Bulletin
from hospitium_server.evaluation import Figures
from hospitium_server.nodes import NodeStatus
from hospitium_server.registry import RoundRecord
from hospitium_server.studies import NOT_CONNECTED, State, StudyFolder
from hospitium_server.watch import View, describe, lines, watch
from hospitium_simulations.quick_study import write_quick_study
from tests.enrolment_kit import Governance, member

APPROVED = Standing(state=StudyState.APPROVED, roster_version=4)
WAITING = Standing(state=StudyState.WAITING, roster_version=4)


class Clock:
    def __init__(self):
        self.seconds = 1_000_000.0

    def __call__(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds


class Offered:
    def __init__(self, answers):
        self._answers = answers

    @property
    def sites(self):
        return frozenset(self._answers)

    def arrived(self):
        for site in [site for site, answer in self._answers.items() if answer is not None]:
            yield site, self._answers.pop(site)

    def give_up(self, reason):
        self._answers.clear()


class Transport:
    """Sites are what ``standings`` says: a message, or None for one that does not answer."""

    def __init__(self, standings):
        self.standings, self.offers = dict(standings), []

    def online(self):
        return dict.fromkeys(self.standings, 7)

    def send(self, requests, deadline_s):
        self.offers.append(sorted(requests))
        answers = {}
        for site, request in requests.items():
            assert isinstance(decode(request), StudyOffer)
            said = self.standings[site]
            answers[site] = None if said is None else said.encode()
        return Offered(answers)


class Scene:
    def __init__(self, tmp_path, patience_s=100.0):
        self.folder = StudyFolder(tmp_path / "tiny")
        self.folder.path.mkdir()
        self.folder.file.write_bytes(write_quick_study(tmp_path, "tiny").read_bytes())
        self.study = load_study(self.folder.file)
        sign_study(self.study, self.folder.file, Ed25519PrivateKey.generate())
        self.folder.give_order(run=True)
        self.governance = Governance()
        members = [member(index, expires=2**40) for index in range(1, 6)]
        self.roster = self.governance.roster(*members)
        self.clock = Clock()
        self.attendance = Attendance(
            study=self.study, folder=self.folder, roster=lambda: self.roster,
            patience_s=patience_s, check=lambda: None, clock=self.clock, sleep=self.clock.sleep,
        )  # fmt: skip
        self.bulletin = Bulletin(self.folder, self.roster, self.attendance.doubt, self.clock)

    def present(self, transport):
        return self.attendance.present(transport, self.bulletin).sites

    def where(self, site):
        return self.bulletin.status.sites[site].what


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_whoever_approved_under_this_roster_stands_ready(scene):
    others = {4: WAITING, 5: Standing(state=StudyState.APPROVED, roster_version=3)}
    transport = Transport({1: APPROVED, 2: APPROVED, 3: APPROVED, **others})
    assert scene.present(transport) == (1, 2, 3)
    assert "waiting for somebody there to approve" in scene.where(4)
    assert "goes by version 3 of the roster" in scene.where(5)


def test_who_stands_ready_is_not_asked_again_until_something_speaks_against_it(scene):
    transport = Transport(dict.fromkeys((1, 2, 3), APPROVED))
    scene.present(transport)
    scene.present(transport)
    assert transport.offers == [[1, 2, 3]]
    scene.bulletin.on_silence(2, "no answer before the deadline")
    scene.present(transport)
    assert transport.offers == [[1, 2, 3], [2]]


def test_a_site_that_approves_late_is_there_between_rounds(scene):
    transport = Transport({**dict.fromkeys((1, 2, 3), APPROVED), 4: WAITING})
    assert scene.present(transport) == (1, 2, 3)
    transport.standings[4] = APPROVED
    scene.clock.sleep(30)
    scene.present(transport)
    assert scene.present(transport) == (1, 2, 3, 4)


def test_a_site_that_left_is_not_invited(scene):
    transport = Transport(dict.fromkeys((1, 2, 3, 4), APPROVED))
    assert scene.present(transport) == (1, 2, 3, 4)
    del transport.standings[2]
    assert scene.present(transport) == (1, 3, 4)
    assert scene.where(2) == NOT_CONNECTED


def test_a_newer_roster_is_brought_to_everybody(scene):
    transport = Transport(dict.fromkeys((1, 2, 3), APPROVED))
    scene.present(transport)
    scene.roster = scene.governance.next(scene.roster)
    transport.standings = dict.fromkeys(
        (1, 2, 3), Standing(state=StudyState.APPROVED, roster_version=5)
    )
    assert scene.present(transport) == (1, 2, 3)
    assert transport.offers == [[1, 2, 3], [1, 2, 3]]


def test_waiting_for_too_few_sites_ends_and_says_how_many_there_were(tmp_path):
    scene = Scene(tmp_path, patience_s=3600)
    transport = Transport({1: APPROVED, 2: APPROVED, 3: WAITING, 4: None})
    with pytest.raises(HospitiumError, match="at least 3 sites to stand ready, got 2; waited 1 h"):
        scene.present(transport)
    assert scene.folder.status().state is State.WAITING
    # It was asked again and again, but not all the time.
    assert 100 < sum(3 in offer for offer in transport.offers) < 200


def test_a_refusal_or_garbage_instead_of_a_standing_is_no_approval(scene):
    refusal = Refusal(reason=Reason.NOT_APPROVED, blame=None)
    scene.attendance._patience_s = 5
    transport = Transport({1: APPROVED, 2: APPROVED, 3: refusal})
    with pytest.raises(HospitiumError, match="got 2"):
        scene.present(transport)


# --- what people see


def a_round(number, **changes):
    return RoundRecord(round=number, survivors=(1, 2), seconds=2.0, **changes)


FIGURES = Figures(
    records=60, loss=0.4, accuracy=0.8, auroc=0.85, auroc_low=0.8, auroc_high=0.9,
    auroc_error=0.0, auprc=0.7, brier=0.1, calibration_error=0.1,
)  # fmt: skip


def test_the_bulletin_follows_a_round(scene):
    request = ConfirmRequest(digests={1: bytes(64)}, signatures={1: bytes(64)}).encode()
    scene.bulletin.on_sent([1, 2], request)
    assert scene.where(1) == "confirming the round"
    scene.bulletin.on_answer(1, b"\x01\x09")
    assert scene.where(1) == "ready"
    refusal = Refusal(reason=Reason.BUDGET, blame=None).encode()
    scene.bulletin.on_answer(2, refusal)
    assert "privacy budget" in scene.where(2)
    scene.bulletin.on_round(a_round(7, missing={3: "silent"}), FIGURES)
    status = scene.folder.status()
    assert status.round == 7
    assert (status.sites[1].last_round, status.sites[3].last_round) == (7, None)
    assert (status.rounds[0].auroc, status.rounds[0].missing) == (0.85, {3: "silent"})


def test_a_resumed_study_keeps_its_rounds_and_drops_those_that_it_repeats(scene):
    for number in (1, 2, 3):
        scene.bulletin.on_round(a_round(number), FIGURES)
    again = Bulletin(scene.folder, scene.roster, lambda site: None, scene.clock)
    again.on_round(a_round(3), FIGURES)
    assert [one.round for one in scene.folder.status().rounds] == [1, 2, 3]
    assert again.status.sites[1].last_round == 3


def test_why_a_site_is_missing_is_said_with_its_last_heartbeat(scene):
    site = scene.bulletin.status.sites[1]
    assert describe(site, None, 7) == "never connected, not in round 7"
    gone = NodeStatus(online=False, last_heartbeat=scene.clock())
    assert describe(site, gone, 7).startswith("last heartbeat ")
    assert describe(site, gone, 7).endswith(", not in round 7")
    scene.bulletin.place([1], "training")
    there = NodeStatus(online=True, last_heartbeat=scene.clock())
    assert describe(scene.bulletin.status.sites[1], there, 7).startswith("training since ")


def test_watching_without_a_terminal_prints_each_line_once_and_ends(scene):
    scene.bulletin.on_round(a_round(1, missing={3: "silent"}), FIGURES)
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        if looks == 3:
            scene.bulletin.end(State.FINISHED)
        return View(
            title="A study", rounds=3, status=scene.folder.status(), nodes={}, is_served=True
        )

    text = io.StringIO()
    assert watch(look, Console(file=text), lambda seconds: None).state is State.FINISHED
    printed = text.getvalue().splitlines()
    assert printed == [
        "round 1 of 3: validation AUROC 0.850, loss 0.400, 2 sites, 2.0 s; without site-3: silent",
        "waiting",
        "finished",
    ]
    assert lines(look())[-1] == "finished"
