"""Distributed noise: one site's share is too little, the masked sum of all carries enough."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hospitium_client.policy import SitePolicy
from hospitium_client.protection.ledger import Ledger
from hospitium_client.work import SMALLEST_SHARE, SiteWork
from hospitium_common.entropy import seeded_entropy
from hospitium_common.errors import ConfigError, DataRejected, NotApproved, PeerProtocolError
from hospitium_common.models import build, tensors_of
from hospitium_common.normalisation import Normalisation
from hospitium_common.secagg.fixed_point import largest_value, quantise, step_sizes, sum_to_reals
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_common.study import Study
from hospitium_common.study.explain import promise
from hospitium_common.study.reading import validate
from hospitium_simulations.federation import SimulationOptions, simulate
from tests.federation_kit import Notes, hospital, hospitals, study_of

SITES, HONEST, RATE = 4, 3, 1.0
FALSE_ALARM = 1e-9


def shared_study(**changes) -> Study:
    """Four sites, three of them honest, everybody in every step."""
    return study_of(
        **{
            "model": {"name": "mlp", "hidden": [256]},
            "training": {
                "local_epochs": None, "local_steps": 1, "learning_rate": 0.1,
                "sampling_rate": RATE,
            },
            "privacy": {
                "mode": "dp", "epsilon": 8.0, "delta": 1e-4, "noise": "distributed",
                "honest_sites": HONEST,
            },
            **changes,
        }
    )  # fmt: skip


def works_of(study, directory, count=SITES, patients=60):
    """Return the sites' work, the first parameters and a normalisation."""
    works = []
    for number in range(1, count + 1):
        home = directory / str(number)
        home.mkdir(parents=True, exist_ok=True)
        works.append(SiteWork(study, hospital(number, patients), home))
    layout = works[0].layout
    totals = sum(work.statistics().tail for work in works)
    features = works[0].tail_layout.statistics(totals).features
    normalisation = Normalisation.from_totals(features, study).encode()
    return works, layout.flatten(tensors_of(build(study))), normalisation


def trained(work, first, normalisation, seed):
    return work.train(1, first, normalisation, seeded_entropy(seed))


def scale(study):
    """What a clipped sum is multiplied with before it is masked."""
    return study.training.learning_rate / (RATE * study.cohort.weight_cap)


def test_a_site_adds_a_share_and_all_sites_together_the_whole_noise(tmp_path):
    study = shared_study()
    works, first, normalisation = works_of(study, tmp_path)
    whole = works[0].plan(normalisation).noise_multiplier * study.privacy.clip_norm * scale(study)
    total = np.zeros(len(first))
    for number, work in enumerate(works):
        # The same patients in every step: the difference of two runs is noise and nothing else.
        one, two = (
            trained(work, first, normalisation, f"{run}/{number}".encode()).vector
            for run in ("a", "b")
        )
        noise = (one.astype(np.float64) - two) / math.sqrt(2)
        assert spread_fits(noise, whole / math.sqrt(HONEST))
        total += noise
    assert spread_fits(total, whole * math.sqrt(SITES / HONEST))
    assert not spread_fits(total, whole)  # the test would notice a wrong share


def spread_fits(values, deviation):
    """Whether a chi-square statistic lies where it does but for `FALSE_ALARM` of all runs."""
    from scipy.stats import chi2

    statistic = float((values**2).sum()) / deviation**2
    low, high = chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(values))
    return low < statistic < high


def test_one_patient_moves_the_sum_by_at_most_the_clipping_norm_at_every_site(tmp_path):
    study = shared_study()
    (work,), first, normalisation = works_of(study, tmp_path, count=1)
    records = hospital(1)
    everybody = trained(work, first, normalisation, b"k").vector
    for patient in np.unique(records.patients[work._split.train])[:5]:
        rest = records.take(np.flatnonzero(records.patients != patient))
        without = SiteWork(study, rest, tmp_path)
        gone = trained(without, first, normalisation, b"k").vector
        moved = float(np.linalg.norm(everybody.astype(np.float64) - gone))
        assert 0 < moved <= study.privacy.clip_norm * scale(study) * (1 + 1e-3)


def test_all_sites_calibrate_the_same_noise_whatever_their_size(tmp_path):
    study = shared_study()
    small = works_of(study, tmp_path / "small", count=1, patients=20)
    large = works_of(study, tmp_path / "large", count=1, patients=200)
    plans = [work.plan(normalisation) for (work,), _, normalisation in (small, large)]
    assert plans[0] == plans[1]
    assert plans[0].event.honest_sites == HONEST


def test_no_figure_but_the_sum_depends_on_a_share(tmp_path):
    study = shared_study()
    (work,), first, normalisation = works_of(study, tmp_path, count=1)
    sums = [
        work.tail_layout.training(trained(work, first, normalisation, seed).tail)
        for seed in (b"a", b"b")
    ]
    assert sums[0].second_moments == sums[1].second_moments == (0.0,) * len(work.layout.names)
    assert (sums[0].clipped, sums[0].dropped) == (0, 0)
    patients = len(np.unique(work._records.patients[work._split.train]))
    assert sums[0].weight == patients < len(work._split.train)


