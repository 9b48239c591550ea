"""Versions that survive crashes, belong to one study, and cannot be changed unseen."""

import hashlib
import math
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from hospitium_common.errors import ConfigError, HospitiumError, LocalProtocolError
from hospitium_server import registry as registry_module
from hospitium_server.aggregation import OptimizerState
from hospitium_server.evaluation import Figures
from hospitium_server.registry import GroupRecord, Registry, RoundRecord, Version

STUDY, OTHER, LAYOUT = bytes(32), bytes([1]) * 32, bytes([2]) * 32

RECORD = RoundRecord(
    round=3,
    survivors=(1, 2, 5),
    missing={3: "no answer before the deadline", 4: "refused: a fault at the site"},
    attempts=2,
    seconds=1.5,
    bytes_sent=1000,
    bytes_received=2000,
    update_norm=0.25,
    quantisation_error=1e-4,
    clipped_fraction=0.01,
    dropped_contributions=7,
    second_moments=(0.5, 0.125),
    result="ab" * 32,
)
FIGURES = Figures(
    records=90, loss=0.5, accuracy=0.8, auroc=0.875, auroc_low=0.75, auroc_high=0.9375,
    auroc_error=0.001, auprc=0.7, brier=0.15, calibration_error=0.05,
)  # fmt: skip


def version(number, **changes) -> Version:
    generator = np.random.default_rng(number)
    made = Version(
        number=number,
        parameters=generator.normal(size=9).astype(np.float32),
        optimizer=OptimizerState(
            first=generator.normal(size=9),
            second=generator.random(9),
            average=generator.normal(size=9),
        ),
        normalisation=b"means and deviations",
        record=replace(RECORD, round=number),
    )
    return replace(made, **changes)


