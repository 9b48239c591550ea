"""The validation gate, early stopping, and which model is the best."""

import math
from dataclasses import replace

import pytest

from hospitium_server.evaluation import Figures
from hospitium_server.registry import RoundRecord
from hospitium_server.selection import best_version, has_stalled, withdrawal
from tests.federation_kit import study_of

GATED = study_of(robustness={"gate": 0.05})
FIGURES = Figures(
    records=10, loss=0.5, accuracy=0.5, auroc=0.5, auroc_low=0.4, auroc_high=0.6,
    auroc_error=0.0, auprc=0.5, brier=0.1, calibration_error=0.1,
)  # fmt: skip

CASES = {
    "better than the one before stays": ({0: 0.5, 1: 0.6}, (), ()),
    "a little worse stays": ({0: 0.60, 1: 0.56}, (), ()),
    "much worse goes": ({0: 0.6, 1: 0.5}, (), (1,)),
    "undefined goes where the other is defined": ({0: 0.6, 1: math.nan}, (), (1,)),
    "defined stays where no other is": ({0: math.nan, 1: 0.2}, (), ()),
    "that was not judged goes with the one after it": ({0: 0.6, 2: 0.5}, (), (1, 2)),
    "much worse than a withdrawn one's predecessor goes": ({0: 0.6, 1: 0.3, 2: 0.5}, (1,), (2,)),
    "better than a withdrawn one but not than its predecessor stays":
        ({0: 0.6, 1: 0.9, 2: 0.58}, (1,), ()),
    "withdrawn before is not withdrawn again": ({0: 0.6, 1: 0.3}, (1,), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_version(case):
    scores, before, expected = CASES[case]
    taken, reason = withdrawal(GATED, max(scores), scores, before)
    assert taken == expected
    assert bool(reason) == bool(expected)


def test_without_a_gate_nothing_is_withdrawn():
    assert withdrawal(study_of(), 1, {0: 0.9, 1: 0.1}, ()) == ((), "")


def test_a_version_without_a_score_is_not_judged():
    assert withdrawal(GATED, 2, {0: 0.9, 1: 0.1}, ()) == ((), "")


def test_the_reason_gives_a_loss_as_people_read_it():
    study = study_of(robustness={"gate": 0.05, "gate_metric": "loss"})
    _, reason = withdrawal(study, 1, {0: -0.5, 1: -0.7}, ())
    assert "loss went from 0.500 (version 0) to 0.700, more than 0.05 worse" in reason


def history(*scores, withdrawn=()):
    return [
        (
            RoundRecord(round=number, withdrawn="bad" if number in withdrawn else ""),
            replace(FIGURES, auroc=score, loss=1 - score),
        )
        for number, score in enumerate(scores)
    ]


def test_the_best_version_is_none_that_was_withdrawn():
    assert best_version(study_of(), history(0.9, 0.6, 0.8, 0.7)) == 2
    assert best_version(study_of(), history(0.9, 0.6, 0.8, 0.7, withdrawn=(2,))) == 3
    assert best_version(study_of(), history(0.9, 0.7, 0.7)) == 2
    assert best_version(study_of(), history(0.9)) is None
    assert best_version(study_of(), history(0.9, math.nan)) is None


def test_a_withdrawn_version_does_not_stop_a_study_early():
    study = study_of(early_stopping={"patience": 2})
    assert has_stalled(study, history(0.7, 0.6, 0.5))
    assert not has_stalled(study, history(0.7, 0.6, 0.5, withdrawn=(1,)))
    assert not has_stalled(study_of(), history(0.7, 0.6, 0.5))
