"""The report: one page that needs nothing else, says what it was told, and nothing more."""

import base64
import csv
import io
import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from hospitium_common.errors import HospitiumError
from hospitium_common.metrics import EvaluationSums, evaluation_sums
from hospitium_server.aggregation import OptimizerState
from hospitium_server.evaluation import Figures, figures
from hospitium_server.registry import GroupRecord, RoundRecord, Version
from hospitium_server.report import ReportInput, write_report
from hospitium_server.rounds import StudyResult
from tests.federation_kit import private_study_of, study_of

NASTY = "<script>alert(\"x\")</script> & <b>ill</b> 'or' well"
NOTICES = ("Synthetic data: <no> patient is in it.", "A simulation on one machine.")
PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = ("learning_curve.png", "roc.png", "precision_recall.png", "calibration.png", "norms.png")
VOID = {"meta", "img", "br", "link", "input", "hr"}


def sums(seed, study, records=300) -> EvaluationSums:
    generator = np.random.default_rng(seed)
    classes = len(study.task.classes)
    targets = generator.integers(0, classes, records)
    logits = generator.normal(size=(records, classes)) + np.eye(classes)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = -np.log(probabilities[np.arange(records), targets])
    return evaluation_sums(probabilities, targets, losses, study)


def record(number, **more) -> RoundRecord:
    made = RoundRecord(
        round=number, survivors=(1, 2, 3, 4), attempts=1, seconds=12.34 + number,
        bytes_sent=111_000 * number, bytes_received=2_340_000, update_norm=0.1 * number,
        quantisation_error=0.00123, clipped_fraction=0.0, norm_bound=2.5 if number else 0.0,
    )  # fmt: skip
    return replace(made, **more)


def report_input(study, *, rounds=4, test_sums=None, **more) -> ReportInput:
    test_sums = sums(99, study) if test_sums is None else test_sums
    versions = [
        Version(
            number=number, parameters=np.zeros(3, np.float32),
            optimizer=OptimizerState(
                first=np.zeros(0), second=np.zeros(0), average=np.zeros(0)
            ), normalisation=b"",
            record=record(number),
        )
        for number in range(rounds + 1)
    ]  # fmt: skip
    troubled = {
        "survivors": (1, 3, 4),
        "missing": {2: "no answer before the deadline", 9: "refused: <its> policy"},
        "attempts": 2,
    }
    records = [record(n, **(troubled if n == 2 else {})) for n in range(rounds + 1)]
    given = ReportInput(
        study=study,
        history=[(made, figures(sums(made.round, study), study)) for made in records],
        result=StudyResult(
            last=versions[-1], best=versions[-2], averaged=False,
            validation=figures(sums(50, study), study), test=figures(test_sums, study),
            test_sums=test_sums, stopped_early=False,
        ),
        lineage=[(n, f"{n:064x}", f"{n - 1:064x}" if n else "") for n in range(rounds + 1)],
        site_names={1: "north", 2: "south & east", 3: "west", 4: "centre"},
        notices=NOTICES,
        others={
            "pooled": figures(sums(7, study), study),
            "only north": figures(sums(8, study), study),
        },
    )  # fmt: skip
    return replace(given, **more)


class Page(HTMLParser):
    """A page taken apart as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.banners: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.balanced = True
        self.feed(text)
        self.close()
        self.balanced = self.balanced and not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif dict(attrs).get("class") == "banner":
            self.banners.append("")

    def handle_endtag(self, tag):
        self.balanced = self.balanced and bool(self._open) and self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self._open[-2:] == ["p", "b"] and self.banners:
            self.banners[-1] += data


@pytest.fixture(scope="module")
def given():
    return report_input(private_study_of(study={"title": NASTY, "purpose": "R&D <only>"}))


@pytest.fixture(scope="module")
def written(given, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "made" / "by itself"
    return write_report(directory, given)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The report of three classes, without differential privacy and without notices."""
    study = study_of(task={"classes": ["well", "ill", "very <ill>"]})
    return write_report(tmp_path_factory.mktemp("plain"), report_input(study, notices=()))


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text())


def test_the_page_is_well_formed_and_named_after_the_study(written, page):
    assert written.name == "report.html"
    assert written.read_text().startswith("<!doctype html>")
    assert page.balanced
    assert page.tags[0] == ("html", {"lang": "en"})
    assert page.text.count(NASTY) >= 2  # the browser's tab and the heading


