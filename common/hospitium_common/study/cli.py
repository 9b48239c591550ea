"""`hospitium study`: write a study, and have it explained."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from hospitium_common.errors import ConfigError
from hospitium_common.study.explain import explain
from hospitium_common.study.reading import load_study
from hospitium_common.study.weights import keep_weights

app = typer.Typer(help="Write and check study files.", no_args_is_help=True)

TaskKind = Literal["image_classification", "ehr_sequence_classification", "tabular_classification"]


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("study.toml"),
    task: Annotated[
        TaskKind, typer.Option(help="What is predicted, from what.")
    ] = "image_classification",
) -> None:
    """Write a commented study file to start from; an existing file is never overwritten."""
    template = files("hospitium_common.study") / "templates" / f"{task}.toml"
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(template.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: expected to write a new file, got: {error.strerror}") from error
    Console().print(f"Wrote {file}. Next: edit it, then `hospitium study check {file}`.")


@app.command()
def weights(file: Annotated[Path, typer.Argument(help="A safetensors file.")]) -> None:
    """Put a weights file where studies that begin from it find it, and show what to write."""
    digest = keep_weights(file)
    Console().print(
        f'In the study file:\n\n\\[pretrained]\nsha256 = "{digest}"\n'
        "frozen = []   # beginnings of names of parameters that are not trained\n\n"
        "Every hospital puts the same file in place with this command.",
        soft_wrap=True,
    )


@app.command()
def check(file: Annotated[Path, typer.Argument(help="The study file.")]) -> None:
    """Say in plain words what a study trains, what leaves a hospital and what is promised."""
    study = load_study(file)
    table = Table(title=f"{file}: a valid study", show_header=False, show_lines=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for question, answer in explain(study):
        table.add_row(question, answer)
    Console().print(table)
