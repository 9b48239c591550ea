"""From summed counts to AUROC, AUPRC, calibration and intervals, against scikit-learn."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
)

from hospitium_common.metrics import LARGEST_LOGIT, EvaluationSums, bin_edges, evaluation_sums
from hospitium_server.evaluation import (
    auroc,
    auroc_binning_error,
    average_precision,
    bin_probabilities,
    expected_calibration_error,
    figures,
    precision_recall_curve,
    reliability_curve,
    roc_curve,
)
from tests.federation_kit import study_of

DATA = Path(os.environ.get("HOSPITIUM_DATA", Path(__file__).parents[2] / "shared" / "data"))
TWO = study_of()
THREE = study_of(task={"classes": ["well", "ill", "very ill"]})
LABELS = study_of(task={"classes": ["oedema", "effusion", "mass"], "labels": "multi"})
ROUNDED = 2.0**-20  # sums of losses travel as fixed point
QUICK = settings(deadline=None, max_examples=60)

counts = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=20, max_size=30
).map(lambda rows: np.array(rows, np.int64))  # fmt: skip
mixed_counts = counts.filter(lambda histogram: histogram.sum(axis=0).min() > 0)


def histogram_of(*rows) -> np.ndarray:
    return np.array(rows, np.int64)


def listed(histogram):
    """The records that a histogram counts, as (target, bin)."""
    bins = np.arange(len(histogram))
    of_bin = np.concatenate([np.repeat(bins, histogram[:, 0]), np.repeat(bins, histogram[:, 1])])
    return np.repeat([0, 1], histogram.sum(axis=0)), of_bin


def sums_of(probabilities, targets, study) -> EvaluationSums:
    """What a site sends and the coordinator reads, through the words of a tail."""
    if study.task.labels == "exclusive":
        losses = -np.log(probabilities[np.arange(len(targets)), targets])
    else:
        right = np.where(targets > 0.5, probabilities, 1 - probabilities)
        losses = -np.log(right).sum(axis=1)
    return EvaluationSums.from_words(
        evaluation_sums(probabilities, targets, losses, study).words(), study
    )


def pair(ill):
    return np.stack([1 - ill, ill], 1)


def binormal(seed, records=400, distance=1.5, share=0.3):
    """Targets, and the scores of a fairly calibrated model."""
    generator = np.random.default_rng(seed)
    targets = (generator.random(records) < share).astype(np.int64)
    logits = distance * (generator.normal(size=records) + distance * targets - distance)
    return targets, 1 / (1 + np.exp(-logits))


def extreme_average_precisions(histogram):
    """Average precision if every bin were sorted as badly, and as well, as can be."""
    worst = best = 0.0
    found = wrong = 0
    for healthy, ill in histogram[::-1]:
        worst += sum((found + k) / (found + k + wrong + healthy) for k in range(1, ill + 1))
        best += ill * (found + ill) / max(found + ill + wrong, 1)
        found, wrong = found + ill, wrong + healthy
    return worst / found, best / found


def calibration_error(targets, scores):
    """ECE in tenths of the scores themselves."""
    tenth = np.minimum((scores * 10).astype(int), 9)
    gaps = np.bincount(tenth, scores - targets, 10)
    return np.abs(gaps).sum() / len(scores)


def calibration_bound(scores, bins=1000):
    """How far binning can move the ECE: half a bin's width, and records that change tenth."""
    edges = np.concatenate([[-np.inf], bin_edges(bins), [np.inf]])
    at = np.searchsorted(bin_edges(bins), np.log(scores / (1 - scores)), side="right")
    low, high = 1 / (1 + np.exp(-edges[at])), 1 / (1 + np.exp(-edges[at + 1]))
    moved = np.floor(low * 10) != np.floor(np.minimum(high, 0.999) * 10)
    return (high - low).max() + 2 * moved.mean()


def check_against_scikit_learn(targets, scores):
    shown = figures(sums_of(pair(scores), targets, TWO), TWO)
    histogram = sums_of(pair(scores), targets, TWO).histogram[0]
    assert shown.records == len(targets)
    assert abs(shown.auroc - roc_auc_score(targets, scores)) <= shown.auroc_error + 1e-12
    worst, best = extreme_average_precisions(histogram)
    exact = average_precision_score(targets, scores)
    assert worst - 1e-12 <= exact <= best + 1e-12
    assert abs(shown.auprc - exact) <= max(best - shown.auprc, shown.auprc - worst) + 1e-12
    assert shown.brier == pytest.approx(brier_score_loss(targets, scores), abs=ROUNDED)
    assert shown.loss == pytest.approx(log_loss(targets, scores), abs=ROUNDED)
    assert shown.accuracy == pytest.approx(accuracy_score(targets, scores > 0.5))
    moved = abs(shown.calibration_error - calibration_error(targets, scores))
    assert moved <= calibration_bound(scores)
    return shown, (worst, best)