def test_the_page_loads_nothing_from_anywhere(written, page):
    text = written.read_text()
    assert not re.search(r"https?:|@import|url\(", text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert attributes["alt"]
        else:
            assert "src" not in attributes


def test_a_title_cannot_bring_its_own_markup(written, page):
    assert "<script" not in written.read_text()
    assert "&lt;script&gt;" in written.read_text()
    assert "R&D <only>" in page.text


def test_the_pictures_in_the_page_are_the_ones_beside_it(written, page):
    shown = {
        base64.b64decode(attributes["src"].partition(",")[2])
        for tag, attributes in page.tags
        if tag == "img"
    }
    beside = {(written.parent / name).read_bytes() for name in PICTURES}
    assert shown == beside
    assert len(beside) == 5
    for picture in beside:
        assert picture.startswith(PNG)
        assert len(picture) > 5000


def test_every_notice_stands_above_the_first_figure(written, page):
    assert page.banners == list(NOTICES)
    text = written.read_text()
    assert text.rindex('class="banner"') < text.index("AUROC")


def test_without_notices_there_is_no_banner(plain):
    page = Page(plain.read_text())
    assert page.banners == []
    assert not [1 for _, attributes in page.tags if attributes.get("class") == "banner"]


def test_the_figures_shown_are_the_figures_given(given, page):
    head, *rows = page.tables[0]
    assert head == [
        "model", "AUROC", "AUPRC", "accuracy", "Brier score", "calibration error (ECE)",
        "loss per record",
    ]  # fmt: skip
    compared = {"federated": given.result.test, **given.others}
    assert [row[0] for row in rows] == list(compared)
    for row, one in zip(rows, compared.values(), strict=True):
        exact = (one.auroc, one.auprc, one.accuracy, one.brier, one.calibration_error, one.loss)
        for cell, value in zip(row[1:], exact, strict=True):
            assert abs(float(cell) - value) <= 0.0005 + 1e-9


def test_the_first_sentence_says_how_good_it_is_and_how_sure_that_is(given, page):
    test = given.result.test
    assert (
        f"AUROC of {test.auroc:.3f} (95 % interval {test.auroc_low:.3f} to {test.auroc_high:.3f}) "
        "on 300 test records" in page.text
    )
    assert "version 3 of 4" in page.text
    assert f"{test.auroc_error:.4f}" in page.text


def test_the_rounds_tell_who_was_missing_and_why(given, page):
    head, *rows = page.tables[1]
    assert head[:7] == ["who was missing", "round", "sites", "attempts", "AUROC", "norm", "allowed"]
    assert [row[1] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[1][0] == "nobody"
    assert rows[2][0] == "south & east: no answer before the deadline; 9: refused: <its> policy"
    assert rows[2][2:4] == ["3", "2"]
    for row, (made, seen) in zip(rows, given.history, strict=True):
        assert float(row[4]) == pytest.approx(seen.auroc, abs=5.1e-4)
        norms = [f"{made.update_norm:.3g}", "2.5"] if made.round else ["", ""]
        assert row[5:] == [*norms, "0.12%", "2.34 MB", f"{made.seconds:.1f} s"]


HAPPENED = {
    1: {"rejected": "a mean update of <norm> 9", "model_of": 0, "norm_bound": 0.0},
    2: {"withdrawn": "validation AUROC went from 0.8 to 0.5"},
    3: {"lost": True, "model_of": 1, "norm_bound": 0.0},
    4: {
        "groups": (
            GroupRecord(survivors=(1, 3), weight=9, norm=1.0, norm_bound=2.5),
            GroupRecord(survivors=(2, 4), rejected="a total weight of 3"),
        )
    },
}  # fmt: skip


def test_what_was_not_used_is_listed_with_its_reason(tmp_path):
    study = study_of()
    given = report_input(study)
    history = [
        (replace(made, **HAPPENED.get(made.round, {})), score) for made, score in given.history
    ]
    page = Page(write_report(tmp_path, replace(given, history=history)).read_text())
    said = (
        "Round 1 was rejected: a mean update of <norm> 9. It kept the model of 0.",
        "Round 2 was withdrawn: validation AUROC went from 0.8 to 0.5.",
        "Round 3 was lost: the coordinator was cut off while it unmasked the sum. It kept the",
        "Round 4, group of south & east, centre: a total weight of 3.",
    )
    for sentence in said:
        assert sentence in page.text
        assert sentence in (tmp_path / "report.md").read_text()
    rows = strictly((tmp_path / "metrics.json").read_text())["rounds"]
    assert [row["outcome"] for row in rows] == ["used", "rejected", "withdrawn", "lost", "used"]
    assert [row["model_of"] for row in rows] == [0, 0, 2, 1, 4]
    assert rows[4]["groups"] == 2
    assert rows[4]["groups_rejected"] == 1
    assert [row[5] for row in page.tables[1][1:]] == ["", "", "0.2", "", "0.4"]


def test_a_study_of_which_all_was_used_says_so(page):
    assert "Every round's update was used." in page.text


def test_the_lineage_is_shown_in_full(given, page):
    rows = page.tables[2][1:]
    assert rows == [
        [str(number), made, parent or "first weights"] for number, made, parent in given.lineage
    ]
    assert rows[0][2] == "first weights"


def test_the_page_says_what_was_promised_and_which_study_it_was(given, page):
    assert "epsilon 8" in page.text
    assert given.study.digest.hex() in page.text
    assert "external review" in page.text


def test_a_study_without_differential_privacy_does_not_look_as_if_it_had_any(plain):
    page = Page(plain.read_text())
    assert "No differential privacy" in page.text
    assert "epsilon" not in page.text


def test_the_csv_has_every_round_in_full_precision(given, written):
    rows = list(csv.DictReader(io.StringIO((written.parent / "metrics.csv").read_text())))
    assert [int(row["round"]) for row in rows] == [0, 1, 2, 3, 4]
    for row, (made, seen) in zip(rows, given.history, strict=True):
        assert int(row["sites"]) == len(made.survivors)
        assert int(row["attempts"]) == made.attempts
        assert int(row["bytes_sent"]) == made.bytes_sent
        assert int(row["bytes_received"]) == made.bytes_received
        for name in (
            "update_norm",
            "norm_bound",
            "quantisation_error",
            "clipped_fraction",
            "seconds",
        ):
            assert float(row[name]) == getattr(made, name)
        assert float(row["auroc"]) == seen.auroc
        assert float(row["loss"]) == seen.loss
    assert rows[2]["missing"].startswith("south & east: no answer")


def strictly(text):
    """JSON as everybody reads it, not only Python: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_json_holds_the_figures_that_were_given(given, written):
    told = strictly((written.parent / "metrics.json").read_text())
    assert told["study"] == "small-study"
    assert told["study_digest"] == given.study.digest.hex()
    assert told["best_round"] == 3
    assert told["stopped_early"] is False
    assert Figures(**told["test"]) == given.result.test
    assert Figures(**told["validation"]) == given.result.validation
    assert told["others"] == {name: asdict(one) for name, one in given.others.items()}
    assert [row["auroc"] for row in told["rounds"]] == [seen.auroc for _, seen in given.history]


def test_the_markdown_has_the_notices_and_the_same_table(given, written):
    text = (written.parent / "report.md").read_text()
    assert all(f"> **{notice}**" in text for notice in NOTICES)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {7}
    assert [row[0] for row in rows[2:]] == ["federated", "pooled", "only north"]
    assert rows[2][1] == f"{given.result.test.auroc:.3f}"
    assert text.index("**Synthetic") < text.index("AUROC")


def test_several_classes_are_each_drawn_and_averaged(plain):
    assert all((plain.parent / name).read_bytes().startswith(PNG) for name in PICTURES)
    told = strictly((plain.parent / "metrics.json").read_text())
    assert 0.5 < told["test"]["auroc"] < 1
    assert "very <ill>" in Page(plain.read_text()).text


def test_undefined_figures_make_a_report_that_does_not_pretend(tmp_path):
    study = study_of()
    undefined = figures(EvaluationSums.nothing(study), study)
    given = report_input(study, test_sums=EvaluationSums.nothing(study), rounds=1)
    given = replace(given, history=[(record(0), None), (record(1), undefined)])
    page = Page(write_report(tmp_path, given).read_text())
    told = strictly((tmp_path / "metrics.json").read_text())
    assert told["test"]["auroc"] is None
    assert told["rounds"][0]["auroc"] is None
    assert page.tables[1][1][4] == ""
    assert "0.000 to 1.000" not in page.text
    assert math.isnan(undefined.auroc_low)


def test_a_report_of_one_round_whose_model_is_not_yet_judged_is_drawn(tmp_path):
    study = study_of()
    given = replace(report_input(study, rounds=1), history=[(record(0), None), (record(1), None)])
    page = Page(write_report(tmp_path, given).read_text())
    assert [row[4] for row in page.tables[1][1:]] == ["", ""]
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(PNG)


def test_a_second_report_takes_the_place_of_the_first(given, written, tmp_path):
    (tmp_path / "report.html").write_bytes(b"an older page")
    # the same input makes the same page, picture by picture
    assert write_report(tmp_path, given).read_bytes() == written.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_report_that_cannot_be_written_says_so_and_keeps_the_old_one(
    given, tmp_path, monkeypatch
):
    (tmp_path / "report.html").write_bytes(b"an older page")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hospitium_common.durable.os.fsync", full)
    with pytest.raises(HospitiumError, match="No space left on device"):
        write_report(tmp_path, given)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == b"an older page"
