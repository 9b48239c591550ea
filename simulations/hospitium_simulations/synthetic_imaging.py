"""Synthetic chest films: realistic enough to learn from, different in every hospital.

No patient stands behind any of them. Each film has two lung fields, ribs, a heart shadow and noise;
an ill one has one to three hazy opacities in a lung. Hospitals differ in exposure, contrast,
noise, field of view and in how many of their patients are ill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """How a hospital's films look."""

    exposure: float
    contrast: float
    noise: float
    zoom: float
    prevalence: float


def write_films(directory: Path, *, sites: int, patients_per_site: int, seed: int) -> None:
    """Write films as PNG with a table of labels and ``dataset.toml``, marked as synthetic."""
    generator = np.random.default_rng(seed)
    (directory / "films").mkdir(parents=True, exist_ok=True)
    rows = []
    for site in range(1, sites + 1):
        scanner = _scanner(generator)
        for number in range(patients_per_site):
            ill = generator.random() < scanner.prevalence
            patient = f"SYNTHETIC-{site}-{number:05d}"
            for view in range(1 + (generator.random() < 0.25)):  # some patients have two films
                name = f"films/{patient}-{view}.png"
                pixels = (film(generator, scanner, ill=bool(ill)) * 255).astype(np.uint8)
                Image.fromarray(pixels).save(directory / name)
                rows.append((name, patient, int(ill), f"hospital-{site}"))
    table = pd.DataFrame(rows, columns=["file", "patient", "label", "site"])
    table.to_csv(directory / "labels.csv", index=False)
    (directory / "dataset.toml").write_text(
        "# SYNTHETIC films, made by hospitium_simulations; no patient stands behind them.\n"
        'kind = "image_folder"\nsynthetic = true\nsite_column = "site"\n',
        encoding="utf-8",
    )


def film(generator: np.random.Generator, scanner: Scanner, *, ill: bool) -> NDArray[np.float64]:
    """Return one film ``[height, width]`` in 0…1."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j] * scanner.zoom
    x = x + generator.normal(0, 0.04)
    picture = 0.75 - 0.25 * (x**2 + y**2)
    lungs = np.zeros_like(x)
    for side in (-1, 1):
        width, height = generator.normal(0.3, 0.02), generator.normal(0.68, 0.03)
        inside = ((x - side * 0.42) / width) ** 2 + ((y + 0.02) / height) ** 2
        lungs = np.maximum(lungs, 1 / (1 + np.exp(12 * (inside - 1))))
    picture -= 0.5 * lungs
    picture += 0.06 * lungs * np.sin(2 * np.pi * (y * 4.5 + 0.35 * np.abs(x)))
    picture += 0.22 * np.exp(-(((x - 0.12) / 0.2) ** 2) - ((y - 0.35) / 0.3) ** 2)
    for _ in range(generator.integers(1, 4) if ill else 0):
        side, spread = generator.choice([-1, 1]), generator.uniform(0.1, 0.24)
        at_x, at_y = side * generator.normal(0.42, 0.08), generator.uniform(-0.4, 0.5)
        haze = np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / (2 * spread**2))
        picture += generator.uniform(0.22, 0.45) * haze * (0.3 + 0.7 * lungs)
    picture = 0.5 + scanner.contrast * (picture - 0.5) + scanner.exposure
    picture += generator.normal(0, scanner.noise, picture.shape)
    return np.asarray(np.clip(picture, 0, 1))


def _scanner(generator: np.random.Generator) -> Scanner:
    return Scanner(
        exposure=float(generator.uniform(-0.08, 0.08)),
        contrast=float(generator.uniform(0.75, 1.15)),
        noise=float(generator.uniform(0.03, 0.08)),
        zoom=float(generator.uniform(0.95, 1.1)),
        prevalence=float(generator.uniform(0.25, 0.6)),
    )
