"""From summed counts to the figures that people read: AUROC, AUPRC, calibration, confusion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hospitium_common.metrics import LARGEST_LOGIT, scored_classes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hospitium_common.metrics import EvaluationSums
    from hospitium_common.study import Study

    Curve = NDArray[np.float64]

Z_95 = 1.959963984540054
CALIBRATION_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How good a model is on some records; macro averages where several classes are scored.

    ``auroc_error`` bounds how far binning can have moved ``auroc``; ``auroc_low`` and
    ``auroc_high`` are a 95 % interval (Hanley and McNeil 1982). ``nan`` where it is undefined.
    """

    records: int
    loss: float
    accuracy: float
    auroc: float
    auroc_low: float
    auroc_high: float
    auroc_error: float
    auprc: float
    brier: float
    calibration_error: float


def figures(sums: EvaluationSums, study: Study) -> Figures:
    """Compute all figures from sums over any number of sites."""
    columns = range(len(scored_classes(study)))
    areas = [auroc(sums.histogram[c]) for c in columns]
    defined = [area for area in areas if not math.isnan(area)]
    area = float(np.mean(defined)) if defined else math.nan
    margin = _mean([Z_95 * _hanley_mcneil(areas[c], sums.histogram[c]) for c in columns])
    records = sums.records
    return Figures(
        records=records,
        loss=sums.loss / records if records else math.nan,
        accuracy=_accuracy(sums, study),
        auroc=area,
        auroc_low=area if math.isnan(area) else max(0.0, area - margin),
        auroc_high=area if math.isnan(area) else min(1.0, area + margin),
        auroc_error=max((auroc_binning_error(sums.histogram[c]) for c in columns), default=0.0),
        auprc=_mean([average_precision(sums.histogram[c]) for c in columns]),
        brier=sums.brier / records if records else math.nan,
        calibration_error=_mean([expected_calibration_error(sums.histogram[c]) for c in columns]),
    )


def auroc(histogram: NDArray[np.int64]) -> float:
    """Area under the ROC curve from ``[bin, healthy | ill]``; a shared bin counts one half."""
    healthy, ill = histogram.T.astype(np.float64)
    pairs = healthy.sum() * ill.sum()
    if pairs == 0:
        return math.nan
    below = np.cumsum(healthy) - healthy
    return float((ill * (below + healthy / 2)).sum() / pairs)


def auroc_binning_error(histogram: NDArray[np.int64]) -> float:
    """Largest distance between the binned AUROC and the one of the scores themselves."""
    healthy, ill = histogram.T.astype(np.float64)
    pairs = healthy.sum() * ill.sum()
    return float((healthy * ill).sum() / 2 / pairs) if pairs else 0.0


def average_precision(histogram: NDArray[np.int64]) -> float:
    """Area under the precision-recall curve as a sum of steps, from the highest bin down."""
    recall, precision = precision_recall_curve(histogram)
    if len(recall) == 0:
        return math.nan
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def roc_curve(histogram: NDArray[np.int64]) -> tuple[Curve, Curve]:
    """Return false and true positive rates from (0, 0) to (1, 1)."""
    healthy, ill = histogram[::-1].T.astype(np.float64)
    return (
        np.concatenate([[0.0], np.cumsum(healthy) / max(healthy.sum(), 1)]),
        np.concatenate([[0.0], np.cumsum(ill) / max(ill.sum(), 1)]),
    )


def precision_recall_curve(histogram: NDArray[np.int64]) -> tuple[Curve, Curve]:
    """Return recall and precision from the highest bin down, where somebody was called ill."""
    healthy, ill = histogram[::-1].T.astype(np.float64)
    called, found = np.cumsum(healthy + ill), np.cumsum(ill)
    some = called > 0
    if ill.sum() == 0:
        return np.zeros(0), np.zeros(0)
    return found[some] / ill.sum(), found[some] / called[some]


def bin_probabilities(bins: int) -> Curve:
    """Return the probability at the middle of every bin of the logit scale."""
    edges = np.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, bins + 1)
    return np.asarray(1 / (1 + np.exp(-(edges[:-1] + edges[1:]) / 2)))


def reliability_curve(histogram: NDArray[np.int64]) -> tuple[Curve, Curve, Curve]:
    """Return mean predicted probability, observed frequency and records, per tenth."""
    predicted = bin_probabilities(len(histogram))
    tenth = np.minimum((predicted * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = histogram.sum(axis=1).astype(np.float64)
    records: Curve = np.bincount(tenth, counts, CALIBRATION_BINS).astype(np.float64)
    some = records > 0
    mean = np.bincount(tenth, counts * predicted, CALIBRATION_BINS)[some] / records[some]
    observed = np.bincount(tenth, histogram[:, 1].astype(np.float64), CALIBRATION_BINS)
    return mean, observed[some] / records[some], records[some]


def expected_calibration_error(histogram: NDArray[np.int64]) -> float:
    """Mean distance between predicted and observed over tenths, weighted by records."""
    mean, observed, records = reliability_curve(histogram)
    total = records.sum()
    return float((records * np.abs(mean - observed)).sum() / total) if total else math.nan


def _accuracy(sums: EvaluationSums, study: Study) -> float:
    if sums.records == 0:
        return math.nan
    if study.task.labels == "exclusive":
        return float(np.trace(sums.confusion) / sums.records)
    bins = sums.histogram.shape[1]
    right = sums.histogram[:, : bins // 2, 0].sum() + sums.histogram[:, bins // 2 :, 1].sum()
    return float(right / sums.histogram.sum())


def _hanley_mcneil(area: float, histogram: NDArray[np.int64]) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982, equation 2).

    An area of 0 or 1 is moved by half a pair: a perfect score on few records keeps an interval.
    """
    healthy, ill = (int(count) for count in histogram.sum(axis=0))
    if healthy == 0 or ill == 0:
        return math.nan
    half_a_pair = 0.5 / (healthy * ill + 1)
    area = min(max(area, half_a_pair), 1 - half_a_pair)
    two_ill, two_healthy = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area)
        + (ill - 1) * (two_ill - area**2)
        + (healthy - 1) * (two_healthy - area**2)
    ) / (healthy * ill)
    return math.sqrt(max(variance, 0.0))


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
