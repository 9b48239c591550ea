"""A site refuses whatever its own rules do not allow, and says which rule."""

import pytest

from hospitium_client.policy import SitePolicy
from hospitium_common.errors import NotApproved
from hospitium_common.study import parse_study
from tests.test_study import edited, template


def policy_for(study, **rules) -> SitePolicy:
    return SitePolicy(approved=frozenset({study.digest.hex()}), **rules)


def test_an_approved_study_within_the_rules_passes():
    study = parse_study(template())
    policy_for(study).check(study)


REFUSALS = {
    "one privacy setting changed after approval": (
        "clip_norm = 1.0",
        "clip_norm = 2.0",
        "approved",
    ),
    "smaller cohort than the site wants": ("minimum_sites = 5", "minimum_sites = 3", "at least 5"),
    "more epsilon than the site gives": ("epsilon = 8.0", "epsilon = 9.0", "epsilon ≤ 8.0"),
    "no privacy": ('mode = "dp"', 'mode = "none"', "trains without it"),
    "records only": ('unit = "patient"', 'unit = "record"', "single records"),
    "a hospital would weigh too much": ("weight_cap = 10000", "weight_cap = 10001", "weight cap"),
    "too many rounds": ("rounds = 40 ", "rounds = 201 ", "at most 200 rounds"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_broken_rule_is_named(case):
    old, new, reason = REFUSALS[case]
    text = edited(old, new)
    if case == "no privacy":
        text = text.replace("epsilon = 8.0", "")
    study = parse_study(text)
    approved_as = parse_study(template()) if reason == "approved" else study
    with pytest.raises(NotApproved, match=reason):
        policy_for(approved_as).check(study)


def test_nothing_is_approved_by_default():
    with pytest.raises(NotApproved, match="approved"):
        SitePolicy().check(parse_study(template()))
