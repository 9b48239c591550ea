"""The ledger: durable, append-only, exactly once, and never beyond the budget."""

import sqlite3

import pytest

from hospitium_client.protection.ledger import Ledger, Spend
from hospitium_common.errors import BudgetExceeded, LocalProtocolError
from hospitium_common.privacy import SpendEvent

STUDY, OTHER = bytes(32), bytes([1]) * 32


def spend(round_: int, *, study: bytes = STUDY, steps: int = 10) -> Spend:
    event = SpendEvent(sampling_rate=0.1, noise_multiplier=1.0, steps=steps, unit="patient")
    return Spend(study=study, round=round_, kind="training", event=event)


def at_most(steps: int):
    return lambda events: sum(event.steps for event in events) <= steps


@pytest.fixture
def ledger(tmp_path):
    with_file = Ledger(tmp_path / "ledger.sqlite")
    yield with_file
    with_file.close()


def test_what_was_booked_is_still_there_after_a_restart(tmp_path):
    first = Ledger(tmp_path / "ledger.sqlite")
    first.book(spend(2), at_most(100))
    first.book(Spend(study=STUDY, round=1, kind="statistics", event=None), at_most(0))
    again = Ledger(tmp_path / "ledger.sqlite")
    assert [s.round for s in again.spends()] == [2, 1]
    assert again.events(STUDY) == (spend(2).event,)


def test_the_same_round_is_spent_once_however_often_it_is_booked(ledger):
    for _ in range(3):
        ledger.book(spend(2), at_most(10))
    assert len(ledger.spends()) == 1


def test_the_same_round_with_other_numbers_is_refused(ledger):
    ledger.book(spend(2), at_most(100))
    with pytest.raises(LocalProtocolError, match="cost what it cost before"):
        ledger.book(spend(2, steps=11), at_most(100))


def test_a_spend_beyond_the_budget_is_not_written(ledger):
    ledger.book(spend(2), at_most(25))
    ledger.book(spend(3), at_most(25))
    with pytest.raises(BudgetExceeded, match="round 4"):
        ledger.book(spend(4), at_most(25))
    assert [s.round for s in ledger.spends()] == [2, 3]


def test_each_study_has_its_own_events(ledger):
    ledger.book(spend(2), at_most(10))
    ledger.book(spend(2, study=OTHER), at_most(10))
    assert len(ledger.events(STUDY)) == len(ledger.events(OTHER)) == 1
    assert len(ledger.events()) == 2


@pytest.mark.parametrize("damage", ["UPDATE spends SET steps = 1", "DELETE FROM spends"])
def test_rows_cannot_be_changed_or_deleted(ledger, damage):
    ledger.book(spend(2), at_most(10))
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        ledger._database.execute(damage)


@pytest.mark.parametrize(
    "damage",
    ["UPDATE spends SET steps = 1 WHERE number = 1", "DELETE FROM spends WHERE number = 1"],
)
def test_tampering_around_the_triggers_is_noticed(tmp_path, damage):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.book(spend(2), at_most(100))
    ledger.book(spend(3), at_most(100))
    ledger._database.execute("DROP TRIGGER spends_stay")
    ledger._database.execute("DROP TRIGGER spends_remain")
    ledger._database.execute(damage)
    with pytest.raises(LocalProtocolError, match="untouched ledger"):
        ledger.spends()
