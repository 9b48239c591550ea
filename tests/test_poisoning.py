"""A hospital that poisons: what its update does without defences, and what is left of it with them.

The poisoner changes its own update, figures or weight after training, past its own site's rules.
"""

from dataclasses import replace

import numpy as np
import pytest

from hospitium_client.work import SiteWork, shortened
from hospitium_common.archive import RoundArchive
from hospitium_common.errors import ConfigError, HospitiumError, StudyHalted
from hospitium_common.messages import Task, decode
from hospitium_common.metrics import TRAINING_HEAD
from hospitium_server.registry import Registry
from hospitium_simulations import in_memory
from hospitium_simulations.faults import Fault
from hospitium_simulations.federation import SimulationOptions, simulate
from hospitium_simulations.poison import Poison
from tests.federation_kit import Notes, hospitals, study_of

MASKED, PLAIN = SimulationOptions(), SimulationOptions(masked=False)
POISONER = "hospital-1"
ROOM = {"maximum_sites": 12}


@pytest.fixture
def poisoning(monkeypatch):
    """Return a function that makes one hospital change what it hands in, in some rounds."""
    train = SiteWork.train

    def poison(change, rounds=None):
        def poisoned(self, number, *arguments, **more):
            honest = train(self, number, *arguments, **more)
            if self.home.name != POISONER or (rounds is not None and number not in rounds):
                return honest
            return change(honest)

        monkeypatch.setattr(SiteWork, "train", poisoned)

    return poison


def scaled(factor):
    return lambda honest: replace(honest, vector=(honest.vector * np.float32(factor)))


WEIGHT, SQUARES = 0, TRAINING_HEAD
CONFUSION = SQUARES + 4 + 3  # behind the four tensors' squares; records, loss and Brier score


def word_changed(at, value):
    """Change one word of the tail."""

    def change(honest):
        tail = honest.tail.copy()
        tail[at] = np.uint64(value % 2**64)
        return replace(honest, tail=tail)

    return change


def run(study, directory, options=PLAIN, sites=9, notes=None):
    return simulate(study, hospitals(sites), directory, options, notes or Notes())


def rejected(outcome):
    return [made.round for made, _ in outcome.history if made.rejected]


def withdrawn(outcome):
    return [made.round for made, _ in outcome.history if made.withdrawn]


def test_a_poison_is_written_as_site_factor_and_round():
    assert Poison.parse("1:-20") == Poison(site=1, factor=-20.0)
    assert Poison.parse("2:1e2:3") == Poison(site=2, factor=100.0, round=3)
    for wrong in ("1", "a:2", "1:b", "1:2:3:4", "1:2:c"):
        with pytest.raises(ConfigError, match=r"SITE:FACTOR\[:ROUND\]"):
            Poison.parse(wrong)


@pytest.mark.parametrize("how", ["median", "trimmed_mean"])
def test_a_flipped_update_ruins_the_mean_and_not_the_median_of_groups(tmp_path, how):
    clean = run(study_of(rounds=8, cohort=ROOM), tmp_path / "clean")
    poisoned = SimulationOptions(masked=False, poisons=(Poison.parse("1:-20"),))
    mean = run(study_of(rounds=8, cohort=ROOM), tmp_path / "mean", poisoned)
    grouped = study_of(rounds=8, cohort=ROOM, robustness={"groups": 3, "combine": how})
    robust = run(grouped, tmp_path / "groups", poisoned)
    assert clean.result.test.auroc > 0.85
    assert mean.result.test.auroc < 0.65
    assert robust.result.test.auroc > clean.result.test.auroc - 0.06


def test_an_update_times_a_hundred_is_caught_and_the_study_goes_on(tmp_path, poisoning):
    poisoning(scaled(100), rounds=(2,))
    study = study_of(rounds=6, cohort=ROOM, robustness={"update_norm": 0.5})
    outcome = run(study, tmp_path)
    assert rejected(outcome) == [2]
    second = outcome.history[2][0]
    assert "expected a mean update of norm ≤ 0.5" in second.rejected
    assert second.model_of == 1
    assert outcome.result.test.auroc > 0.8


