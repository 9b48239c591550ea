"""`hospitium data`: bring data in, and see whether a study can use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from hospitium_client.data.convert import (
    eicu,
    heart_disease,
    medmnist,
    physionet2012,
    physionet2019,
)
from hospitium_client.data.loading import load_records
from hospitium_client.data.split import split
from hospitium_common.study import load_study
from hospitium_common.study.schema import EventSchema, TableSchema

app = typer.Typer(help="Convert and check data.", no_args_is_help=True)
convert_app = typer.Typer(
    help="Turn a published data set into a data directory with a mapping and a study.",
    no_args_is_help=True,
)
app.add_typer(convert_app, name="convert")

Source = Annotated[Path, typer.Argument(help="Where the published files are.")]
Target = Annotated[Path, typer.Argument(help="Directory to write to.")]


@convert_app.command("physionet2012")
def convert_physionet2012(source: Source, target: Target) -> None:
    """ICU mortality (PhysioNet Challenge 2012); sites are the four types of unit."""
    physionet2012.convert(source, target)
    _say(target)


@convert_app.command("physionet2019")
def convert_physionet2019(source: Source, target: Target) -> None:
    """Sepsis in two hospitals (PhysioNet Challenge 2019)."""
    physionet2019.convert(source, target)
    _say(target)


@convert_app.command("medmnist")
def convert_medmnist(source: Source, target: Target) -> None:
    """A MedMNIST .npz file; it names no hospitals."""
    medmnist.convert(source, target)
    _say(target, "dirichlet:0.5")


@convert_app.command("heart-disease")
def convert_heart_disease(source: Source, target: Target) -> None:
    """UCI heart disease, four hospitals, prepared and split as FLamby does."""
    heart_disease.convert(source, target)
    _say(target)


@convert_app.command("eicu")
def convert_eicu(source: Source, target: Target) -> None:
    """ICU mortality (eICU demo), several stays per patient; sites are regions, tests hospitals."""
    eicu.convert(source, target)
    _say(target)


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="Data directory with a dataset.toml.")],
    study: Annotated[Path, typer.Option(help="The study that wants to use the data.")],
) -> None:
    """Read a data directory as a study would, and say what is in it. Nothing leaves."""
    document = load_study(study)
    records = load_records(directory, document)
    parts = split(records, document)
    table = Table(title=f"{directory}: usable for {document.study.id}", title_justify="left")
    table.add_column("what")
    table.add_column("count", justify="right")
    if records.synthetic:
        table.add_row("[bold]SYNTHETIC[/bold] data: no patient stands behind it", "")
    table.add_row("records", str(len(records)))
    table.add_row("patients", str(records.patient_count))
    for name in ("train", "validation", "test"):
        table.add_row(f"records to {name}", str(len(getattr(parts, name))))
    schema = document.data
    if isinstance(schema, EventSchema | TableSchema):
        variables = schema.variables if isinstance(schema, EventSchema) else schema.columns
        measured = ~np.isnan(records.values.reshape(len(records), -1, len(variables)))
        for variable, share in zip(variables, measured.any(axis=1).mean(axis=0), strict=True):
            table.add_row(f"records with {variable.name}", f"{share:.0%}")
    Console().print(table)


def _say(target: Path, partition: str = "site") -> None:
    Console().print(
        f"Wrote {target}. Next: `hospitium data check {target} --study {target}/study.toml`, then "
        f"`hospitium simulate {target}/study.toml --data {target} --partition {partition}`.",
        soft_wrap=True,
    )