@pytest.mark.parametrize("seed", range(5))
def test_figures_agree_with_scikit_learn_within_the_bound_of_the_bins(seed):
    targets, scores = binormal(seed)
    shown, (worst, best) = check_against_scikit_learn(targets, scores)
    assert shown.auroc_error < 0.002  # a bound that says something
    assert best - worst < 0.03


@QUICK
@given(
    st.lists(st.tuples(st.floats(-20, 20), st.integers(0, 1)), min_size=2, max_size=60).filter(
        lambda records: len({target for _, target in records}) == 2
    )
)
def test_auroc_from_bins_is_never_further_off_than_stated(records):
    logits, targets = map(np.array, zip(*records, strict=True))
    study = study_of(evaluation={"score_bins": 20})
    histogram = sums_of(pair(1 / (1 + np.exp(-logits))), targets, study).histogram[0]
    exact = roc_auc_score(targets, 1 / (1 + np.exp(-logits)))
    assert abs(auroc(histogram) - exact) <= auroc_binning_error(histogram) + 1e-12


def test_figures_of_a_model_for_films_agree_with_scikit_learn():
    path = DATA / "medmnist" / "pneumoniamnist.npz"
    if not path.exists():
        pytest.skip(f"no real data at {path}; set HOSPITIUM_DATA")
    with np.load(path) as films:
        train, test = (
            films[f"{part}_images"][:, ::2, ::2].reshape(len(films[f"{part}_images"]), -1) / 255
            for part in ("train", "test")
        )
        train_targets, targets = (films[f"{part}_labels"].ravel() for part in ("train", "test"))
    model = LogisticRegression(max_iter=400, C=0.05).fit(train[:1500], train_targets[:1500])
    scores = model.predict_proba(test)[:, 1]
    shown, (worst, best) = check_against_scikit_learn(targets.astype(np.int64), scores)
    assert 0.85 < shown.auroc < 0.99
    assert shown.auroc_error < 0.005
    assert best - worst < 0.01
    assert shown.auroc_low < roc_auc_score(targets, scores) < shown.auroc_high


def test_several_exclusive_classes_are_scored_each_against_the_rest():
    inputs, targets = make_classification(
        600, 6, n_informative=4, n_classes=3, class_sep=0.7, random_state=1
    )
    scores = LogisticRegression().fit(inputs[:300], targets[:300]).predict_proba(inputs[300:])
    targets = targets[300:]
    shown = figures(sums_of(scores, targets, THREE), THREE)
    exact = roc_auc_score(targets, scores, multi_class="ovr", average="macro")
    assert abs(shown.auroc - exact) <= shown.auroc_error < 0.01
    assert shown.accuracy == pytest.approx(accuracy_score(targets, scores.argmax(axis=1)))
    one_hot = np.eye(3)[targets]
    assert shown.auprc == pytest.approx(average_precision_score(one_hot, scores), abs=0.01)
    assert shown.brier == pytest.approx(((scores - one_hot) ** 2).sum(1).mean() / 2, abs=ROUNDED)
    assert shown.loss == pytest.approx(log_loss(targets, scores), abs=ROUNDED)


def test_independent_labels_are_averaged_over_labels():
    drawn = [binormal(seed) for seed in (11, 12, 13)]
    targets, scores = (np.stack(part, 1) for part in zip(*drawn, strict=True))
    shown = figures(sums_of(scores, targets.astype(np.float32), LABELS), LABELS)
    exact = roc_auc_score(targets, scores, average="macro")
    assert abs(shown.auroc - exact) <= shown.auroc_error
    assert shown.accuracy == pytest.approx(((scores > 0.5) == targets).mean())
    brier = np.mean([brier_score_loss(targets[:, k], scores[:, k]) for k in range(3)])
    assert shown.brier == pytest.approx(brier, abs=ROUNDED)


