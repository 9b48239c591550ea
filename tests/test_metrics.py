"""Figures as integers: bins, fixed point, tails that add up, and what a site says of its model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hospitium_client.samples import Samples
from hospitium_client.training.evaluate import evaluate
from hospitium_common.errors import LocalProtocolError
from hospitium_common.metrics import (
    LARGEST_WORD,
    LOSS_SCALE,
    MOMENT_SCALE,
    EvaluationSums,
    EvaluationTotals,
    StatisticsSums,
    TailLayout,
    TrainingSums,
    bin_edges,
    evaluation_sums,
    note_clipped,
    scored_classes,
)
from tests.federation_kit import study_of

COARSE = {"score_bins": 24}
TWO = study_of(evaluation=COARSE)
THREE = study_of(evaluation=COARSE, task={"classes": ["well", "ill", "very ill"]})
LABELS = study_of(evaluation=COARSE, task={"classes": ["oedema", "effusion"], "labels": "multi"})
QUICK = settings(deadline=None, max_examples=40)


def chances(logits):
    """Probabilities of [not ill, ill]."""
    ill = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return np.stack([1 - ill, ill], 1)


def binary_sums(logits, targets, study=TWO):
    probabilities, targets = chances(logits), np.asarray(targets, np.int64)
    losses = -np.log(probabilities[np.arange(len(targets)), targets])
    return evaluation_sums(probabilities, targets, losses, study)


def assert_same(one: EvaluationSums, other: EvaluationSums, tolerance: float = 0.0):
    assert one.records == other.records
    assert one.loss == pytest.approx(other.loss, abs=tolerance)
    assert one.brier == pytest.approx(other.brier, abs=tolerance)
    np.testing.assert_array_equal(one.confusion, other.confusion)
    np.testing.assert_array_equal(one.histogram, other.histogram)


def test_scores_fall_into_equal_bins_of_the_logit_with_open_ends():
    # 24 bins of width 1 between -12 and 12: bin 0 ends at -11, 12 begins at 0, 23 begins at 11
    sums = binary_sums([-20, -11.1, -0.1, 0.0, 0.9, 1.1, 11.1, 20], [0, 1, 0, 1, 0, 1, 0, 1])
    bins, ill = sums.histogram[0].nonzero()
    assert list(zip(bins.tolist(), ill.tolist(), strict=True)) == [
        (0, 0), (0, 1), (11, 0), (12, 0), (12, 1), (13, 1), (23, 0), (23, 1)
    ]  # fmt: skip
    assert sums.histogram.max() == 1
    np.testing.assert_allclose(bin_edges(24), np.arange(-11, 12), atol=1e-12)


def test_the_confusion_counts_true_classes_by_row_and_predicted_by_column():
    sums = binary_sums([-1, -1, -1, 1, 1, 2], [0, 0, 1, 0, 1, 1])
    np.testing.assert_array_equal(sums.confusion, [[2, 1], [1, 2]])
    assert sums.records == 6


def test_the_brier_sum_of_two_classes_is_the_usual_one_of_the_second():
    sums = evaluation_sums(
        np.array([[0.9, 0.1], [0.4, 0.6], [0.75, 0.25]]), np.array([0, 1, 1]), np.zeros(3), TWO
    )
    assert sums.brier == pytest.approx(0.1**2 + 0.4**2 + 0.75**2)


def test_the_brier_sum_of_independent_labels_is_their_mean():
    sums = evaluation_sums(
        np.array([[0.9, 0.5]]), np.array([[1.0, 0.0]], np.float32), np.array([0.8]), LABELS
    )
    assert sums.brier == pytest.approx((0.1**2 + 0.5**2) / 2)
    assert sums.loss == 0.8
    assert not sums.confusion.any()
    # logit(0.9) = 2.197 lies in bin 12 + 2 = 14 and is of the class; logit(0.5) = 0 in bin 12
    assert sums.histogram[0, 14].tolist() == [0, 1]
    assert sums.histogram[1, 12].tolist() == [1, 0]


@pytest.mark.parametrize(("study", "expected"), [(TWO, (1,)), (THREE, (0, 1, 2)), (LABELS, (0, 1))])
def test_of_two_exclusive_classes_one_is_scored_and_otherwise_all(study, expected):
    assert scored_classes(study) == expected
    assert len(EvaluationSums.nothing(study).histogram) == len(expected)


def test_every_record_is_in_one_bin_of_every_scored_class():
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet([1, 1, 1], 50)
    targets = generator.integers(0, 3, 50)
    sums = evaluation_sums(probabilities, targets, np.ones(50), THREE)
    assert sums.histogram.sum(axis=(1, 2)).tolist() == [50, 50, 50]
    np.testing.assert_array_equal(sums.histogram[:, :, 1].sum(axis=1), np.bincount(targets))
    np.testing.assert_array_equal(sums.confusion.sum(axis=1), np.bincount(targets))


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_certainty_falls_into_the_outermost_bin(score):
    sums = evaluation_sums(
        np.array([[1 - score, score]]), np.array([1]), np.array([0.0]), TWO
    )  # fmt: skip
    assert sums.histogram[0, 23 if score else 0, 1] == 1


@QUICK
@given(
    st.lists(st.tuples(st.floats(-30, 30), st.integers(0, 1)), min_size=1, max_size=40),
    st.integers(1, 5),
)
def test_the_tails_of_sites_add_up_to_the_sums_over_all_their_records(records, sites):
    logits, targets = map(np.array, zip(*records, strict=True))
    layout = TailLayout(study=TWO, tensors=2, features=3)
    total = np.zeros(layout.length, np.uint64)
    for site in range(sites):
        own = slice(site, None, sites)
        part = binary_sums(logits[own], targets[own])
        total += layout.pack(
            TrainingSums(
                weight=len(logits[own]), clipped=1, steps=2, dropped=0, scaled_down=0,
                second_moments=(0.5, 2.0), validation=part,
            )
        )  # fmt: skip
    read = layout.training(total)
    assert (read.weight, read.clipped, read.steps, read.dropped) == (
        len(records), sites, 2 * sites, 0
    )  # fmt: skip
    assert read.second_moments == (0.5 * sites, 2.0 * sites)
    # every site rounds once, by at most half a step
    assert_same(read.validation, binary_sums(logits, targets), tolerance=sites / LOSS_SCALE)


@pytest.mark.parametrize("study", [TWO, THREE, LABELS])
def test_what_is_packed_for_each_purpose_is_read_back(study):
    generator = np.random.default_rng(2)
    shape = EvaluationSums.nothing(study)

    def some() -> EvaluationSums:
        return EvaluationSums(
            records=int(generator.integers(1000)),
            loss=float(generator.integers(1000)) / 8,
            brier=float(generator.integers(1000)) / 8,
            confusion=generator.integers(0, 9, shape.confusion.shape),
            histogram=generator.integers(0, 9, shape.histogram.shape),
        )

    layout = TailLayout(study=study, tensors=3, features=4)
    classes = len(study.task.classes)
    statistics = StatisticsSums(
        records=7,
        class_counts=generator.integers(0, 9, classes),
        features=generator.integers(0, 2**40, (3, 4)),
    )
    read = layout.statistics(layout.pack(statistics))
    assert read.records == 7
    np.testing.assert_array_equal(read.class_counts, statistics.class_counts)
    np.testing.assert_array_equal(read.features, statistics.features)

    training = TrainingSums(
        weight=10, clipped=2, steps=3, dropped=4, scaled_down=0, second_moments=(0.25, 0.0, 1.5),
        validation=some(),
    )  # fmt: skip
    again = layout.training(layout.pack(training))
    assert (again.weight, again.clipped, again.steps, again.dropped) == (10, 2, 3, 4)
    assert again.second_moments == (0.25, 0.0, 1.5)
    assert_same(again.validation, training.validation)

    totals = EvaluationTotals(validation=some(), test=some())
    both = layout.evaluation(layout.pack(totals))
    assert_same(both.validation, totals.validation)
    assert_same(both.test, totals.test)


@pytest.mark.parametrize(
    ("tensors", "features"), [(0, 0), (1, 1), (50, 2), (2, 500)], ids=lambda n: str(n)
)
def test_every_purpose_has_a_tail_of_the_same_length(tensors, features):
    layout = TailLayout(study=TWO, tensors=tensors, features=features)
    nothing = EvaluationSums.nothing(TWO)
    # 3 sums, 2×2 confusion counts, 24 bins of 2
    assert len(nothing.words()) == 3 + 4 + 48
    tails = [
        layout.pack(
            StatisticsSums(
                records=0, class_counts=np.zeros(2, np.int64),
                features=np.zeros((3, features), np.int64),
            )
        ),
        layout.pack(
            TrainingSums(
                weight=0, clipped=0, steps=0, dropped=0, scaled_down=0,
                second_moments=(0.0,) * tensors,
                validation=nothing,
            )
        ),
        layout.pack(EvaluationTotals(validation=nothing, test=nothing)),
    ]  # fmt: skip
    assert {len(tail) for tail in tails} == {layout.length}
    assert layout.length == max(3 + 3 * features, 6 + tensors + 55, 110)
    assert all(tail.dtype == np.uint64 for tail in tails)


def test_the_largest_words_of_255_sites_add_up_without_wrapping():
    layout = TailLayout(study=TWO, tensors=1, features=0)
    largest = TrainingSums(
        weight=LARGEST_WORD, clipped=LARGEST_WORD, steps=0, dropped=0, scaled_down=0,
        second_moments=(math.inf,), validation=EvaluationSums.nothing(TWO),
    )  # fmt: skip
    total = np.zeros(layout.length, np.uint64)
    for _ in range(255):
        total += layout.pack(largest)
    read = layout.training(total)
    assert read.weight == read.clipped == 255 * LARGEST_WORD
    assert read.second_moments[0] == pytest.approx(255 * LARGEST_WORD / MOMENT_SCALE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300])
def test_a_real_number_that_does_not_fit_counts_as_the_largest(value):
    nothing = EvaluationSums.nothing(TWO)
    sums = EvaluationSums(
        records=1, loss=value, brier=value, confusion=nothing.confusion,
        histogram=nothing.histogram,
    )  # fmt: skip
    assert sums.words()[1:3].tolist() == [LARGEST_WORD, LARGEST_WORD]


@QUICK
@given(st.floats(0, 2**34))
def test_fixed_point_is_off_by_at_most_half_a_step(value):
    nothing = EvaluationSums.nothing(TWO)
    sums = EvaluationSums(
        records=1, loss=value, brier=0.0, confusion=nothing.confusion, histogram=nothing.histogram
    )
    assert abs(EvaluationSums.from_words(sums.words(), TWO).loss - value) <= 0.5 / LOSS_SCALE


@pytest.mark.parametrize("word", [-1, LARGEST_WORD + 1, 2**62, 2**63, 2**70])
def test_a_word_that_could_not_be_added_up_safely_is_refused(word):
    layout = TailLayout(study=TWO, tensors=0, features=0)
    sums = TrainingSums(
        weight=word, clipped=0, steps=0, dropped=0, scaled_down=0, second_moments=(),
        validation=EvaluationSums.nothing(TWO),
    )  # fmt: skip
    with pytest.raises(LocalProtocolError, match="from 0 to 2\\^55"):
        layout.pack(sums)


def test_noting_what_was_clipped_changes_that_word_alone_and_in_a_copy():
    layout = TailLayout(study=TWO, tensors=2, features=0)
    sums = TrainingSums(
        weight=9, clipped=0, steps=8, dropped=7, scaled_down=0, second_moments=(0.5, 0.25),
        validation=binary_sums([1.0, -1.0], [1, 1]),
    )  # fmt: skip
    tail = layout.pack(sums)
    noted = note_clipped(tail, 123)
    assert layout.training(noted).clipped == 123
    assert layout.training(tail).clipped == 0
    assert (noted != tail).sum() == 1


class Given(nn.Module):
    """Answers with its input: the logits are the samples."""

    def forward(self, inputs):
        return inputs


def samples_of(logits, targets) -> Samples:
    inputs = torch.tensor(np.asarray(logits), dtype=torch.float32)
    return Samples(
        inputs=inputs, targets=torch.as_tensor(targets), patients=torch.arange(len(inputs))
    )


def test_a_site_reports_the_sums_of_its_models_probabilities():
    logits = np.array([0.5, -1.5, 3.0, -0.25])
    targets = np.array([1, 0, 0, 1])
    sums = evaluate(Given(), samples_of(np.stack([0 * logits, logits], 1), targets), TWO)
    assert_same(sums, binary_sums(logits, targets), tolerance=1e-6)


def test_independent_labels_are_scored_with_a_sigmoid_each():
    logits = np.array([[0.0, 2.0], [-2.0, 0.0]])
    targets = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    sums = evaluate(Given(), samples_of(logits, targets), LABELS)
    # ln 2 twice and ln(1 + e^-2) twice
    assert sums.loss == pytest.approx(2 * math.log(2) + 2 * math.log1p(math.exp(-2)), rel=1e-6)
    sure = 1 / (1 + math.exp(2))
    assert sums.brier == pytest.approx((2 * 0.25 + 2 * sure**2) / 2)
    assert sums.histogram[:, :, 1].sum(axis=1).tolist() == [1, 1]


def test_fewer_records_than_the_smallest_count_say_nothing_at_all():
    three = samples_of([[0.0, 1.0]] * 3, [1, 1, 0])
    assert_same(evaluate(Given(), three, TWO, smallest_count=4), EvaluationSums.nothing(TWO))
    assert evaluate(Given(), three, TWO, smallest_count=3).records == 3


def test_no_records_are_no_sums():
    none = Samples(
        inputs=torch.zeros(0, 2), targets=torch.zeros(0, dtype=torch.int64),
        patients=torch.zeros(0, dtype=torch.int64),
    )  # fmt: skip
    assert_same(evaluate(Given(), none, TWO), EvaluationSums.nothing(TWO))


def test_a_model_that_answers_nan_is_as_good_as_a_coin_and_breaks_nothing():
    sums = evaluate(Given(), samples_of([[math.nan, math.nan]] * 3, [0, 1, 1]), TWO)
    assert sums.histogram[0, 12].tolist() == [1, 2]
    assert sums.brier == pytest.approx(3 * 0.25)
    assert sums.loss == 3e6
    assert (sums.words() >= 0).all()
    assert (sums.words() <= LARGEST_WORD).all()


def test_records_beyond_one_batch_are_all_counted_in_their_order():
    generator = np.random.default_rng(3)
    logits, targets = generator.normal(size=1300), generator.integers(0, 2, 1300)
    sums = evaluate(Given(), samples_of(np.stack([0 * logits, logits], 1), targets), TWO)
    assert_same(sums, binary_sums(logits, targets), tolerance=1e-3)


def test_looking_at_records_teaches_the_model_nothing():
    torch_state = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = samples_of(torch.randn(30, 2, generator=torch_state).numpy() + 5, [0, 1] * 15)
    first, second = (evaluate(model, samples, TWO) for _ in range(2))
    assert_same(first, second)  # dropout is off
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
