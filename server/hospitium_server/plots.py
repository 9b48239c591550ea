"""The pictures of a study, drawn for screens and for paper."""

from __future__ import annotations

import io
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hospitium_server.evaluation import (
    auroc,
    precision_recall_curve,
    reliability_curve,
    roc_curve,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from hospitium_common.metrics import EvaluationSums
    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#7A5195", "#6B7280"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00", "#CC79A7", GREY)
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.labelcolor": "#111827",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "legend.frameon": False,
}


def learning_curve(
    rounds: Sequence[int], seen: Sequence[Figures], best: int, withdrawn: Sequence[int] = ()
) -> bytes:
    """Return a PNG: validation AUROC with its interval, and loss, over the rounds.

    Versions that were ``withdrawn`` are crossed out.
    """
    with mpl.rc_context(STYLE):
        figure, (left, right) = _figure(2, 8.6)
        scores = [one.auroc for one in seen]
        left.fill_between(
            rounds, [s.auroc_low for s in seen], [s.auroc_high for s in seen],
            color=BLUE, alpha=0.15, linewidth=0, label="95 % interval",
        )  # fmt: skip
        left.plot(rounds, scores, color=BLUE, marker="o", markersize=3.5, label="AUROC")
        if best in rounds:
            left.plot(
                [best], [scores[list(rounds).index(best)]], "o", color=ORANGE, markersize=8,
                label=f"best: round {best}",
            )  # fmt: skip
        if withdrawn:
            crossed = [scores[list(rounds).index(number)] for number in withdrawn]
            left.plot(withdrawn, crossed, "x", color=PURPLE, markersize=9, label="withdrawn")
        left.set(title="Validation AUROC", xlabel="round", ylabel="AUROC")
        left.legend(loc="lower right")
        right.plot(rounds, [s.loss for s in seen], color=GREY, marker="o", markersize=3.5)
        right.set(title="Validation loss", xlabel="round", ylabel="loss per record")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _png(figure)


def norms(history: Sequence[RoundRecord]) -> bytes:
    """Return a PNG: how long the mean updates were, how long they may be, and which were refused.

    A refused sum has no norm to show; it is marked where it would stand.
    """
    with mpl.rc_context(STYLE):
        figure, (axes,) = _figure(1, 4.6)
        used = [made for made in history if made.norm_bound > 0]
        axes.plot(
            [made.round for made in used], [made.update_norm for made in used], color=BLUE,
            marker="o", markersize=3.5, label="mean update",
        )  # fmt: skip
        axes.plot(
            [made.round for made in used], [made.norm_bound for made in used], color=ORANGE,
            linestyle=":", label="allowed",
        )  # fmt: skip
        refused = [made.round for made in history if made.rejected or made.withdrawn]
        for at, number in enumerate(refused):
            axes.axvline(
                number, color=PURPLE, linestyle="--", linewidth=1,
                label="not used" if at == 0 else None,
            )  # fmt: skip
        if used:
            axes.set_yscale("log")
        axes.set(title="Norm of the mean update", xlabel="round", ylabel="norm")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")
        return _png(figure)


def roc(sums: EvaluationSums, names: Sequence[str]) -> bytes:
    """Return a PNG: ROC curves on the test patients, one per scored class."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = _figure(1, 4.6)
        axes.plot([0, 1], [0, 1], color="#9CA3AF", linestyle=":", linewidth=1)
        for histogram, name, colour in zip(sums.histogram, names, cycle(COLOURS), strict=False):
            false, true = roc_curve(histogram)
            label = f"{name} ({auroc(histogram):.3f})"
            axes.plot(false, true, color=colour, linewidth=1.8, label=label)
        axes.set(title="ROC, test patients", xlabel="1 - specificity", ylabel="sensitivity")
        axes.legend(loc="lower right")
        _unit_square(axes)
        return _png(figure)


def precision_recall(sums: EvaluationSums, names: Sequence[str]) -> bytes:
    """Return a PNG: precision over recall on the test patients, one curve per scored class."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = _figure(1, 4.6)
        for histogram, name, colour in zip(sums.histogram, names, cycle(COLOURS), strict=False):
            recall, precision = precision_recall_curve(histogram)
            axes.step(recall, precision, color=colour, linewidth=1.8, where="post", label=name)
            share = histogram[:, 1].sum() / max(histogram.sum(), 1)
            axes.axhline(float(share), color=colour, linestyle=":", linewidth=1)
        axes.set(title="Precision and recall, test patients", xlabel="recall", ylabel="precision")
        axes.legend(loc="lower left")
        _unit_square(axes)
        return _png(figure)


def calibration(sums: EvaluationSums, names: Sequence[str]) -> bytes:
    """Return a PNG: predicted against observed, on the test patients."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = _figure(1, 4.6)
        axes.plot([0, 1], [0, 1], color="#9CA3AF", linestyle=":", linewidth=1, label="perfect")
        for histogram, name, colour in zip(sums.histogram, names, cycle(COLOURS), strict=False):
            predicted, observed, records = reliability_curve(histogram)
            axes.plot(predicted, observed, color=colour, linewidth=1.8, label=name)
            sizes = 90 * records / max(records.max(), 1) + 12 if len(records) else records
            axes.scatter(predicted, observed, s=sizes, color=colour, alpha=0.6, linewidth=0)
        axes.set(
            title="Calibration, test patients", xlabel="predicted probability",
            ylabel="observed frequency",
        )  # fmt: skip
        axes.legend(loc="upper left")
        _unit_square(axes)
        return _png(figure)


def _figure(columns: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 4.0 if columns == 1 else 3.4), layout="constrained")
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()
