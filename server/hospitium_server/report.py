"""The report of a study: one self-contained page, and its figures as CSV, JSON and Markdown."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.metrics import scored_classes
from hospitium_common.study.explain import explain
from hospitium_server import plots
from hospitium_server.round_rows import HEAD, not_used, round_rows, shown_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hospitium_common.study import Study
    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord
    from hospitium_server.rounds import StudyResult

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #111827; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.25rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #e5e7eb; }
.banner { background: #fff3cd; border-left: 6px solid #d55e00; padding: .75rem 1rem; }
.lead { font-size: 1.15rem; } img { max-width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e5e7eb;
  vertical-align: top; } td.number, th.number { text-align: right; }
code { font-size: .85em; overflow-wrap: anywhere; } dt { font-weight: 600; margin-top: .8rem; }
@media print { body { font-size: 11pt; max-width: none; } h2 { break-after: avoid; }
  img, tr { break-inside: avoid; } }
"""


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """Everything that a report shows.

    ``notices`` stand on top (synthetic data, a simulation); ``others`` are models trained
    otherwise and judged on the same test patients; ``site_names`` maps roster indices.
    """

    study: Study
    history: Sequence[tuple[RoundRecord, Figures | None]]
    result: StudyResult
    lineage: Sequence[tuple[int, str, str]]
    site_names: Mapping[int, str]
    notices: Sequence[str] = ()
    others: Mapping[str, Figures] = field(default_factory=dict)


def write_report(directory: Path, given: ReportInput) -> Path:
    """Write the report and its pictures; return the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [given.study.task.classes[number] for number in scored_classes(given.study)]
    seen = [(made.round, score) for made, score in given.history if score is not None]
    withdrawn = [made.round for made, score in given.history if made.withdrawn and score]
    sums = given.result.test_sums
    pictures = {
        "learning_curve.png": plots.learning_curve(
            [number for number, _ in seen],
            [score for _, score in seen],
            given.result.best.number,
            withdrawn,
        ),
        "roc.png": plots.roc(sums, names),
        "precision_recall.png": plots.precision_recall(sums, names),
        "calibration.png": plots.calibration(sums, names),
        "norms.png": plots.norms([made for made, _ in given.history]),
    }
    for name, picture in pictures.items():
        write_durably(directory / name, picture)
    write_durably(directory / "metrics.csv", _csv(given).encode())
    write_durably(directory / "metrics.json", _json(given).encode())
    write_durably(directory / "report.md", _markdown(given).encode())
    page = directory / "report.html"
    write_durably(page, _html(given, pictures).encode())
    return page


def _csv(given: ReportInput) -> str:
    rows, text = round_rows(given.history, given.site_names), io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(given: ReportInput) -> str:
    document = {
        "study": given.study.study.id,
        "study_digest": given.study.digest.hex(),
        "best_round": given.result.best.number,
        "stopped_early": given.result.stopped_early,
        "validation": asdict(given.result.validation),
        "test": asdict(given.result.test),
        "others": {name: asdict(one) for name, one in given.others.items()},
        "rounds": round_rows(given.history, given.site_names),
    }
    return json.dumps(_without_nan(document), indent=2, allow_nan=False)


def _without_nan(value: object) -> object:
    """JSON knows no NaN: an undefined figure becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FIGURE_NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "brier": "Brier score",
    "calibration_error": "calibration error (ECE)",
    "loss": "loss per record",
}


def _verdict(given: ReportInput) -> str:
    test = given.result.test
    if math.isnan(test.auroc):
        return (
            f"The federated model ({_which(given)}) was tested on {test.records} records, which "
            "do not hold both kinds of patients; AUROC is undefined on them."
        )
    return (
        f"The federated model reaches an AUROC of {test.auroc:.3f} (95 % interval "
        f"{test.auroc_low:.3f} to {test.auroc_high:.3f}) on {test.records} test records that no "
        f"hospital trained on. It is {_which(given)}."
    )


