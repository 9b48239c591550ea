"""`hospitium simulate`: a federation in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from hospitium_client.data.loading import load_records
from hospitium_common.errors import ConfigError
from hospitium_common.study import Study, load_study
from hospitium_common.study.explain import promise
from hospitium_server.report import ReportInput, write_report
from hospitium_simulations.faults import Fault
from hospitium_simulations.federation import SimulationOptions
from hospitium_simulations.federation import simulate as run_simulation
from hospitium_simulations.partition import Partition, cut
from hospitium_simulations.poison import Poison
from hospitium_simulations.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hospitium_client.data.records import Records
    from hospitium_server.evaluation import Figures

SIMULATION_NOTICE = (
    "Simulation: all hospitals ran on one machine, and their noise follows from the study's seed. "
    "It shows what the protocol does and costs; it protected nobody."
)
SYNTHETIC_NOTICE = "Synthetic data: no patient stands behind any record."


def simulate(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    data: Annotated[Path, typer.Option(help="Data directory with a dataset.toml.")],
    sites: Annotated[int, typer.Option(help="How many hospitals to cut the data into.")] = 4,
    partition: Annotated[
        str,
        typer.Option(
            help="site (as the data says), iid, dirichlet:ALPHA, quantity:ALPHA, or pooled: all "
            "data in one place, with --no-masking."
        ),
    ] = "iid",
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    name: Annotated[str, typer.Option(help="Name of the run; default: from the study.")] = "",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also train each hospital alone, and pooled.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Instead of the study's own seed.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(min=0.01, help="Instead of a private study's own epsilon.")
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="KIND:SITE:MESSAGE[:ROUND], e.g. drop:2:masked:3. May be repeated."),
    ] = None,
    poison: Annotated[
        list[str] | None,
        typer.Option(help="SITE:FACTOR[:ROUND]: a site that multiplies its update, e.g. 1:-20."),
    ] = None,
    keep_masked: Annotated[
        bool,
        typer.Option("--keep-masked", help="Keep masked vectors, for `hospitium audit-round`."),
    ] = False,
    no_masking: Annotated[
        bool, typer.Option("--no-masking", help="Leave out secure aggregation, to compare.")
    ] = False,
) -> None:
    """Run a study over simulated hospitals: the real protocol, in one process.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    options = SimulationOptions(
        masked=not no_masking,
        keep_masked=keep_masked,
        faults=tuple(Fault.parse(text) for text in fault or ()),
        poisons=tuple(Poison.parse(text) for text in poison or ()),
    )
    cutting = Partition.parse(partition)
    document = _changed(load_study(study), seed, epsilon)
    directory = runs / (name or f"{document.study.id}-{document.digest.hex()[:8]}")
    run(document, data, directory, cutting, sites, options, with_baselines=baselines)


def _changed(study: Study, seed: int | None, epsilon: float | None) -> Study:
    """Return the study with another seed or epsilon; it is another study then."""
    if seed is not None:
        study = study.model_copy(update={"study": study.study.model_copy(update={"seed": seed})})
    if epsilon is not None:
        if not study.is_private:
            raise ConfigError('expected a study with privacy.mode = "dp" for --epsilon')
        study = study.model_copy(
            update={"privacy": study.privacy.model_copy(update={"epsilon": epsilon})}
        )
    return study


def run(
    study: Study,
    data: Path,
    directory: Path,
    partition: Partition,
    sites: int,
    options: SimulationOptions,
    *,
    with_baselines: bool = False,
) -> None:
    """Simulate, report, and say where the report is."""
    console = Console()
    settings = {
        "study": study.digest.hex(), "partition": str(partition), "sites": sites,
        "masked": options.masked,
    }  # fmt: skip
    if options.poisons:
        settings["poisons"] = [str(poison) for poison in options.poisons]
    resumes = _take_directory(directory, settings)
    console.rule(f"[bold]{study.study.title}")
    console.print(promise(study), style="italic")
    records = load_records(data, study)
    parts = cut(records, partition, sites, study.study.seed)
    hospitals = {site: records.take(index) for site, index in parts.items()}
    console.print(_hospital_table(hospitals, synthetic=records.synthetic))
    if resumes:
        console.print(f"Going on with the run in {directory}.")
    with Progress(console, study, len(hospitals)) as progress:
        outcome = run_simulation(
            study, hospitals, directory, options, progress, progress.on_step,
            with_baselines=with_baselines,
        )  # fmt: skip
    notices = [SIMULATION_NOTICE] + ([SYNTHETIC_NOTICE] if records.synthetic else [])
    page = write_report(
        directory,
        ReportInput(
            study=study,
            history=outcome.history,
            result=outcome.result,
            lineage=outcome.lineage,
            site_names=dict(enumerate(hospitals, start=1)),
            notices=notices,
            others=outcome.others,
        ),
    )
    (directory / "finished.json").write_text(json.dumps(settings), encoding="utf-8")
    console.print(_result_table(outcome.result.test, outcome.others, outcome.by_site))
    mean = float(np.mean([one.accuracy for one in outcome.by_site.values()]))
    console.print(f"Mean accuracy over hospitals {mean:.3f}.")
    console.print(f"Report: [bold]{page}", soft_wrap=True)


def _take_directory(directory: Path, settings: dict[str, object]) -> bool:
    """Return whether a run is taken up again; refuse to mix two different runs."""
    if (directory / "finished.json").exists():
        raise ConfigError(
            f"{directory}: this run is finished, its report is {directory / 'report.html'}; give "
            "--name for another one"
        )
    path = directory / "simulation.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise ConfigError(
                f"{directory}: expected the settings that this run began with, got others; give "
                "--name to begin another one"
            )
        return True
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")
    return False


def _hospital_table(hospitals: Mapping[str, Records], *, synthetic: bool) -> Table:
    title = "Hospitals (SYNTHETIC data)" if synthetic else "Hospitals"
    table = Table(title=title, title_justify="left")
    table.add_column("site")
    for column in ("records", "patients", "of the last class"):
        table.add_column(column, justify="right")
    for site, records in hospitals.items():
        last = records.targets.max(initial=0) if records.targets.ndim == 1 else 1
        of_last = records.targets if records.targets.ndim == 1 else records.targets[:, -1]
        share = float((of_last == last).mean())
        table.add_row(site, str(len(records)), str(records.patient_count), f"{share:.0%}")
    return table


def _result_table(
    test: Figures, others: Mapping[str, Figures], by_site: Mapping[str, Figures]
) -> Table:
    table = Table(title="On the test patients of all hospitals", title_justify="left")
    table.add_column("model")
    for column in ("AUROC", "95 % interval", "AUPRC", "accuracy", "ECE"):
        table.add_column(column, justify="right")
    at_sites = {f"federated, at {site} only": one for site, one in by_site.items()}
    for model, one in {"federated": test, **others, **at_sites}.items():
        table.add_row(
            model, f"{one.auroc:.3f}", f"{one.auroc_low:.3f} to {one.auroc_high:.3f}",
            f"{one.auprc:.3f}", f"{one.accuracy:.3f}", f"{one.calibration_error:.3f}",
        )  # fmt: skip
    return table
