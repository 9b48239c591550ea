"""Figures as integers, so that they can be added up under masks.

A round's *tail* is a row of 64-bit words. Real numbers are fixed point; every word of one site
stays below 2^55, so the words of 255 sites add up without wrapping.

Scores are binned on the logit scale, ``score_bins`` equal bins over ±12, open at the ends: half of
them lie below probability 0.5, and scores near 0 and 1 stay apart. AUROC from the bins is off by at
most half the probability that a random ill and a random healthy record share a bin
(``hospitium_server.evaluation``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.errors import LocalProtocolError
from hospitium_common.normalisation import ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hospitium_common.parameters import Layout
    from hospitium_common.study import Study

    Integers = NDArray[np.int64]

LARGEST_LOGIT = 12.0
LOSS_SCALE = 2.0**20
MOMENT_SCALE = 2.0**40
LARGEST_WORD = 2**55 - 1
TRAINING_HEAD = 6
"""Words of a training round before those of the tensors."""


def _fixed(value: float, scale: float) -> int:
    """Round to fixed point; what does not fit (or is not a number) counts as the largest."""
    scaled = value * scale
    return round(scaled) if 0 <= scaled < LARGEST_WORD else LARGEST_WORD


@dataclass(frozen=True, kw_only=True)
class EvaluationSums:
    """What a model did on some records, as sums.

    ``confusion`` is ``[true class, predicted class]`` (all zero for independent labels);
    ``histogram`` is ``[scored class, bin, 0 = not of the class | 1 = of it]``.
    """

    records: int
    loss: float
    brier: float
    confusion: Integers
    histogram: Integers

    def words(self) -> Integers:
        """Lay the sums end to end."""
        head = [self.records, _fixed(self.loss, LOSS_SCALE), _fixed(self.brier, LOSS_SCALE)]
        return np.concatenate(
            [np.array(head, np.int64), self.confusion.ravel(), self.histogram.ravel()]
        )

    @classmethod
    def nothing(cls, study: Study) -> EvaluationSums:
        """Sums over no records: what a site sends that has too few to speak of."""
        classes, columns = len(study.task.classes), len(scored_classes(study))
        return cls(
            records=0,
            loss=0.0,
            brier=0.0,
            confusion=np.zeros((classes, classes), np.int64),
            histogram=np.zeros((columns, study.evaluation.score_bins, 2), np.int64),
        )

    @classmethod
    def from_words(cls, words: Integers, study: Study) -> EvaluationSums:
        """Read what ``words`` laid down, or the total of several."""
        shape = cls.nothing(study)
        confusion, histogram = np.split(words[3:], [shape.confusion.size])
        return cls(
            records=int(words[0]),
            loss=float(words[1]) / LOSS_SCALE,
            brier=float(words[2]) / LOSS_SCALE,
            confusion=confusion.reshape(shape.confusion.shape),
            histogram=histogram.reshape(shape.histogram.shape),
        )


@dataclass(frozen=True, kw_only=True)
class StatisticsSums:
    """Before the first round: how many training records, of which class, with which values.

    ``features`` is ``[count | sum | sum of squares, feature]`` over the plausible range, scaled
    as `normalisation` says.
    """

    records: int
    class_counts: Integers
    features: Integers


@dataclass(frozen=True, kw_only=True)
class TrainingSums:
    """Beside an update: its weight, what was clipped, and how the model did that was received.

    ``second_moments`` are the sums of squares per tensor of the weighted update; the next
    round's quantiser takes its bounds from them. ``scaled_down`` counts the sites (at one site:
    0 or 1) whose update was longer than the study allows. ``noise_square`` is the expected squared
    length of the noise of differential privacy in the weighted updates, 0 where there is none or
    nobody knows: what rounding is to be compared with.
    """

    weight: int
    clipped: int
    steps: int
    dropped: int
    scaled_down: int
    second_moments: tuple[float, ...]
    validation: EvaluationSums
    noise_square: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationTotals:
    """At the end: how a model does on the patients that were held out."""

    validation: EvaluationSums
    test: EvaluationSums


def scored_classes(study: Study) -> tuple[int, ...]:
    """Classes whose scores are binned: the second of two exclusive ones, otherwise all."""
    classes = len(study.task.classes)
    return (1,) if study.task.labels == "exclusive" and classes == 2 else tuple(range(classes))


def bin_edges(bins: int) -> NDArray[np.float64]:
    """Return the ``bins - 1`` inner edges on the logit scale."""
    return np.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, bins + 1)[1:-1]


def evaluation_sums(
    probabilities: NDArray[np.float64],
    targets: NDArray[np.int64] | NDArray[np.float32],
    losses: NDArray[np.float64],
    study: Study,
) -> EvaluationSums:
    """Add up probabilities ``[record, class]`` against targets, and losses ``[record]``."""
    sums = EvaluationSums.nothing(study)
    classes = len(study.task.classes)
    exclusive = study.task.labels == "exclusive"
    of_class = np.eye(classes)[targets.astype(np.int64)] if exclusive else targets > 0.5
    of_class = of_class.astype(bool)
    confusion, histogram = sums.confusion.copy(), sums.histogram.copy()
    if exclusive:
        np.add.at(confusion, (targets.astype(np.int64), probabilities.argmax(axis=1)), 1)
    edges = bin_edges(study.evaluation.score_bins)
    for column, scored in enumerate(scored_classes(study)):
        score = np.clip(probabilities[:, scored], 1e-12, 1 - 1e-12)
        bins = np.searchsorted(edges, np.log(score / (1 - score)), side="right")
        np.add.at(histogram[column], (bins, of_class[:, scored].astype(np.int64)), 1)
    return EvaluationSums(
        records=len(probabilities),
        loss=float(losses.sum()),
        brier=float(((probabilities - of_class) ** 2).sum() / (2 if exclusive else classes)),
        confusion=confusion,
        histogram=histogram,
    )


CLIPPED_WORD = 1


def note_clipped(tail: NDArray[np.uint64], clipped: int) -> NDArray[np.uint64]:
    """Note in a training tail how many values the quantiser clipped."""
    noted = tail.copy()
    noted[CLIPPED_WORD] = clipped
    return noted


@dataclass(frozen=True, kw_only=True)
class TailLayout:
    """How the words of a tail are laid out for one study: the same length for every purpose."""

    study: Study
    tensors: int
    features: int

    @classmethod
    def of(cls, study: Study, layout: Layout) -> TailLayout:
        """Return the tail's layout for a study whose travelling tensors have this layout."""
        return cls(study=study, tensors=len(layout.names), features=len(ranges(study)))

    @property
    def _evaluation_words(self) -> int:
        return len(EvaluationSums.nothing(self.study).words())

    @property
    def length(self) -> int:
        """Words in a tail."""
        statistics = 1 + len(self.study.task.classes) + 3 * self.features
        return max(
            statistics,
            TRAINING_HEAD + self.tensors + self._evaluation_words,
            2 * self._evaluation_words,
        )

    def pack(self, sums: StatisticsSums | TrainingSums | EvaluationTotals) -> NDArray[np.uint64]:
        """Lay sums into a tail.

        Raises:
            LocalProtocolError: a word is negative or too large to be added up safely.
        """
        if isinstance(sums, StatisticsSums):
            parts = [np.array([sums.records]), sums.class_counts, sums.features.ravel()]
        elif isinstance(sums, TrainingSums):
            moments = [_fixed(moment, MOMENT_SCALE) for moment in sums.second_moments]
            counts = [sums.weight, sums.clipped, sums.steps, sums.dropped, sums.scaled_down]
            head = [*counts, _fixed(sums.noise_square, MOMENT_SCALE), *moments]
            parts = [np.array(head), sums.validation.words()]
        else:
            parts = [sums.validation.words(), sums.test.words()]
        words = np.concatenate(parts)
        if words.min(initial=0) < 0 or words.max(initial=0) > LARGEST_WORD:
            raise LocalProtocolError("expected words from 0 to 2^55 in the tail, got others")
        tail = np.zeros(self.length, np.uint64)
        tail[: len(words)] = words.astype(np.uint64)
        return tail

    def statistics(self, totals: NDArray[np.uint64]) -> StatisticsSums:
        """Read the totals of a statistics round."""
        words, classes = totals.view(np.int64), len(self.study.task.classes)
        features = words[1 + classes : 1 + classes + 3 * self.features]
        return StatisticsSums(
            records=int(words[0]),
            class_counts=words[1 : 1 + classes],
            features=features.reshape(3, self.features),
        )

    def training(self, totals: NDArray[np.uint64]) -> TrainingSums:
        """Read the totals of a training round."""
        words = totals.view(np.int64)
        moments, rest = np.split(words[TRAINING_HEAD:], [self.tensors])
        return TrainingSums(
            weight=int(words[0]),
            clipped=int(words[1]),
            steps=int(words[2]),
            dropped=int(words[3]),
            scaled_down=int(words[4]),
            noise_square=float(words[5]) / MOMENT_SCALE,
            second_moments=tuple(float(word) / MOMENT_SCALE for word in moments),
            validation=EvaluationSums.from_words(rest[: self._evaluation_words], self.study),
        )

    def evaluation(self, totals: NDArray[np.uint64]) -> EvaluationTotals:
        """Read the totals of an evaluation round."""
        words, length = totals.view(np.int64), self._evaluation_words
        return EvaluationTotals(
            validation=EvaluationSums.from_words(words[:length], self.study),
            test=EvaluationSums.from_words(words[length : 2 * length], self.study),
        )