def test_three_ill_and_two_healthy_records_by_hand():
    # from low to high: healthy | healthy, ill | ill | ill. Pairs 6: 5 right, 1 shared, 0 wrong
    histogram = histogram_of([1, 0], [1, 1], [0, 1], [0, 1])
    assert auroc(histogram) == pytest.approx(5.5 / 6)
    assert auroc_binning_error(histogram) == pytest.approx(0.5 / 6)
    # from the top: 1 of 1, 2 of 2, 3 of 4, and the last bin finds nobody
    recall, precision = precision_recall_curve(histogram)
    np.testing.assert_allclose(recall, [1 / 3, 2 / 3, 1, 1])
    np.testing.assert_allclose(precision, [1, 1, 3 / 4, 3 / 5])
    assert average_precision(histogram) == pytest.approx((1 + 1 + 0.75) / 3)
    false, true = roc_curve(histogram)
    np.testing.assert_allclose(false, [0, 0, 0, 0.5, 1])
    np.testing.assert_allclose(true, [0, 1 / 3, 2 / 3, 1, 1])


@QUICK
@given(mixed_counts)
def test_on_binned_scores_the_areas_are_those_of_scikit_learn(histogram):
    targets, of_bin = listed(histogram)
    assert auroc(histogram) == pytest.approx(roc_auc_score(targets, of_bin))
    expected = average_precision_score(targets, of_bin)
    assert average_precision(histogram) == pytest.approx(expected)


@QUICK
@given(mixed_counts)
def test_the_area_under_the_drawn_roc_curve_is_the_auroc(histogram):
    false, true = roc_curve(histogram)
    assert np.trapezoid(true, false) == pytest.approx(auroc(histogram))
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    assert (false[-1], true[-1]) == (1.0, 1.0)


@QUICK
@given(mixed_counts)
def test_turning_scores_or_targets_around_turns_the_auroc_around(histogram):
    area = auroc(histogram)
    assert auroc(histogram[::-1]) == pytest.approx(1 - area)
    assert auroc(histogram[:, ::-1]) == pytest.approx(1 - area)


@QUICK
@given(counts, counts)
def test_figures_of_a_cohort_come_from_its_sum_not_from_its_sites(one, other):
    one, other = one[:20], other[:20]
    targets = np.concatenate([listed(one)[0], listed(other)[0]])
    of_bin = np.concatenate([listed(one)[1], listed(other)[1]])
    if len(set(targets.tolist())) < 2:
        assert math.isnan(auroc(one + other))
    else:
        assert auroc(one + other) == pytest.approx(roc_auc_score(targets, of_bin))


def test_the_middle_of_a_bin_stands_for_its_probability():
    # 24 bins of width 1: the middle of the first is -11.5, of bin 12 it is 0.5
    middles = bin_probabilities(int(2 * LARGEST_LOGIT))
    assert middles[0] == pytest.approx(1 / (1 + math.exp(LARGEST_LOGIT - 0.5)))
    assert middles[int(LARGEST_LOGIT)] == pytest.approx(1 / (1 + math.exp(-0.5)))
    np.testing.assert_allclose(middles + middles[::-1], 1)


def test_calibration_by_hand():
    # bins of width 1: bin 12 stands for p = 0.622, bin 14 for p = 0.924
    histogram = np.zeros((int(2 * LARGEST_LOGIT), 2), np.int64)
    histogram[int(LARGEST_LOGIT)] = [1, 3]
    histogram[int(LARGEST_LOGIT) + 2] = [4, 0]
    mean, observed, records = reliability_curve(histogram)
    low, high = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.5))
    np.testing.assert_allclose(mean, [low, high])
    np.testing.assert_allclose(observed, [0.75, 0.0])
    np.testing.assert_allclose(records, [4, 4])
    assert expected_calibration_error(histogram) == pytest.approx((0.75 - low + high) / 2)


def test_a_calibrated_model_has_almost_no_calibration_error():
    generator = np.random.default_rng(5)
    scores = generator.uniform(0.01, 0.99, 200_000)
    targets = (generator.random(len(scores)) < scores).astype(np.int64)
    shown = figures(sums_of(pair(scores), targets, TWO), TWO)
    assert shown.calibration_error < 0.006
    assert shown.brier == pytest.approx(1 / 6, abs=0.005)  # E[p (1 - p)] of a uniform p