def _which(given: ReportInput) -> str:
    result = given.result
    if result.averaged:
        return f"the moving average of the versions up to {result.best.number}"
    return f"version {result.best.number} of {result.last.number}"


def _comparison(given: ReportInput) -> list[tuple[str, Figures]]:
    return [("federated", given.result.test), *given.others.items()]


def _markdown(given: ReportInput) -> str:
    lines = ["# " + " ".join(given.study.study.title.split()), ""]
    lines += [f"> **{notice}**\n" for notice in given.notices]
    lines += [_verdict(given), "", "| model | " + " | ".join(FIGURE_NAMES.values()) + " |"]
    lines.append("| --- " * (1 + len(FIGURE_NAMES)) + "|")
    for name, one in _comparison(given):
        values = " | ".join(f"{getattr(one, key):.3f}" for key in FIGURE_NAMES)
        lines.append(f"| {name} | {values} |")
    said = not_used(given.history, given.site_names) or ["Every round's update was used."]
    lines += ["", "## What was not used?", "", *(f"- {one}" for one in said)]
    lines += ["", "## The study", ""]
    lines += [f"**{question}** {answer}\n" for question, answer in explain(given.study)]
    return "\n".join(lines)


def _rejections(given: ReportInput) -> str:
    said = not_used(given.history, given.site_names)
    if not said:
        return "<p>Every round's update was used.</p>"
    return "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in said) + "</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="number">{html.escape(cell)}</{tag}>'
            if at >= numbers_from
            else f"<{tag}>{html.escape(cell)}</{tag}>"
            for at, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _html(given: ReportInput, pictures: Mapping[str, bytes]) -> str:
    def picture(name: str, what: str) -> str:
        data = base64.b64encode(pictures[name]).decode()
        return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'

    title = html.escape(given.study.study.title)
    notices = "".join(f'<p class="banner"><b>{html.escape(n)}</b></p>' for n in given.notices)
    compared = _table(
        ["model", *FIGURE_NAMES.values()],
        [
            [name, *(f"{getattr(one, key):.3f}" for key in FIGURE_NAMES)]
            for name, one in _comparison(given)
        ],
    )
    rounds = _table(HEAD, shown_rows(given.history, given.site_names))
    rejections = _rejections(given)
    facts = "".join(
        f"<dt>{html.escape(question)}</dt><dd>{html.escape(answer)}</dd>"
        for question, answer in explain(given.study)
    )
    lineage = _table(
        ["version", "SHA-256", "made from"],
        [[str(number), made, parent or "first weights"] for number, made, parent in given.lineage],
        numbers_from=9,
    )
    test = given.result.test
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{title}</h1>{notices}<p class="lead">{html.escape(_verdict(given))}</p>
<h2>How good is it?</h2>{compared}
<p>AUROC is computed from score histograms that were added up under masks; binning moves it by at
most {test.auroc_error:.4f}.</p>
<div class="pair">{picture("roc.png", "ROC curve on test patients")}
{picture("calibration.png", "Calibration on test patients")}
{picture("precision_recall.png", "Precision and recall on test patients")}</div>
<h2>How did it get there?</h2>{picture("learning_curve.png", "Validation AUROC and loss by round")}
{rounds}
<p><i>norm</i> is the length of the mean update, <i>allowed</i> the longest that hospitals keeping
to the study could make; <i>rounding</i> is a bound on the error of the masked sum relative to the
update, and to the privacy noise in it; round 0 added up the statistics for normalisation.</p>
<h2>What was not used?</h2>{rejections}
<div class="pair">{picture("norms.png", "Norm of the mean update and its bound by round")}</div>
<h2>What is it, and what was promised?</h2><dl>{facts}</dl>
<h2>Limits</h2><p>The model was trained for research. It has seen only the kinds of patients,
devices and habits of the hospitals that took part; elsewhere it has to be evaluated first. It
supports a decision and never takes one. Secure aggregation here awaits an external review.</p>
<h2>Where does it come from?</h2>{lineage}
</body></html>
"""