def assert_same(one: Version, other: Version):
    assert (one.number, one.normalisation, one.record) == (
        other.number, other.normalisation, other.record
    )  # fmt: skip
    for got, expected in (
        (one.parameters, other.parameters),
        (one.optimizer.first, other.optimizer.first),
        (one.optimizer.second, other.optimizer.second),
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@pytest.fixture
def registry(tmp_path):
    opened = Registry(tmp_path / "models", STUDY, LAYOUT)
    yield opened
    opened.close()


def filled(registry, versions=3) -> Registry:
    for number in range(versions):
        registry.save(version(number))
    return registry


def again(registry, study=STUDY, layout=LAYOUT) -> Registry:
    """What a coordinator finds that was started again."""
    registry.close()
    return Registry(registry.directory, study, layout)


def file_of(registry, number):
    return registry.directory / f"version-{number:04d}.safetensors"


def test_a_new_registry_has_no_versions(registry):
    assert registry.latest() is None
    assert registry.history() == ()
    assert registry.lineage() == ()


def test_what_was_saved_is_loaded_bit_by_bit_after_a_restart(registry):
    reopened = again(filled(registry))
    for number in range(3):
        assert_same(reopened.load(number), version(number))
    assert_same(reopened.latest(), version(2))
    reopened.close()


def test_a_version_without_optimizer_state_or_statistics_is_kept_too(registry):
    nothing = OptimizerState(first=np.zeros(0), second=np.zeros(0), average=np.zeros(0))
    bare = version(0, optimizer=nothing, normalisation=b"", record=RoundRecord(round=0))
    registry.save(bare)
    assert_same(registry.latest(), bare)


@pytest.mark.parametrize("value", [math.inf, -0.0, 1e-45, 3.4e38])
def test_extreme_parameters_come_back_as_they_were(registry, value):
    extreme = version(0, parameters=np.full(2, value, np.float32))
    registry.save(extreme)
    assert registry.load(0).parameters.tobytes() == extreme.parameters.tobytes()


def test_the_models_of_another_study_are_refused(registry):
    filled(registry)
    with pytest.raises(
        ConfigError, match=r"expected the models of study 0101.*Use a new directory"
    ):
        again(registry, study=OTHER)


def test_the_models_of_another_architecture_are_refused(registry):
    filled(registry)
    with pytest.raises(ConfigError, match="Use a new directory"):
        again(registry, layout=OTHER)


def test_a_refused_study_leaves_the_registry_as_it_was(registry):
    filled(registry)
    with pytest.raises(ConfigError):
        again(registry, study=OTHER)
    reopened = again(registry)
    assert_same(reopened.latest(), version(2))
    assert len(reopened.history()) == 3
    reopened.close()


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit of it was flipped": (flip_a_bit, "got another"),
    "it was cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "got another"),
    "it was emptied": (lambda path: path.write_bytes(b""), "got another"),
    "it was swapped for an older version": (
        lambda path: path.write_bytes((path.parent / "version-0000.safetensors").read_bytes()),
        "got another",
    ),
    "it was deleted": (lambda path: path.unlink(), "expected model version 1, got none"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_version_is_not_loaded_when(registry, case):
    damage, message = DAMAGE[case]
    filled(registry)
    damage(file_of(registry, 1))
    with pytest.raises(ConfigError, match=message):
        registry.load(1)
    assert_same(registry.load(0), version(0))
    assert_same(registry.latest(), version(2))


@pytest.mark.parametrize("number", [-1, 3, 99])
def test_a_version_that_was_never_made_is_not_found(registry, number):
    with pytest.raises(ConfigError, match="got none"):
        filled(registry).load(number)


def test_a_file_that_was_never_registered_is_not_a_version(registry):
    filled(registry)
    file_of(registry, 3).write_bytes(file_of(registry, 2).read_bytes())
    with pytest.raises(ConfigError, match="got another"):
        registry.load(3)
    assert registry.latest().number == 2


def test_a_crash_between_file_and_row_leaves_the_version_before_as_the_latest(
    registry, monkeypatch
):
    filled(registry, 2)
    write = registry_module.write_durably

    def write_and_die(path, data):
        write(path, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry_module, "write_durably", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        registry.save(version(2))
    monkeypatch.undo()
    assert file_of(registry, 2).exists()
    reopened = again(registry)
    assert_same(reopened.latest(), version(1))
    other = version(2, parameters=np.zeros(9, np.float32))  # the round is run once more
    reopened.save(other)
    assert_same(reopened.latest(), other)
    reopened.close()


def test_a_full_disk_keeps_every_version_before(registry, monkeypatch):
    filled(registry, 2)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hospitium_common.durable.os.fsync", full)
    with pytest.raises(HospitiumError, match="No space left on device"):
        registry.save(version(2))
    monkeypatch.undo()
    assert_same(registry.latest(), version(1))
    assert not file_of(registry, 2).exists()
    assert not list(registry.directory.glob("*.part"))
    registry.save(version(2))
    assert_same(registry.latest(), version(2))


def test_a_full_database_is_said_plainly_and_keeps_every_version_before(registry):
    filled(registry, 2)
    pages = registry._database.execute("PRAGMA page_count").fetchone()[0]
    registry._database.execute(f"PRAGMA max_page_count = {pages}")
    long = replace(RECORD, result="ab" * 50_000)
    with pytest.raises(HospitiumError, match="what was finished is kept"):
        registry.save(version(2, record=long))
    assert_same(registry.latest(), version(1))


def test_a_version_is_never_written_over(registry):
    filled(registry)
    with pytest.raises(LocalProtocolError, match="2 is there already"):
        registry.save(version(2, parameters=np.zeros(9, np.float32)))
    assert_same(registry.load(2), version(2))


def test_a_registry_and_its_models_are_for_their_owner_alone(registry):
    filled(registry)
    for number in range(3):
        assert file_of(registry, number).stat().st_mode & 0o777 == 0o600


def test_attempts_are_counted_per_round_and_over_restarts(registry):
    assert [registry.next_attempt(1) for _ in range(3)] == [1, 2, 3]
    assert registry.next_attempt(2) == 1
    reopened = again(registry)
    assert reopened.next_attempt(1) == 4
    assert reopened.next_attempt(2) == 2
    assert reopened.next_attempt(3) == 1
    reopened.close()


def test_an_attempt_is_on_disk_before_it_is_handed_out(registry):
    registry.next_attempt(7)
    beside = sqlite3.connect(registry.directory / "registry.sqlite")
    assert beside.execute("SELECT round, last FROM attempts").fetchall() == [(7, 1)]
    beside.close()


def test_every_version_names_the_digest_of_the_one_before(registry):
    lineage = again(filled(registry, 4)).lineage()
    assert [number for number, _, _ in lineage] == [0, 1, 2, 3]
    assert [parent for _, _, parent in lineage] == ["", *(made for _, made, _ in lineage[:-1])]
    for number, digest, _ in lineage:
        assert digest == hashlib.sha256(file_of(registry, number).read_bytes()).hexdigest()


def test_a_version_that_keeps_an_older_model_names_that_one_as_its_parent(registry):
    filled(registry, 3)
    registry.withdraw([2], "worse")
    registry.save(version(3, record=replace(RECORD, round=3, rejected="bad", model_of=1)))
    lineage = registry.lineage()
    assert lineage[3][2] == lineage[1][1]
    assert registry.standing(3).number == 3
    assert registry.standing(2).number == 1


def test_what_was_withdrawn_is_said_with_every_version_and_stays_said(registry):
    filled(registry, 3)
    registry.withdraw([1, 2], "worse")
    registry.withdraw([2], "again")
    reopened = again(registry)
    assert [made.withdrawn for made, _ in reopened.history()] == ["", "worse", "worse"]
    assert reopened.load(2).record.withdrawn == "worse"
    assert reopened.latest().number == 2
    reopened.close()


def test_scores_and_evaluations_are_kept(registry):
    filled(registry)
    registry.note_score(0, 0.5)
    registry.note_score(1, math.nan)
    registry.note_score(0, 0.25)
    totals = np.array([1, 2**63, 3], np.uint64)
    registry.keep_evaluation(1, totals)
    registry.keep_evaluation(1, totals + np.uint64(1))  # the first stays
    reopened = again(registry)
    assert reopened.scores()[0] == 0.25
    assert math.isnan(reopened.scores()[1])
    np.testing.assert_array_equal(reopened.evaluation(1), totals)
    assert reopened.evaluation(0) is None
    assert len(reopened.evaluations()) == 1
    reopened.close()


def test_groups_and_all_other_figures_of_a_round_come_back_as_they_were(registry):
    group = GroupRecord(survivors=(1, 3), weight=7, norm=0.5, norm_bound=2.0, rejected="late")
    record = replace(RECORD, round=0, groups=(group,), records=9, scaled_down=2, model_of=0)
    registry.save(version(0, record=record))
    assert again(registry).load(0).record == record


def test_a_model_file_says_by_itself_where_it_comes_from(registry):
    filled(registry)
    with safe_open(file_of(registry, 2), "numpy") as file:
        told = file.metadata()
    assert told == {
        "study": STUDY.hex(),
        "layout": LAYOUT.hex(),
        "version": "2",
        "parent": registry.lineage()[1][1],
    }


def test_the_history_tells_each_round_and_what_is_known_of_its_model(registry):
    filled(registry)
    registry.note(0, replace(FIGURES, auroc=0.5))
    registry.note(1, FIGURES)
    history = again(registry).history()
    assert [made for made, _ in history] == [replace(RECORD, round=n) for n in range(3)]
    assert [None if seen is None else seen.auroc for _, seen in history] == [0.5, 0.875, None]
    assert history[1][1] == FIGURES


def test_figures_may_be_noted_before_their_version_and_again(registry):
    registry.note(0, FIGURES)
    assert registry.history() == ()
    registry.save(version(0))
    registry.note(0, replace(FIGURES, loss=0.25))
    assert registry.history()[0][1] == replace(FIGURES, loss=0.25)


def test_undefined_figures_stay_undefined(registry):
    filled(registry, 1)
    registry.note(0, replace(FIGURES, auroc=math.nan))
    assert math.isnan(again(registry).history()[0][1].auroc)


def test_a_registry_is_read_without_knowing_its_study(registry):
    filled(registry)
    registry.close()
    reader = Registry.open_existing(registry.directory)
    assert_same(reader.latest(), version(2))
    reader.close()


def test_reading_where_nothing_is_makes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="expected a registry, got nothing there"):
        Registry.open_existing(tmp_path)
    assert list(tmp_path.iterdir()) == []
