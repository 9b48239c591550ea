"""Which roster a hospital goes by: what needs nobody, what needs a person, what is never taken."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hospitium_client.enrolment import PinnedRosters, Verdict, consider_roster, own_member
from hospitium_client.settings import SiteHome
from hospitium_common.errors import ConfigError
from tests.enrolment_kit import YEAR_S, Governance, member

GOVERNANCE = Governance()
ONE, TWO, THREE = member(1), member(2), member(3)
PINNED = GOVERNANCE.roster(ONE, TWO, THREE)
KEYS = member(9).keys
REVOKED = GOVERNANCE.next(PINNED, members=(ONE, TWO, replace(THREE, revoked=True)))
OTHER = Governance()

ACCEPTED, WAITING, REFUSED = Verdict.ACCEPTED, Verdict.WAITING, Verdict.REFUSED
SCENARIOS = {
    "the same roster": (PINNED, ACCEPTED),
    "a hospital joins": (GOVERNANCE.next(PINNED, members=(*PINNED.members, member(4))), ACCEPTED),
    "a hospital is revoked": (REVOKED, ACCEPTED),
    "an enrolment is extended": (
        GOVERNANCE.next(PINNED, members=(replace(ONE, expires=ONE.expires + YEAR_S), TWO, THREE)),
        ACCEPTED,
    ),
    "versions were missed": (GOVERNANCE.next(PINNED, version=90), ACCEPTED),
    "a hospital has other keys": (
        GOVERNANCE.next(PINNED, members=(ONE, replace(TWO, keys=KEYS), THREE)),
        WAITING,
    ),
    "a node has another key": (
        GOVERNANCE.next(PINNED, members=(ONE, replace(TWO, node_key=b"other"), THREE)),
        WAITING,
    ),
    "one joins while another changes keys": (
        GOVERNANCE.next(PINNED, members=(ONE, replace(TWO, keys=KEYS), THREE, member(4))),
        WAITING,
    ),
    "two hospitals swap their names": (
        GOVERNANCE.next(
            PINNED, members=(replace(ONE, name=TWO.name), replace(TWO, name=ONE.name), THREE)
        ),
        WAITING,
    ),
    "a hospital is gone without being revoked": (
        GOVERNANCE.next(PINNED, members=(ONE, TWO)),
        WAITING,
    ),
    "the coordinator has another key": (
        GOVERNANCE.next(PINNED, coordinator=OTHER.coordinator),
        WAITING,
    ),
    "governance has another key": (
        OTHER.next(PINNED, governance=OTHER.key.public_key().public_bytes_raw()),
        WAITING,
    ),
    "an older version": (GOVERNANCE.roster(ONE, TWO, THREE, version=3), REFUSED),
    "another roster under the same number": (
        GOVERNANCE.roster(ONE, TWO, version=PINNED.version),
        REFUSED,
    ),
    "not signed": (replace(PINNED, version=9, signature=b""), REFUSED),
    "signed by somebody else in the name of governance": (OTHER.next(PINNED), REFUSED),
    "changed after it was signed": (replace(REVOKED, members=PINNED.members), REFUSED),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_verdict_when(scenario):
    offered, expected = SCENARIOS[scenario]
    decision = consider_roster(PINNED, offered)
    assert decision.verdict is expected, decision.reason
    assert (decision.changes is None) == (expected is REFUSED)


def test_a_revoked_hospital_comes_back_only_with_a_person():
    back = GOVERNANCE.next(REVOKED, members=PINNED.members)
    assert consider_roster(REVOKED, back).verdict is WAITING


@pytest.fixture
def rosters(tmp_path):
    store = PinnedRosters(SiteHome(tmp_path))
    store.pin(PINNED)
    return store


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_kept_on_disk_follows_the_verdict(rosters, tmp_path, scenario):
    offered, expected = SCENARIOS[scenario]
    assert rosters.offer(offered).verdict is expected
    again = PinnedRosters(SiteHome(tmp_path))
    assert again.pinned().digest == (offered if expected is ACCEPTED else PINNED).digest
    waiting = again.pending()
    assert (waiting.digest if waiting else None) == (
        offered.digest if expected is WAITING else None
    )


def test_two_rosters_under_one_number_are_logged_with_both_digests(rosters, caplog):
    offered, _ = SCENARIOS["another roster under the same number"]
    with caplog.at_level(logging.WARNING):
        rosters.offer(offered)
    assert PINNED.digest.hex()[:16] in caplog.text
    assert offered.digest.hex()[:16] in caplog.text
    assert "two rosters under one number" in caplog.text


def test_what_waits_is_accepted_only_as_it_was_shown(rosters):
    shown, _ = SCENARIOS["a hospital has other keys"]
    rosters.offer(shown)
    newer = GOVERNANCE.next(shown, members=(member(1), *shown.members[1:]))
    rosters.offer(newer)
    with pytest.raises(ConfigError, match="got another or none"):
        rosters.accept(shown.digest)
    assert rosters.pinned().digest == PINNED.digest
    rosters.accept(newer.digest)
    assert rosters.pinned().digest == newer.digest
    assert rosters.pending() is None
    with pytest.raises(ConfigError, match="got another or none"):
        rosters.accept(newer.digest)


def test_what_waits_is_not_displaced_by_something_older_or_foreign(rosters):
    waits = GOVERNANCE.next(PINNED, version=8, members=(ONE, replace(TWO, keys=KEYS), THREE))
    rosters.offer(waits)
    older = GOVERNANCE.next(PINNED, version=7, members=(ONE, TWO, replace(THREE, keys=KEYS)))
    same_number = GOVERNANCE.next(older, version=8)
    foreign = OTHER.next(PINNED, version=99, governance=OTHER.key.public_key().public_bytes_raw())
    for offered in (older, same_number, foreign):
        assert rosters.offer(offered).verdict is REFUSED
        assert rosters.pending().digest == waits.digest


def test_what_waits_under_a_foreign_key_gives_way_to_the_pinned_one(rosters):
    """Nobody can block real rosters by one that no administrator will ever accept."""
    foreign = OTHER.next(
        PINNED, version=2**40, governance=OTHER.key.public_key().public_bytes_raw()
    )
    assert rosters.offer(foreign).verdict is WAITING
    waits, _ = SCENARIOS["a hospital has other keys"]
    assert rosters.offer(waits).verdict is WAITING
    assert rosters.pending().digest == waits.digest
    assert rosters.offer(REVOKED).verdict is ACCEPTED


def test_a_roster_waits_no_more_once_a_newer_one_is_pinned(rosters):
    rosters.offer(SCENARIOS["a hospital has other keys"][0])
    assert rosters.offer(SCENARIOS["versions were missed"][0]).verdict is ACCEPTED
    assert rosters.pending() is None


def test_a_damaged_pin_is_named_and_never_taken_for_nothing(rosters, tmp_path):
    file = tmp_path / "pinned" / "roster.json"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-40], whole.replace(b"thorax-net", b"thorax-nit")):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match="restore it from your back-up"):
            rosters.offer(REVOKED)
        assert file.read_bytes() == damaged


def test_nothing_is_pinned_before_the_admission(tmp_path):
    with pytest.raises(ConfigError, match="hospitium site admit"):
        PinnedRosters(SiteHome(tmp_path)).pinned()


def test_a_hospital_finds_itself_by_its_keys():
    assert own_member(PINNED, TWO.keys).index == 2
    with pytest.raises(ConfigError, match="this hospital's keys"):
        own_member(PINNED, KEYS)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(SCENARIOS)), max_size=6))
def test_whatever_is_offered_in_whatever_order_the_version_only_grows(tmp_path_factory, order):
    store = PinnedRosters(SiteHome(tmp_path_factory.mktemp("site")))
    store.pin(PINNED)
    version = PINNED.version
    for scenario in order:
        store.offer(SCENARIOS[scenario][0])
        pinned = store.pinned()
        assert pinned.version >= version
        assert pinned.governance == PINNED.governance
        assert {m.index: m.keys for m in pinned.members if m.index < 4} == {
            m.index: m.keys for m in PINNED.members
        }
        version = pinned.version