def test_a_site_that_the_cap_would_scale_down_takes_no_part(tmp_path):
    study = shared_study(cohort={"weight_cap": 10})
    (work,), first, normalisation = works_of(study, tmp_path, count=1)
    with pytest.raises(DataRejected, match="weight_cap"):
        trained(work, first, normalisation, b"k")


def test_a_quantiser_that_rounds_a_share_away_is_refused(tmp_path):
    study = shared_study()
    (work,), _, normalisation = works_of(study, tmp_path, count=1)
    share = work.plan(normalisation).own_noise * scale(study)
    work.check_share(1, normalisation, [share / SMALLEST_SHARE, share / 100])
    with pytest.raises(PeerProtocolError, match="finer"):
        work.check_share(1, normalisation, [share / 100, 1.01 * share / SMALLEST_SHARE])


POLICIES = st.builds(
    SecAggPolicy,
    study=st.just(bytes(32)), ring_bits=st.sampled_from([16, 24, 32]), n_max=st.integers(3, 20),
    m_min=st.just(3), weight_cap=st.just(1), tail_len=st.just(1),
)  # fmt: skip


@given(
    POLICIES,
    st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=5
    ),
)
def test_wrapped_words_add_up_to_the_wrapped_sum(policy, vectors):
    quantiser, size = Quantiser(lengths=(3,), bounds=(1.0,)), 1 << policy.ring_bits
    total, exact = np.zeros(3, np.int64), np.zeros(3)
    for vector in vectors:
        words, clipped = quantise(
            np.array(vector, np.float32), quantiser, policy, bytes(32), wraps=True
        )
        assert clipped == 0
        total += words.astype(np.int64)
        exact += np.array(vector, np.float32).astype(np.float64) * (largest_value(policy) - 1)
    distance = (total - exact) % size
    assert (np.minimum(distance, size - distance) <= len(vectors)).all()


def test_values_within_the_bound_are_encoded_alike_with_and_without_wrapping():
    policy = SecAggPolicy(
        study=bytes(32), ring_bits=24, n_max=4, m_min=3, weight_cap=1, tail_len=1
    )  # fmt: skip
    quantiser = Quantiser(lengths=(5,), bounds=(2.0,))
    values = np.linspace(-2, 2, 5).astype(np.float32)
    plain, _ = quantise(values, quantiser, policy, bytes(32))
    wrapped, _ = quantise(values, quantiser, policy, bytes(32), wraps=True)
    assert np.array_equal(plain, wrapped)
    step = step_sizes(quantiser, policy)[0]
    assert np.abs(sum_to_reals(plain, quantiser, policy) - values).max() <= step


def test_a_masked_federation_with_distributed_noise_equals_the_unmasked_one(tmp_path):
    study = shared_study(cohort={"ring_bits": 24})
    outcomes = [
        simulate(
            study, hospitals(SITES), tmp_path / str(masked), SimulationOptions(masked=masked),
            Notes(),
        )
        for masked in (True, False)
    ]  # fmt: skip
    masked, plain = (outcome.result.last.parameters for outcome in outcomes)
    assert 0 < np.abs(masked - plain).max() < 1e-3
    ledger = Ledger(tmp_path / "True" / "sites" / "hospital-1" / "ledger.sqlite")
    assert [event.honest_sites for event in ledger.events()] == [HONEST] * study.rounds
    ledger.close()


REFUSALS = {
    "a cohort smaller than the promise needs": ("privacy", "honest_sites", 4, "minimum_sites"),
    "nobody said how many are honest": ("privacy", "honest_sites", 1, "honest_sites"),
    "every site its own delta": ("privacy", "delta", None, "delta"),
    "every site its own sampling rate": ("training", "sampling_rate", None, "sampling_rate"),
    "two steps before the sum": ("training", "local_steps", 2, "local_steps = 1"),
    "a step that is no sum": ("training", "optimizer", "adam", "sgd"),
    "weights that decay with one share": ("training", "weight_decay", 0.1, "decay"),
    "layers that stay": ("strategy", "local_norms", True, "local_norms"),
    "an update scaled by its own norm": ("robustness", "update_norm", 1.0, "update_norm"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_study_whose_shares_would_not_add_up_is_refused(case):
    section, key, value, expected = REFUSALS[case]
    document = shared_study().model_dump(mode="json")
    document[section][key] = value
    with pytest.raises(ConfigError, match=expected):
        validate(Study, document, "study.toml")


def test_a_site_refuses_it_unless_its_own_rules_allow_it():
    study = shared_study()
    rules = {"approved": frozenset({study.digest.hex()}), "minimum_sites": 3}
    with pytest.raises(NotApproved, match="3 honest sites"):
        SitePolicy(**rules).check(study)
    SitePolicy(**rules, allow_distributed_noise=True).check(study)


def test_the_explanation_says_on_whom_the_promise_depends():
    assert "at least 3 of the hospitals in it keep to the protocol" in promise(shared_study())
    assert "noise added inside the hospital" in promise(study_of(privacy=LOCAL))


LOCAL = {"mode": "dp", "epsilon": 8.0}