def test_the_interval_is_that_of_hanley_and_mcneils_own_example():
    # Radiology 143:29-36, table II: 109 images, 51 abnormal, area 0.893, standard error 0.032
    histogram = np.array(
        [[33, 3], [6, 2], [6, 2], [11, 11], [2, 33]], np.int64
    )  # ratings: definitely normal .. definitely abnormal
    bins = np.zeros((20, 2), np.int64)
    bins[[0, 4, 9, 14, 19]] = histogram
    shown = figures(
        EvaluationSums(
            records=109, loss=0.0, brier=0.0, confusion=np.zeros((2, 2), np.int64),
            histogram=bins[None],
        ),
        TWO,
    )  # fmt: skip
    assert shown.auroc == pytest.approx(0.893, abs=5e-4)
    assert (shown.auroc_high - shown.auroc) / 1.96 == pytest.approx(0.032, abs=1e-3)
    assert shown.auroc - shown.auroc_low == pytest.approx(shown.auroc_high - shown.auroc)


def test_the_interval_of_few_ill_among_many_healthy_by_hand():
    # all 10 ill score above 80 of 100 healthy: area 0.8, Q1 = 0.8/1.2, Q2 = 1.28/1.8
    bins = np.zeros((20, 2), np.int64)
    bins[[0, 10, 19]] = [80, 0], [0, 10], [20, 0]
    nothing = EvaluationSums.nothing(TWO)
    shown = figures(replace(nothing, records=110, histogram=bins[None]), TWO)
    # (0.16 + 9 (Q1 - 0.64) + 99 (Q2 - 0.64)) / 1000 = (0.16 + 0.24 + 7.04) / 1000
    assert shown.auroc == pytest.approx(0.8)
    assert shown.auroc_high - shown.auroc == pytest.approx(1.96 * math.sqrt(0.00744), rel=1e-4)


def test_the_interval_covers_the_true_auroc_about_as_often_as_it_says():
    distance = 1.2
    true = 0.5 * (1 + math.erf(distance / 2))  # P(X > Y) of two normals one distance apart
    covered = 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        targets = np.repeat([0, 1], [80, 40])
        logits = generator.normal(size=120) + distance * targets
        shown = figures(sums_of(pair(1 / (1 + np.exp(-logits))), targets, TWO), TWO)
        covered += shown.auroc_low <= true <= shown.auroc_high
    assert 0.91 <= covered / 300 <= 0.99


def test_more_records_make_a_narrower_interval():
    widths = []
    for times in (1, 4, 16):
        targets, scores = binormal(3, records=100)
        targets, scores = np.tile(targets, times), np.tile(scores, times)
        shown = figures(sums_of(pair(scores), targets, TWO), TWO)
        widths.append(shown.auroc_high - shown.auroc_low)
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.05)
    assert widths[1] == pytest.approx(2 * widths[2], rel=0.05)


def test_a_perfect_score_on_few_records_is_not_called_certain():
    shown = figures(sums_of(pair(np.array([0.1, 0.2, 0.8, 0.9])), np.array([0, 0, 1, 1]), TWO), TWO)
    assert shown.auroc == 1.0
    assert shown.auroc_low < 0.9
    assert shown.auroc_high == 1.0


@pytest.mark.parametrize("target", [0, 1])
def test_one_class_alone_has_no_auroc_and_no_interval_but_a_loss(target):
    shown = figures(sums_of(pair(np.array([0.25, 0.75])), np.array([target] * 2), TWO), TWO)
    assert math.isnan(shown.auroc)
    assert math.isnan(shown.auroc_low)
    assert math.isnan(shown.auroc_high)
    assert shown.accuracy == 0.5
    assert shown.brier == pytest.approx((0.25**2 + 0.75**2) / 2, abs=ROUNDED)
    assert math.isnan(shown.auprc) == (target == 0)


@pytest.mark.parametrize("study", [TWO, THREE, LABELS])
def test_no_records_have_no_figures(study):
    shown = figures(EvaluationSums.nothing(study), study)
    assert shown.records == 0
    for name in ("loss", "accuracy", "auroc", "auprc", "brier", "calibration_error"):
        assert math.isnan(getattr(shown, name))


def test_a_class_that_nobody_has_is_left_out_of_the_mean():
    generator = np.random.default_rng(6)
    scores = generator.dirichlet([1, 1, 1], 60)
    targets = generator.integers(0, 2, 60)  # nobody is very ill
    shown = figures(sums_of(scores, targets, THREE), THREE)
    expected = np.mean([roc_auc_score(targets == k, scores[:, k]) for k in (0, 1)])
    assert abs(shown.auroc - expected) <= shown.auroc_error