def test_an_update_times_a_hundred_stands_out_from_the_rounds_before(tmp_path, poisoning):
    poisoning(scaled(100), rounds=(5,))
    outcome = run(study_of(rounds=6, cohort=ROOM), tmp_path)
    assert rejected(outcome) == [5]
    assert "as in the rounds before" in outcome.history[5][0].rejected


def test_a_group_that_is_found_out_costs_its_own_sum_only(tmp_path, poisoning):
    poisoning(scaled(100), rounds=(2,))
    robust = {"groups": 3, "update_norm": 0.5}
    outcome = run(study_of(rounds=3, cohort=ROOM, robustness=robust), tmp_path)
    assert rejected(outcome) == []
    second = outcome.history[2][0]
    assert [bool(group.rejected) for group in second.groups] == [True, False, False]
    assert second.groups[0].survivors == (1, 4, 7)
    assert 0 < second.update_norm <= 0.5


def test_a_site_scales_a_long_update_down_itself_and_only_says_that_it_did(tmp_path):
    study = study_of(rounds=2, robustness={"update_norm": 0.05})
    outcome = run(study, tmp_path, sites=4)
    for made, _ in outcome.history[1:]:
        assert made.scaled_down == 4
        assert 0 < made.update_norm <= 0.05
        assert made.norm_bound == pytest.approx(0.05, rel=0.01)


def test_an_update_within_the_norm_is_left_as_it_is():
    update = np.array([3.0, 4.0], np.float32)
    assert shortened(update, 5.0)[0] is update
    assert shortened(update, None)[0] is update
    short, was_longer = shortened(update, 2.5)
    assert was_longer
    np.testing.assert_allclose(short, [1.5, 2.0], rtol=1e-5)
    assert np.linalg.norm(short.astype(np.float64)) <= 2.5


@pytest.mark.parametrize("claimed", [0, 100_000, -100, 2**63])
def test_a_made_up_weight_is_not_believed(tmp_path, poisoning, claimed):
    poisoning(word_changed(WEIGHT, claimed), rounds=(2,))
    outcome = run(study_of(rounds=3), tmp_path, sites=4)
    if claimed == 0:  # within the slack that records may change by: a zero weight moves nothing up
        assert outcome.history[2][0].groups[0].weight < outcome.history[1][0].groups[0].weight
        return
    assert rejected(outcome) == [2]
    assert "does not keep to the study" in outcome.history[2][0].rejected


def test_made_up_squares_do_not_widen_the_next_rounds_bounds_beyond_reason(tmp_path, poisoning):
    honest = run(study_of(rounds=3), tmp_path / "honest", MASKED, sites=4)
    poisoning(word_changed(SQUARES, 2**50), rounds=(2,))
    lied = run(study_of(rounds=3), tmp_path / "lied", MASKED, sites=4)
    before = np.array(honest.history[2][0].second_moments)
    after = np.array(lied.history[2][0].second_moments)
    assert after[0] > 10 * before[0]
    assert after[0] <= 100 * np.array(honest.history[1][0].second_moments)[0] * (1 + 1e-9)
    np.testing.assert_allclose(after[1:], before[1:], rtol=0.01)
    assert lied.history[3][0].quantisation_error < 0.01


def test_made_up_counts_cost_a_round_and_not_the_model(tmp_path, poisoning):
    poisoning(word_changed(CONFUSION, 2**40), rounds=(2,))
    outcome = run(study_of(rounds=3), tmp_path, sites=4)
    assert rejected(outcome) == [2]
    assert "made up its figures" in outcome.history[2][0].rejected


def test_a_study_in_which_every_round_is_rejected_stops_and_says_what_to_do(tmp_path, poisoning):
    poisoning(scaled(100))
    study = study_of(rounds=8, robustness={"update_norm": 0.5, "most_rejected": 2})
    with pytest.raises(
        StudyHalted, match=r"round 2: rejected.*last 2 rounds led nowhere.*which site"
    ):
        run(study, tmp_path, sites=4)
    registry = Registry.open_existing(tmp_path / "coordinator")
    assert [made.model_of for made, _ in registry.history()] == [None, 0, 0]
    assert (registry.load(2).parameters == registry.load(0).parameters).all()
    registry.close()


GATED = {"gate": 0.05}


