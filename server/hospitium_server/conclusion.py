"""The end of a study: its best model as a file, and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import safetensors.numpy

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError, HospitiumError
from hospitium_common.first_model import load_first_model
from hospitium_common.metrics import TailLayout
from hospitium_server.registry import Registry
from hospitium_server.report import ReportInput, write_report
from hospitium_server.rounds import StudyRun

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hospitium_common.parameters import Layout
    from hospitium_common.study import Study
    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord
    from hospitium_server.rounds import StudyResult
    from hospitium_server.secure_sum import RoundPlan, RoundTotals
    from hospitium_server.studies import StudyFolder


def conclude(
    folder: StudyFolder,
    study: Study,
    layout: Layout,
    registry: Registry,
    result: StudyResult,
    names: Mapping[int, str],
) -> Path:
    """Write model.safetensors and the report of a finished study; return the report's page."""
    named = layout.unflatten(result.best.parameters)
    metadata = {"study": study.digest.hex(), "round": str(result.best.number)}
    write_durably(folder.path / "model.safetensors", safetensors.numpy.save(named, metadata))
    return write_report(
        folder.path,
        ReportInput(
            study=study, history=registry.history(), result=result, lineage=registry.lineage(),
            site_names=names,
        ),
    )  # fmt: skip


def write_again(folder: StudyFolder, names: Mapping[int, str]) -> Path:
    """Write the report of a finished study from its registry, without asking any site.

    Raises:
        ConfigError: the study is not finished.
    """
    study = folder.study()
    layout, first = load_first_model(folder.first_model, study)
    registry = Registry(folder.path, study.digest, layout.digest)
    try:
        run = StudyRun(
            study=study, layout=layout, tail_layout=TailLayout.of(study, layout),
            registry=registry, summing=_nobody, watcher=_Silent(),
        )  # fmt: skip
        return conclude(folder, study, layout, registry, run.run(first), names)
    finally:
        registry.close()


def _nobody(plan: RoundPlan) -> RoundTotals:
    raise ConfigError(
        f"round {plan.number}: expected a finished study, got one with this round still to come; "
        "`hospitium study watch` shows how far it is"
    )


class _Silent:
    """Nobody watches."""

    def on_round(self, record: RoundRecord, received: Figures) -> None:
        raise HospitiumError(f"expected no round to be run for a report, got {record.round}")
