"""What federated training is compared with: one hospital alone, and all data in one place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hospitium_client.data.split import split
from hospitium_client.work import SiteWork
from hospitium_common.entropy import seeded_entropy
from hospitium_server.evaluation import Figures, figures

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from hospitium_client.data.records import Records
    from hospitium_common.metrics import EvaluationSums
    from hospitium_common.study import Study


def baselines(
    study: Study,
    hospitals: Mapping[str, Records],
    first: np.ndarray[tuple[int], np.dtype[np.float32]],
    normalisation: bytes,
    directory: Path,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Figures]:
    """Train each hospital alone, and all of them pooled; judge all on every test patient.

    Each makes the study's rounds with the study's optimizer, privacy and schedule, on the
    federation's normalisation. Patients keep the part (train, test) that they have in it.
    """
    judges = [SiteWork(study, records, directory) for records in hospitals.values()]
    found = {}
    for name, records in {**hospitals, "pooled": _pooled(study, hospitals)}.items():
        label = name if name == "pooled" else f"only {name}"
        work = SiteWork(study, records, directory, on_step=on_step)
        seed = f"baseline/{study.study.seed}/{name}".encode()
        parameters = _train(study, work, first, normalisation, seed)
        found[label] = _judge(study, judges, parameters, normalisation)
    return found


def _train(
    study: Study,
    work: SiteWork,
    parameters: np.ndarray[tuple[int], np.dtype[np.float32]],
    normalisation: bytes,
    seed: bytes,
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    entropy = seeded_entropy(seed)
    for number in range(1, study.rounds + 1):
        part = work.train(
            number, parameters, normalisation,
            lambda label, number=number: entropy(f"{label}/{number}"),  # type: ignore[misc]  # mypy cannot type a default
        )  # fmt: skip
        weight = work.tail_layout.training(part.tail).weight / study.cohort.weight_cap
        parameters = (parameters + part.vector / weight).astype(np.float32)
    return parameters


def _judge(
    study: Study,
    judges: list[SiteWork],
    parameters: np.ndarray[tuple[int], np.dtype[np.float32]],
    normalisation: bytes,
) -> Figures:
    total: EvaluationSums | None = None
    for judge in judges:
        tail = judge.evaluate(parameters, normalisation).tail
        sums = judge.tail_layout.evaluation(tail).test
        if total is None:
            total = sums
        else:
            total = replace(
                total,
                records=total.records + sums.records,
                loss=total.loss + sums.loss,
                brier=total.brier + sums.brier,
                confusion=total.confusion + sums.confusion,
                histogram=total.histogram + sums.histogram,
            )
    assert total is not None  # noqa: S101 - a federation has sites
    return figures(total, study)


def _pooled(study: Study, hospitals: Mapping[str, Records]) -> Records:
    """Put all records into one place; a patient id may stand for another person elsewhere."""
    parts = list(hospitals.values())
    names = [
        np.array([f"{site}/{patient}" for patient in records.patients])
        for site, records in hospitals.items()
    ]
    splits = [_split_names(study, records) for records in parts]
    return replace(
        parts[0],
        values=np.concatenate([p.values for p in parts]),
        statics=np.concatenate([p.statics for p in parts]),
        targets=np.concatenate([p.targets for p in parts]),
        patients=np.concatenate(names),
        sites=None,
        split=np.concatenate(splits),
    )


def _split_names(study: Study, records: Records) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    cut = split(records, study)
    names = np.full(len(records), "train", dtype="<U10")
    names[cut.validation], names[cut.test] = "validation", "test"
    return names
