"""Synthetic hospitals: marked as such, different from each other, learnable but not trivially."""

import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from hospitium_client.data.loading import load_records
from hospitium_client.data.prepare import feature_sums, prepare
from hospitium_client.data.records import Records
from hospitium_common.models import build
from hospitium_common.normalisation import Normalisation
from hospitium_common.study import Study, load_study
from hospitium_simulations.synthetic_ehr import write_stays
from hospitium_simulations.synthetic_imaging import write_films

WRITERS = {"films": write_films, "stays": write_stays}
SITES, PATIENTS = 4, 120


def study_of(kind: str) -> Study:
    return load_study(Path(str(files("hospitium_simulations") / "scenarios" / f"{kind}.toml")))


@pytest.fixture(scope="module", params=list(WRITERS))
def made(request, tmp_path_factory) -> tuple[str, Path, Records]:
    """A kind of data, where it was written, and what a hospital reads there."""
    directory = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](directory, sites=SITES, patients_per_site=PATIENTS, seed=1)
    return request.param, directory, load_records(directory, study_of(request.param))


def test_everything_says_that_it_is_synthetic(made):
    kind, directory, records = made
    assert records.synthetic
    assert all(patient.startswith("SYNTHETIC-") for patient in records.patients)
    text = (directory / "dataset.toml").read_text()
    assert text.startswith(f"# SYNTHETIC {kind}")
    assert "no patient stands behind them" in text
    assert tomllib.loads(text)["synthetic"] is True
    written = [path for path in directory.rglob("*") if path.is_file()]
    for path in written:
        if path.suffix == ".png":
            assert path.name.startswith("SYNTHETIC-")
            with Image.open(path) as image:
                assert (image.mode, image.size) == ("L", (32, 32))
        elif path.suffix == ".csv":
            table = pd.read_csv(path)
            who = table.get("patient", table.get("stay"))
            assert who.str.startswith("SYNTHETIC-").all()
    assert {path.suffix for path in written} <= {".png", ".csv", ".toml"}


def test_every_hospital_has_its_patients_and_some_come_twice(made):
    _, _, records = made
    assert sorted(set(records.sites)) == [f"hospital-{n}" for n in range(1, SITES + 1)]
    for site in set(records.sites):
        part = records.take(np.flatnonzero(records.sites == site))
        assert part.patient_count == PATIENTS
        assert PATIENTS * 1.05 < len(part) < PATIENTS * 1.4


def test_hospitals_differ_in_case_mix_and_in_what_they_measure(made):
    _, _, records = made
    parts = [records.take(np.flatnonzero(records.sites == site)) for site in set(records.sites)]
    ill = [part.targets.mean() for part in parts]
    assert 0.1 < min(ill) < max(ill) < 0.75
    assert np.ptp(ill) > 0.1
    if records.values.ndim == 4:
        contrast = [part.values.std(axis=(2, 3)).mean() for part in parts]
        assert max(contrast) > 1.1 * min(contrast)
    else:
        measured = [(~np.isnan(part.values)).mean() for part in parts]
        assert max(measured) > 1.1 * min(measured)


def test_the_same_seed_makes_the_same_and_another_makes_others(tmp_path):
    for writer in WRITERS.values():
        tables = []
        for name, seed in (("one", 1), ("two", 1), ("three", 2)):
            directory = tmp_path / writer.__name__ / name
            writer(directory, sites=3, patients_per_site=4, seed=seed)
            found = sorted(path for path in directory.rglob("*") if path.is_file())
            tables.append([path.read_bytes() for path in found])
        assert tables[0] == tables[1] != tables[2]


def halves(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Record numbers to train on and to judge on, by patient."""
    _, owner = np.unique(records.patients, return_inverse=True)
    held_out = np.random.default_rng(0).random(owner.max() + 1) < 0.3
    return np.flatnonzero(~held_out[owner]), np.flatnonzero(held_out[owner])


def linear_auroc(inputs: np.ndarray, targets: np.ndarray, train, test) -> float:
    """The best of four ridge penalties, which flatters the linear model."""
    scaler = StandardScaler().fit(inputs[train])
    scores = []
    for strength in (1e-4, 1e-3, 1e-2, 1e-1):
        model = LogisticRegression(C=strength, max_iter=300)
        model.fit(scaler.transform(inputs[train]), targets[train])
        found = model.decision_function(scaler.transform(inputs[test]))
        scores.append(roc_auc_score(targets[test], found))
    return max(scores)


def trained_auroc(study: Study, samples, train, test, *, epochs: int, rate: float) -> float:
    """The study's own model, trained on everything at once without privacy."""
    model, generator = build(study), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train), generator=generator).split(32):
            index = torch.from_numpy(train)[batch]
            loss = torch.nn.functional.cross_entropy(
                model(samples.inputs[index]), samples.targets[index]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = model(samples.inputs[test])[:, 1].numpy()
    return roc_auc_score(samples.targets[test], scores)


def test_a_linear_model_sees_something_in_films_and_the_cnn_more(tmp_path):
    study = study_of("films")
    write_films(tmp_path, sites=3, patients_per_site=350, seed=5)
    records = load_records(tmp_path, study)
    train, test = halves(records)
    linear = linear_auroc(records.values.reshape(len(records), -1), records.targets, train, test)
    assert 0.7 < linear < 0.88
    figures = Normalisation.from_totals(feature_sums(records.take(train), study), study)
    small = study.model_copy(update={"model": study.model.model_copy(update={"width": 8})})
    samples = prepare(records, figures, small)
    assert trained_auroc(small, samples, train, test, epochs=8, rate=0.01) > linear + 0.05


def test_severity_can_be_learnt_from_stays_but_chance_stays_chance(tmp_path):
    study = study_of("stays")
    write_stays(tmp_path, sites=3, patients_per_site=250, seed=5)
    records = load_records(tmp_path, study)
    train, test = halves(records)
    figures = Normalisation.from_totals(feature_sums(records.take(train), study), study)
    inputs = prepare(records, figures, study).inputs.numpy()
    last = inputs[:, -1]  # the last values, their ages, and the age in years
    assert 0.65 < linear_auroc(last, records.targets, train, test) < 0.95
    shuffled = np.random.default_rng(0).permutation(records.targets)
    nothing = replace(records, targets=shuffled)
    assert 0.35 < linear_auroc(last, nothing.targets, train, test) < 0.65