def test_a_round_that_made_the_model_worse_is_undone(tmp_path, poisoning):
    poisoning(scaled(-40), rounds=(4,))
    study = study_of(rounds=8, cohort=ROOM, robustness=GATED)
    outcome = run(study, tmp_path)
    assert withdrawn(outcome) == [4]
    assert rejected(outcome) == [5]
    assert "validation AUROC went from" in outcome.history[4][0].withdrawn
    assert "trained from version 4, which was withdrawn" in outcome.history[5][0].rejected
    assert outcome.history[5][0].model_of == 3
    assert outcome.result.test.auroc > 0.8
    assert outcome.result.best.number != 4


def test_a_last_round_that_made_the_model_worse_is_undone_too(tmp_path, poisoning):
    poisoning(scaled(-60), rounds=(4,))
    outcome = run(study_of(rounds=4, cohort=ROOM, robustness=GATED), tmp_path)
    assert withdrawn(outcome) == [4]
    assert outcome.result.last.number == 3


def test_a_site_that_spoils_every_other_round_does_not_use_up_the_study(tmp_path):
    poisons = tuple(Poison.parse(f"1:-40:{number}") for number in (4, 6))
    options = SimulationOptions(masked=False, poisons=poisons)
    study = study_of(rounds=9, cohort=ROOM, robustness=GATED)
    with pytest.raises(StudyHalted, match=r"round 7: rejected.*The last 4 rounds led nowhere"):
        run(study, tmp_path, options)
    outcome = run(study, tmp_path)  # without the poison
    assert withdrawn(outcome) == [4, 6]
    assert rejected(outcome) == [5, 7]
    assert outcome.result.test.auroc > 0.75


def killed_when(monkeypatch, method, count):
    """Die right after the registry wrote something for the count-th time."""
    original, seen = getattr(Registry, method), []

    def dying(self, *arguments):
        result = original(self, *arguments)
        seen.append(1)
        if len(seen) == count:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Registry, method, dying)


