"""The study file: what it accepts, how it complains, what stands for it."""

import dataclasses
from importlib.resources import files

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from hospitium_common.errors import ConfigError
from hospitium_common.schedule import groups
from hospitium_common.study import parse_study
from hospitium_common.study.cli import app
from hospitium_common.study.explain import explain, promise
from tests.federation_kit import study_of

KINDS = ("image_classification", "ehr_sequence_classification", "tabular_classification")


def template(kind: str = "image_classification") -> str:
    return (files("hospitium_common.study") / "templates" / f"{kind}.toml").read_text()


def edited(old: str, new: str, kind: str = "image_classification") -> str:
    text = template(kind)
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_templates_are_valid_and_explain_themselves(kind):
    study = parse_study(template(kind))
    assert study.task.kind == kind
    answers = dict(explain(study))
    assert "epsilon 8" in answers["What is promised?"]
    assert study.digest.hex() in answers["Which study is this exactly?"]


@dataclasses.dataclass(frozen=True)
class Mistake:
    old: str
    new: str
    complaint: str


MISTAKES = {
    "a typo in a key": Mistake(
        "clip_norm", "clip_nrom", "privacy.clip_nrom: unknown key; did you mean 'clip_norm'?"
    ),
    "an unknown choice": Mistake(
        'optimizer = "sgd" ', 'optimizer = "sdg" ', "training.optimizer = 'sdg': input should be"
    ),
    "a number out of range": Mistake(
        "epsilon = 8.0", "epsilon = -8.0", "privacy.epsilon = -8.0: input should be greater than 0"
    ),
    "no rounds at all": Mistake("rounds = 40", "", "rounds: expected this key, it is missing"),
    "two lengths of training": Mistake(
        "local_steps = 4 ",
        "local_epochs = 1\nlocal_steps = 3 ",
        "training: expected exactly one of local_epochs and local_steps",
    ),
    "a model for other data": Mistake(
        'name = "small_cnn" ', 'name = "lstm" ', "small_cnn, resnet18, densenet121"
    ),
    "privacy without a number": Mistake(
        "epsilon = 8.0", "", 'privacy: expected epsilon with mode = "dp", got none'
    ),
    "cohort upside down": Mistake(
        "maximum_sites = 16", "maximum_sites = 4", "cohort: expected minimum_sites ≤ maximum_sites"
    ),
    "fedprox without its pull": Mistake(
        'name = "fedavgm"', 'name = "fedprox"', "strategy: expected proximal_mu > 0"
    ),
    "one class only": Mistake(
        '["normal", "pneumonia"]', '["normal"]', "task: expected at least two exclusive classes"
    ),
    "broken TOML": Mistake("[cohort]", "[cohort", "not valid TOML"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_key_and_what_was_expected(case):
    mistake = MISTAKES[case]
    text = edited(mistake.old, mistake.new)
    if case == "a model for other data":
        text = text.replace("width = 16 ", "hidden = 16 ")
        text = text.replace("norm_groups", "# norm_groups")
        text = text.replace("weight_standardisation", "# weight_standardisation")
    with pytest.raises(ConfigError) as caught:
        parse_study(text, name="films.toml")
    assert str(caught.value).startswith("films.toml: ")
    assert mistake.complaint in str(caught.value)


def test_the_digest_ignores_comments_order_and_defaults_but_no_content():
    one = parse_study(template())
    bare = "\n".join(line.split(" #")[0] for line in template().splitlines() if line[:1] != "#")
    assert parse_study(bare.replace('labels = "exclusive"', "")).digest == one.digest
    assert parse_study(edited("epsilon = 8.0", "epsilon = 8.01")).digest != one.digest


def test_a_study_is_frozen():
    study = parse_study(template())
    with pytest.raises(Exception, match="frozen"):
        study.rounds = 3


def test_without_privacy_the_promise_says_so():
    text = edited("epsilon = 8.0", "").replace('mode = "dp"', 'mode = "none"')
    assert promise(parse_study(text)).startswith("No differential privacy")


def test_steps_follow_from_epochs_and_learning_rate_from_the_schedule():
    study = parse_study(template())
    assert study.steps_per_round(640) == 4
    assert study.learning_rate(1) == pytest.approx(1.0)
    assert study.learning_rate(21) == pytest.approx(0.5)
    study = parse_study(edited("local_steps = 4 ", "local_epochs = 1 "))
    assert study.steps_per_round(5120) == 10
    assert study.steps_per_round(5121) == 11
    assert study.sampling_rate(5120) == 0.1
    assert study.sampling_rate(500) == 1.0


def test_a_sampling_rate_takes_the_place_of_the_batch_size():
    text = edited("local_steps = 4 ", "local_epochs = 2 ").replace(
        "# sampling_rate", "sampling_rate"
    )
    study = parse_study(text)
    assert study.sampling_rate(17) == study.sampling_rate(17_000) == 0.1
    assert study.steps_per_round(17) == 20
    without = text.replace('mode = "dp"', 'mode = "none"').replace("epsilon = 8.0", "")
    with pytest.raises(ConfigError, match="sampling_rate"):
        parse_study(without)


def test_new_writes_a_study_that_check_explains_and_never_overwrites(tmp_path):
    run, file = CliRunner(), tmp_path / "study.toml"
    assert run.invoke(app, ["new", str(file), "--task", KINDS[1]]).exit_code == 0
    shown = run.invoke(app, ["check", str(file)])
    assert shown.exit_code == 0
    assert "What leaves a hospital?" in shown.output
    again = run.invoke(app, ["new", str(file)])
    assert isinstance(again.exception, ConfigError)
    assert "expected to write a new file" in str(again.exception)


def test_two_groups_are_refused_because_nobody_could_tell_which_is_bad():
    with pytest.raises(ValidationError, match="one group, or at least 3"):
        study_of(robustness={"groups": 2})


def test_groups_need_room_for_as_many_cohorts():
    with pytest.raises(ValidationError, match="maximum_sites ≥ 12 for 4 groups"):
        study_of(robustness={"groups": 4}, cohort={"minimum_sites": 3, "maximum_sites": 11})


def test_the_price_of_groups_is_said_in_plain_words():
    cohort = {"minimum_sites": 4, "maximum_sites": 12}
    answers = dict(explain(study_of(robustness={"groups": 3}, cohort=cohort)))
    assert (
        "sum of every group, of as few as 4 hospitals" in answers["What if a hospital does harm?"]
    )
    assert "hospitals of one group" in answers["What leaves a hospital?"]
    assert "hospitals of one group" in answers["What is promised?"]
    assert "in every group" in answers["Who has to be there?"]
    plain = dict(explain(study_of()))
    assert "the whole cohort" in plain["What is promised?"]
    assert "not excluded" in plain["What if a hospital does harm?"]


def test_a_site_is_in_one_group_whoever_else_is_there():
    cohort = {"minimum_sites": 3, "maximum_sites": 9}
    study = study_of(robustness={"groups": 3}, cohort=cohort)
    assert groups(range(1, 10), study) == ((1, 4, 7), (2, 5, 8), (3, 6, 9))
    assert groups([2, 5, 9, 4], study) == ((4,), (2, 5), (9,))
    assert groups([3, 1, 2], study_of()) == ((1, 2, 3),)
