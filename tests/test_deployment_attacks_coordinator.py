"""A coordinator that lies, against hospitals that run as installed: every lie is refused.

It holds all that a coordinator holds: the signing key, the certificate, the database, every node
and every message. Between it and four real sites (node and trainer, over TLS) is the real server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.enrolment import PinnedRosters
from hospitium_client.settings import SiteHome
from hospitium_common.messages import (
    Ack,
    ConfirmRequest,
    Masked,
    PairRequest,
    Ready,
    Reason,
    Refusal,
    Shares,
    Standing,
    StudyOffer,
    StudyState,
    Task,
    UnmaskRequest,
)
from hospitium_common.secagg.keys import SiteKeys
from hospitium_common.study import Study, load_study
from hospitium_server.keys import load_governance_key
from hospitium_server.unmasking import Unmasking
from hospitium_simulations.local_federation import LocalFederation
from tests.deployment_kit import log_of, spends
from tests.harm_kit import found, private_keys, private_study, what_patients_have
from tests.rogue_kit import EvilCoordinator, pair, statistics_task

TITLES = ("St. Anna", "Mercy", "Lakeside", "Northgate")
NAMES = ("st-anna", "mercy", "lakeside", "northgate")
SITES = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Scene:
    federation: LocalFederation
    evil: EvilCoordinator
    study: Study
    """The one study that everybody approved."""

    def log(self, name: str = "st-anna") -> str:
        return log_of(self.federation, name)

    def new_study(self, name: str, **changes: object) -> tuple[Study, StudyOffer]:
        file = private_study(self.federation.directory, name, **changes)
        study = load_study(file)
        return study, self.evil.offer(file, study)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("evil")
    with found(directory / "federation", TITLES) as federation:
        evil = EvilCoordinator(federation.home, directory)
        try:
            for name in NAMES:
                federation.open(name)
            evil.wait_for_sites()
            file = private_study(federation.directory, "approved")
            study = load_study(file)
            offer = evil.offer(file, study)
            for site, name in zip(SITES, NAMES, strict=True):
                answer = evil.say(site, study.digest, offer)
                assert answer == Standing(state=StudyState.WAITING, roster_version=5)
                home = federation.hospitals[name].home
                federation.run(
                    "site", "approve", "approved", "--data", home / "data", "--home", home
                )
                answer = evil.say(site, study.digest, offer)
                assert answer == Standing(state=StudyState.APPROVED, roster_version=5)
            yield Scene(federation=federation, evil=evil, study=study)
        finally:
            federation.stop()
            evil.stop()


def refused(answer: object, reason: Reason = Reason.PROTOCOL) -> bool:
    return isinstance(answer, Refusal) and answer.reason is reason


def test_a_study_that_nobody_approved_is_not_run(scene: Scene) -> None:
    study, offer = scene.new_study("unwanted")
    assert scene.evil.say(1, study.digest, offer) == Standing(
        state=StudyState.WAITING, roster_version=5
    )
    roster = scene.evil.roster.for_study(study.digest, 1, SITES)
    request = PairRequest(version=5, epoch=1, sites=SITES, roster=roster.digest)
    assert refused(scene.evil.say(1, study.digest, request), Reason.NOT_APPROVED)
    _, task = statistics_task(scene.evil, study, roster)
    assert refused(scene.evil.say(1, study.digest, task), Reason.NOT_APPROVED)
    assert "study unwanted: expected a study that this site approved" in scene.log()
    # No data was read for it, and nothing was spent.
    assert "study unwanted: read the data" not in scene.log()
    assert all(one.study != study.digest for one in spends(scene.federation, "st-anna"))


def test_another_model_under_the_same_name_is_another_study(scene: Scene) -> None:
    other, offer = scene.new_study("approved", hidden="[9]")
    assert other.study.id == scene.study.study.id
    assert scene.evil.say(1, other.digest, offer) == Standing(
        state=StudyState.WAITING, roster_version=5
    )
    # Nor can it travel under the approved study's digest.
    assert refused(scene.evil.say(1, scene.study.digest, offer))
    assert "expected the study that the request is about, got another one" in scene.log()


def test_a_study_that_the_coordinator_did_not_sign_is_refused(scene: Scene) -> None:
    _, offer = scene.new_study("approved")
    mangled = replace(offer, signature=offer.signature[:-4] + b"0000")
    assert refused(scene.evil.say(1, scene.study.digest, mangled))


def test_a_request_under_another_key_gets_no_answer_at_all(scene: Scene) -> None:
    evil = scene.evil
    _, offer = scene.new_study("approved")
    stranger = Ed25519PrivateKey.generate()
    request = evil.sealed(scene.study.digest, offer, key=stranger)
    assert evil.ask(evil.run, evil.nodes[1], request) == b""
    assert evil.ask(evil.run, evil.nodes[1], b"garbage") == b""
    assert "a request that the pinned coordinator did not sign is not answered" in scene.log()


def test_a_roster_that_governance_did_not_sign_is_refused(scene: Scene) -> None:
    evil = scene.evil
    _, offer = scene.new_study("approved")
    swapped = with_another_key(evil, "mercy")
    for roster in (swapped, swapped.signed_by(evil.key)):
        lying = replace(offer, roster=roster.encode())
        assert refused(evil.say(1, scene.study.digest, lying))
    assert pinned(scene) == evil.roster
    assert "expected the signature of the governance key" in scene.log()


def test_a_governance_key_of_its_own_gives_the_coordinator_nothing(scene: Scene) -> None:
    evil, own = scene.evil, Ed25519PrivateKey.generate()
    _, offer = scene.new_study("approved")
    theirs = replace(evil.roster, version=6, governance=own.public_key().public_bytes_raw())
    lying = replace(offer, roster=theirs.signed_by(own).encode())
    # It takes a person at the hospital, and a telephone call, to change governance.
    assert evil.say(1, scene.study.digest, lying) == Standing(
        state=StudyState.ROSTER_WAITING, roster_version=5
    )
    assert pinned(scene) == evil.roster
    assert "has other keys for the coordinator" in scene.log()


def test_a_substituted_key_waits_for_a_person_even_if_governance_signed_it(scene: Scene) -> None:
    evil = scene.evil
    _, offer = scene.new_study("approved")
    stolen = load_governance_key(evil.home.governance_key)
    swapped = with_another_key(evil, "mercy").signed_by(stolen)
    lying = replace(offer, roster=swapped.encode())
    assert evil.say(1, scene.study.digest, lying) == Standing(
        state=StudyState.ROSTER_WAITING, roster_version=5
    )
    assert pinned(scene) == evil.roster
    # Pairing under the substituted key, under either version number, is refused.
    lie = swapped.for_study(scene.study.digest, 90, SITES).digest
    for version in (5, 6):
        request = PairRequest(version=version, epoch=90, sites=SITES, roster=lie)
        assert refused(evil.say(1, scene.study.digest, request))
    assert "pairing: expected the keys of the pinned roster" in scene.log()


def test_an_older_roster_does_not_bring_a_revoked_hospital_back(scene: Scene) -> None:
    evil = scene.evil
    _, offer = scene.new_study("approved")
    older = (evil.home.rosters / "00004.json").read_bytes()
    assert refused(evil.say(1, scene.study.digest, replace(offer, roster=older)))
    assert "an old roster may bring back a revoked hospital" in scene.log()


def test_a_cohort_below_the_hospitals_own_minimum_is_refused(scene: Scene) -> None:
    evil = scene.evil
    roster = evil.roster.for_study(scene.study.digest, 91, (1, 2))
    request = PairRequest(version=5, epoch=91, sites=(1, 2), roster=roster.digest)
    assert refused(evil.say(1, scene.study.digest, request))
    assert "pairing: expected at least 3 sites, this one among them, got 2" in scene.log()


def test_two_different_survivor_sets_get_one_confirmation_and_one_sum_at_most(
    scene: Scene,
) -> None:
    evil, digest = scene.evil, scene.study.digest
    roster = pair(evil, scene.study, 1, SITES)
    policy, task = statistics_task(evil, scene.study, roster)
    run = Unmasking(roster=roster, policy=policy, task=task)
    for site in SITES:
        answer = evil.say(site, digest, task)
        assert isinstance(answer, Ready), answer
        run.on_ready(answer)
    masked: dict[int, Masked] = {}
    for site, request in run.close_cohort().items():
        vector = evil.say(site, digest, request)
        assert isinstance(vector, Masked)
        run.on_masked(vector)
        masked[site] = vector
    first = confirmation(masked, (1, 2, 3))
    second = confirmation(masked, (1, 2, 4))
    acks = {}
    for site in (1, 2, 3):
        ack = evil.say(site, digest, first)
        assert isinstance(ack, Ack)
        acks[site] = ack.signature
    # Whoever confirmed the first set does not confirm the second.
    assert refused(evil.say(1, digest, second))
    assert refused(evil.say(2, digest, second))
    fourth = evil.say(4, digest, second)
    assert isinstance(fourth, Ack)
    # One confirmation of the second set is not enough for anybody's shares, borrowed ones neither.
    for lie in ({4: fourth.signature}, {1: acks[1], 2: acks[2], 4: fourth.signature}):
        assert refused(evil.say(4, digest, UnmaskRequest(acks=lie)))
    # The first set has enough, and gives exactly one share for every dealer, never both halves.
    shares = evil.say(1, digest, UnmaskRequest(acks=acks))
    assert isinstance(shares, Shares)
    assert set(shares.shares) == set(SITES)
    assert all(len(share) == 32 for share in shares.shares.values())
    assert refused(evil.say(1, digest, UnmaskRequest(acks={**acks, 4: fourth.signature})))
    # From here on the round is over: a new attempt would be a second sum.
    _, again = statistics_task(evil, scene.study, roster, attempt=2)
    assert refused(evil.say(1, digest, again))
    # Who is blamed, and why, is in the hospital's log.
    assert "site 1 refuses: got ConfirmRequest in phase CONFIRMED" in scene.log()
    assert "site 1 refuses: expected a newer round than (16, 1), got (16, 2)" in scene.log()
    for name in NAMES:
        booked = [one for one in spends(scene.federation, name) if one.study == digest]
        assert [(one.round, one.kind) for one in booked] == [(task.round, "statistics")]


def test_a_model_of_another_size_is_not_trained(scene: Scene) -> None:
    evil, digest = scene.evil, scene.study.digest
    roster = pair(evil, scene.study, 2, SITES)
    _, task = statistics_task(evil, scene.study, roster)
    before = spends(scene.federation, "mercy")
    for change in (
        {"model": bytes(400)},
        {"model_digest": bytes(32)},
        {"round": task.round + 16},
        {"invited": (1, 2)},
    ):
        lying: Task = replace(task, **change)  # the signature covers the round's whole context
        assert refused(evil.say(2, digest, lying))
    assert spends(scene.federation, "mercy") == before


def test_the_same_request_twice_gets_the_same_answer_and_spends_nothing(scene: Scene) -> None:
    evil, digest = scene.evil, scene.study.digest
    roster = pair(evil, scene.study, 3, SITES)
    _, task = statistics_task(evil, scene.study, roster, attempt=3)
    before = spends(scene.federation, "lakeside")
    answers = [evil.say(3, digest, task) for _ in range(2)]
    assert answers[0] == answers[1]
    assert spends(scene.federation, "lakeside") == before


def test_nothing_of_a_patient_or_a_key_is_in_any_log_or_at_the_coordinator(scene: Scene) -> None:
    kept = [scene.log(name).encode() for name in NAMES]
    kept.append((scene.federation.directory.parent / "superlink.db").read_bytes())
    for secret in what_patients_have(scene.federation) | private_keys(scene.federation):
        assert not any(secret in data for data in kept)


def hospital(scene: Scene, name: str = "st-anna"):
    return scene.federation.hospitals[name]


def pinned(scene: Scene, name: str = "st-anna"):
    return PinnedRosters(SiteHome(hospital(scene, name).home)).pinned()


def with_another_key(evil: EvilCoordinator, name: str):
    """The next version of the roster, with the coordinator's own key in a hospital's place."""
    members = tuple(
        replace(one, keys=replace(one.keys, sign=SiteKeys.generate().public().sign))
        if one.name == name else one
        for one in evil.roster.members
    )  # fmt: skip
    return replace(evil.roster, version=evil.roster.version + 1, members=members)


def confirmation(masked: dict[int, Masked], survivors: tuple[int, ...]) -> ConfirmRequest:
    return ConfirmRequest(
        digests={site: masked[site].digest for site in survivors},
        signatures={site: masked[site].signature for site in survivors},
    )