@pytest.mark.parametrize(("method", "count"), [("note_score", 5), ("withdraw", 1)])
def test_the_gate_holds_over_a_crash_right_after(tmp_path, poisoning, monkeypatch, method, count):
    """The round that found out is lost with the crash; what it found out is not."""
    poisoning(scaled(-40), rounds=(4,))
    study = study_of(rounds=6, robustness=GATED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_when(patch, method, count)
        run(study, tmp_path, MASKED, sites=4)
    outcome = run(study, tmp_path, MASKED, sites=4)
    assert withdrawn(outcome) == [4]
    lost = outcome.history[5][0]
    assert lost.lost
    assert lost.model_of == 3
    registry = Registry.open_existing(tmp_path / "coordinator")
    assert (registry.load(5).parameters == registry.load(3).parameters).all()
    registry.close()


def test_a_finished_study_is_not_evaluated_again(tmp_path):
    first = run(study_of(rounds=2), tmp_path, MASKED, sites=4)
    before = RoundArchive(tmp_path / "coordinator" / "rounds").rounds()
    again = run(study_of(rounds=2), tmp_path, MASKED, sites=4)
    assert again.result.test == first.result.test
    assert RoundArchive(tmp_path / "coordinator" / "rounds").rounds() == before


GROUPS = {"robustness": {"groups": 3}, "cohort": ROOM}


def test_masked_groups_give_the_same_model_as_plain_ones_up_to_rounding(tmp_path):
    study = study_of(rounds=1, **GROUPS)
    masked = run(study, tmp_path / "masked", MASKED).result.last
    plain = run(study, tmp_path / "plain", PLAIN).result.last
    stated = masked.record.quantisation_error * masked.record.update_norm
    moved = np.linalg.norm(masked.parameters - plain.parameters)
    assert 0 < moved < 4 * stated + 1e-5
    assert [group.survivors for group in masked.record.groups] == [(1, 4, 7), (2, 5, 8), (3, 6, 9)]


def test_a_group_below_the_floor_leaves_every_group_masked(tmp_path):
    study = study_of(rounds=2, **GROUPS)
    options = SimulationOptions(faults=(Fault.parse("drop:2:ready:2"),))
    with pytest.raises(HospitiumError, match=r"3 groups of 3 sites, 0 came.*Nothing was revealed"):
        run(study, tmp_path, options)
    outcome = run(study, tmp_path, MASKED)
    assert not any(made.lost for made, _ in outcome.history)
    assert len(outcome.history[2][0].groups) == 3


def test_groups_wait_for_one_that_needs_another_attempt(tmp_path):
    """Two of five fall silent after READY: three are left, enough for a new attempt by themselves.

    Until then the other groups stay masked, and hand in the same words under fresh masks.
    """
    study = study_of(rounds=1, robustness={"groups": 3}, cohort={"maximum_sites": 15})
    silent = (Fault.parse("drop:2:masked:1"), Fault.parse("drop:5:masked:1"))
    outcome = run(study, tmp_path, SimulationOptions(faults=silent), sites=15)
    made = outcome.history[1][0]
    assert made.attempts == 2
    assert [len(group.survivors) for group in made.groups] == [5, 5, 3]
    archive = RoundArchive(tmp_path / "coordinator" / "rounds")
    assert sorted(one.task.attempt for one in archive.transcripts(32)) == [4, 5, 6]


def test_a_fourth_group_stands_in_for_one_that_is_gone(tmp_path):
    study = study_of(rounds=2, robustness={"groups": 4}, cohort=ROOM)
    options = SimulationOptions(faults=(Fault.parse("drop:2:masked:2"),))
    outcome = run(study, tmp_path, options, sites=12)
    second = outcome.history[2][0]
    assert [group.survivors for group in second.groups] == [(1, 5, 9), (3, 7, 11), (4, 8, 12)]
    assert second.missing[2] == "no answer before the deadline"
    assert second.missing[6] == "its group had too few sites"


def test_too_few_sites_for_three_groups_start_no_training(tmp_path):
    with pytest.raises(HospitiumError, match=r"3 groups of 3 sites that stand ready, got groups"):
        run(study_of(rounds=2, **GROUPS), tmp_path, MASKED, sites=8)


def test_one_group_alone_is_not_taken_for_a_median(tmp_path, monkeypatch):
    study = study_of(rounds=1, **GROUPS)
    gone = tuple(Fault.parse(f"drop:{site}:ready:1") for site in (2, 3, 5, 6, 8, 9))
    with pytest.raises(HospitiumError, match=r"3 groups of 3 sites, 0 came to a sum"):
        run(study, tmp_path / "masked", SimulationOptions(faults=gone))
    one = "hospitium_simulations.plain_sum.groups"
    monkeypatch.setattr(one, lambda sites, study: (tuple(sites)[:3],))
    with pytest.raises(StudyHalted, match="too few groups came to a sum"):
        run(study_of(rounds=3, **GROUPS), tmp_path / "plain")


def test_no_site_takes_part_in_the_sum_of_another_group(tmp_path, monkeypatch):
    """A coordinator that invites a site into two groups, or sums two groups as one, is refused."""
    tasks: dict[int, bytes] = {}
    exchange = in_memory.InMemoryTransport.exchange
    answers = []

    def cross_over(self, requests, deadline_s):
        message = decode(next(iter(requests.values())))
        if isinstance(message, Task) and message.round == 32:
            tasks.update(requests)
            # Site 1 gets the task of group 2 as well; it is validly signed.
            answers.append(type(decode(self._sessions[1].handle(tasks[2]))).__name__)
        yield from exchange(self, requests, deadline_s)

    monkeypatch.setattr(in_memory.InMemoryTransport, "exchange", cross_over)
    outcome = run(study_of(rounds=1, **GROUPS), tmp_path, MASKED)
    assert answers == ["Refusal"]
    assert [len(group.survivors) for group in outcome.history[1][0].groups] == [3, 3, 3]


def test_one_sum_over_all_groups_is_refused_by_every_site(tmp_path, monkeypatch):
    server = "hospitium_server.secure_sum"
    monkeypatch.setattr(f"{server}.groups", lambda sites, study: (tuple(sites),))
    monkeypatch.setattr(f"{server}.fewest_groups", lambda study: 1)
    with pytest.raises(HospitiumError, match="the message broke the protocol"):
        run(study_of(rounds=1, **GROUPS), tmp_path, MASKED)
