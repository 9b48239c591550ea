"""Synthetic chest films: realistic enough to learn from, different in every hospital.

No patient stands behind any of them. Each film has two lung fields, ribs, a heart shadow and noise;
an ill one has one to three patchy opacities in a lung, no brighter than what hearts and exposures
vary by from film to film. Hospitals differ in exposure, contrast, noise, field of view and in how
many of their patients are ill.
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
HAZE, PATCHINESS = (0.12, 0.26), 0.25
"""How much brighter an opacity is than a lung, and how much that varies from pixel to pixel.

Faint enough that a linear model of the pixels stays well below a convolutional one.
"""


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
    x, y = x + generator.normal(0, 0.06), y + generator.normal(0, 0.06)  # never quite centred
    picture = 0.75 - 0.25 * (x**2 + y**2)
    lungs = _lungs(generator, x, y)
    picture -= generator.normal(0.5, 0.04) * lungs
    picture += 0.06 * lungs * np.sin(2 * np.pi * (y * 4.5 + 0.35 * np.abs(x)))  # ribs
    picture += _heart(generator, x, y)
    for _ in range(generator.integers(1, 4) if ill else 0):
        side, spread = generator.choice([-1, 1]), generator.uniform(0.1, 0.24)
        at_x, at_y = side * generator.normal(0.42, 0.08), generator.uniform(-0.45, 0.5)
        haze = np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / (2 * spread**2))
        patchy = generator.uniform(*HAZE) + generator.normal(0, PATCHINESS, x.shape)
        picture += patchy * haze * (0.3 + 0.7 * lungs)
    exposure = scanner.exposure + generator.normal(0, 0.05)
    picture = 0.5 + scanner.contrast * (picture - 0.5) + exposure
    picture += generator.normal(0, scanner.noise, picture.shape)
    return np.asarray(np.clip(picture, 0, 1))


def _lungs(
    generator: np.random.Generator, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Two fields with soft edges, 1 inside and 0 outside."""
    lungs = np.zeros_like(x)
    for side in (-1, 1):
        width, height = generator.normal(0.3, 0.03), generator.normal(0.68, 0.05)
        inside = ((x - side * 0.42) / width) ** 2 + ((y + 0.02) / height) ** 2
        lungs = np.maximum(lungs, 1 / (1 + np.exp(np.minimum(12 * (inside - 1), 50))))
    return lungs


def _heart(
    generator: np.random.Generator, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A shadow whose size, place and density say nothing about the illness."""
    width, height = np.maximum(generator.normal((0.2, 0.3), 0.04), 0.1)
    middle, density = generator.normal(0.12, 0.05), generator.uniform(0.15, 0.3)
    shadow = np.exp(-(((x - middle) / width) ** 2) - ((y - 0.35) / height) ** 2)
    return np.asarray(density * shadow)


def _scanner(generator: np.random.Generator) -> Scanner:
    return Scanner(
        exposure=float(generator.uniform(-0.08, 0.08)),
        contrast=float(generator.uniform(0.75, 1.15)),
        noise=float(generator.uniform(0.03, 0.08)),
        zoom=float(generator.uniform(0.95, 1.1)),
        prevalence=float(generator.uniform(0.25, 0.6)),
    )
