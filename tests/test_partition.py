"""Cutting one data set into hospitals: nobody is lost, nobody is divided."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hospitium_client.data.records import Records
from hospitium_common.errors import ConfigError, DataRejected
from hospitium_simulations.partition import Partition, cut


def people(owners, targets=None, sites=None) -> Records:
    """Records of these patients, in any order; each record's value is its own number."""
    count = len(owners)
    return Records(
        values=np.arange(count, dtype=np.float32)[:, None],
        statics=np.zeros((count, 0), np.float32),
        targets=np.zeros(count, np.int64) if targets is None else np.array(targets),
        patients=np.array([f"p{owner}" for owner in owners]),
        sites=None if sites is None else np.array(sites),
    )


def visits(generator: np.random.Generator, patients: int) -> Records:
    """Everybody comes once to four times, in a jumble; a third are ill."""
    owners = generator.permutation(np.repeat(np.arange(patients), generator.integers(1, 5)))
    return people(owners, (owners % 3 == 0).astype(np.int64))


@given(
    kind=st.sampled_from(["iid", "dirichlet:0.3", "dirichlet:5", "quantity:0.5", "quantity:4"]),
    patients=st.integers(20, 120),
    sites=st.integers(3, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_record_has_exactly_one_site_and_patients_stay_together(kind, patients, sites, seed):
    records = visits(np.random.default_rng(seed), patients)
    try:
        parts = cut(records, Partition.parse(kind), sites, seed)
    except ConfigError as error:
        assert "would get no patient" in str(error)
        assert kind != "iid"
        return
    assert list(parts) == [f"site-{number}" for number in range(1, sites + 1)]
    together = np.concatenate(list(parts.values()))
    assert sorted(together) == list(range(len(records)))
    names = [set(records.patients[index]) for index in parts.values()]
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names)) == patients


@given(patients=st.integers(3, 200), sites=st.integers(3, 8), seed=st.integers(0, 2**32 - 1))
def test_an_even_cut_differs_by_one_patient_at_most(patients, sites, seed):
    records = people(range(max(patients, sites)))
    sizes = [len(index) for index in cut(records, Partition(kind="iid"), sites, seed).values()]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["iid", "dirichlet:1", "quantity:2"])
def test_the_same_seed_cuts_the_same_and_another_cuts_otherwise(kind):
    records = people(range(200), [number % 2 for number in range(200)])
    first, again, other = (cut(records, Partition.parse(kind), 3, seed) for seed in (1, 1, 2))
    assert all((first[site] == again[site]).all() for site in first)
    assert any(list(first[site]) != list(other[site]) for site in first)


def spread(partition: str, figure) -> float:
    """How much a figure differs between sites, over twenty cuts."""
    records = people(range(2000), [int(number % 4 == 0) for number in range(2000)])
    spreads = []
    for seed in range(20):
        try:
            parts = cut(records, Partition.parse(partition), 4, seed)
        except ConfigError:
            continue
        spreads.append(np.std([figure(records.take(index)) for index in parts.values()]))
    assert len(spreads) > 5
    return float(np.mean(spreads))


def test_a_smaller_alpha_makes_case_mix_and_size_more_uneven():
    def ill(records):
        return records.targets.mean()

    assert spread("dirichlet:100", ill) < 0.1 < spread("dirichlet:0.5", ill)
    assert spread("iid", ill) < spread("dirichlet:1", ill)
    assert spread("quantity:100", len) < 100 < spread("quantity:0.5", len)
    assert spread("quantity:1", ill) < 0.1 < spread("dirichlet:1", ill)


def test_several_labels_at_once_are_cut_too():
    targets = np.eye(3, dtype=np.float32)[np.arange(90) % 3]
    parts = cut(people(range(90), targets), Partition(kind="dirichlet", alpha=5), 3, 1)
    assert sum(map(len, parts.values())) == 90


def test_sites_that_the_data_names_are_kept():
    records = people(range(6), sites=["b", "a", "c", "a", "b", "b"])
    parts = cut(records, Partition(kind="site"), 99, 0)
    assert {name: index.tolist() for name, index in parts.items()} == {
        "a": [1, 3],
        "b": [0, 4, 5],
        "c": [2],
    }


def test_a_patient_at_two_sites_is_refused_by_rows():
    records = people([1, 2, 3, 4, 2], sites=["a", "b", "c", "a", "c"])
    with pytest.raises(DataRejected, match=r"one in two \(rows 3 and 6 of the table") as caught:
        cut(records, Partition(kind="site"), 3, 0)
    assert "p2" not in str(caught.value)


@pytest.mark.parametrize(
    ("sites", "complaint"),
    [(None, "expected data that names its sites"), (["a", "b"] * 3, "at least 3 sites")],
)
def test_data_without_enough_sites_cannot_be_cut_along_them(sites, complaint):
    with pytest.raises(ConfigError, match=complaint):
        cut(people(range(6), sites=sites), Partition(kind="site"), 3, 0)


def test_more_sites_than_patients_are_refused():
    with pytest.raises(ConfigError, match="site 3 would get no patient under iid"):
        cut(people([1, 1, 2, 2]), Partition(kind="iid"), 3, 0)


@pytest.mark.parametrize("text", ["site", "iid", "dirichlet:0.5", "quantity:2"])
def test_a_partition_reads_as_it_is_written(text):
    assert str(Partition.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "sites", "iid:1", "site:2", "dirichlet:0", "dirichlet:-1", "dirichlet:x", "dirichlet:1:2"],
)
def test_a_partition_of_another_kind_is_refused(text):
    with pytest.raises(ConfigError, match="expected a partition of site, iid"):
        Partition.parse(text)


@pytest.mark.parametrize("alpha", ["nan", "inf"])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(ConfigError, match="quantity:ALPHA"):
        Partition.parse(f"quantity:{alpha}")


def test_pooled_data_stays_in_one_place():
    records = visits(np.random.default_rng(3), 20)
    parts = cut(records, Partition.parse("pooled"), 4, 1)
    assert list(parts) == ["pooled"]
    assert len(parts["pooled"]) == len(records)
