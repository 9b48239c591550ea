"""What a simulated federation costs on top of bare training, and what the coordinator remembers.

Bare training, the federation without masks and the federation with masks make the same steps on the
same records, one after another in each repetition; the fastest of each is compared.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hospitium_client.data.prepare import feature_sums, prepare
from hospitium_client.data.records import Records
from hospitium_client.data.split import split
from hospitium_client.training.local import train_without_privacy
from hospitium_common.entropy import seeded_entropy
from hospitium_common.models import build
from hospitium_common.normalisation import Normalisation
from hospitium_common.secagg.fixed_point import quantise
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_common.study import Study
from hospitium_simulations.benchmarks.results import Result, publish
from hospitium_simulations.federation import SimulationOptions, simulate
from hospitium_simulations.whole_round import enrol, run_round

if TYPE_CHECKING:
    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord

SITES, FILMS, ROUNDS, REPETITIONS = 4, 400, 3, 3
MODEL = 500_000


class Silent:
    """A watcher that looks away."""

    def on_round(self, record: RoundRecord, received: Figures) -> None:
        """See nothing."""


def study() -> Study:
    """A small CNN on 28×28 films, four hospitals, no privacy: the cheapest steps there are."""
    return Study.model_validate(
        {
            "format": 1,
            "rounds": ROUNDS,
            "study": {"id": "benchmark", "title": "What a federation costs"},
            "task": {"kind": "image_classification", "classes": ["dark", "bright"]},
            "data": {"channels": 1, "size": [28, 28]},
            "model": {"name": "small_cnn"},
            "training": {"local_epochs": 3, "batch_size": 64},
            "privacy": {"mode": "none"},
            "cohort": {"minimum_sites": 3, "maximum_sites": 4},
        }
    )


def hospital(seed: int) -> Records:
    """Return bright and dark noise."""
    generator = np.random.default_rng(seed)
    targets = np.arange(FILMS) % 2
    films = generator.random((FILMS, 1, 28, 28), np.float32) * 0.5
    return Records(
        values=films + 0.5 * targets[:, None, None, None].astype(np.float32),
        statics=np.zeros((FILMS, 0), np.float32),
        targets=targets,
        patients=np.array([f"{seed}-{number}" for number in range(FILMS)]),
        synthetic=True,
    )


def bare(document: Study, hospitals: dict[str, Records]) -> None:
    """Make the federation's steps with nothing around them."""
    for records in hospitals.values():
        train = records.take(split(records, document).train)
        figures = Normalisation.from_totals(feature_sums(train, document), document)
        samples, model = prepare(train, figures, document), build(document)
        for number in range(1, ROUNDS + 1):
            train_without_privacy(
                model, samples, document, number, entropy=seeded_entropy(bytes([number]))
            )


def seconds_of_a_federation(
    document: Study, hospitals: dict[str, Records], *, masked: bool
) -> float:
    """Run a whole study in a fresh directory."""
    with tempfile.TemporaryDirectory() as directory:
        begun = time.perf_counter()
        options = SimulationOptions(masked=masked)
        simulate(document, hospitals, Path(directory), options, Silent())
        return time.perf_counter() - begun


def coordinator_bytes(sites: int) -> int:
    """Return the coordinator's peak of memory for one round, in bytes beyond the start.

    The sites run in the same process and hold their own vectors one at a time; each is released
    before the next begins, so the peak has one site's vector and message in it too.
    """
    policy = SecAggPolicy(
        study=bytes(32), ring_bits=16, n_max=64, m_min=3, weight_cap=100, tail_len=8
    )
    quantiser = Quantiser(lengths=(MODEL,), bounds=(1.0,))
    federation = enrol(bytes(32), range(1, sites + 1))
    update = np.zeros(MODEL, np.float32)
    quantise(update, quantiser, policy, bytes(32))
    tracemalloc.start()
    run_round(
        federation, policy, quantiser, dict.fromkeys(federation.parties, update),
        dict.fromkeys(federation.parties, np.zeros(8, np.uint64)), round_number=1,
        keep_masked=False,
    )  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Measure, print and publish."""
    torch.set_num_threads(1)
    document = study()
    hospitals = {f"site-{n}": hospital(n) for n in range(1, SITES + 1)}
    times: dict[str, list[float]] = {"bare": [], "plain": [], "masked": []}
    for _ in range(REPETITIONS):
        begun = time.perf_counter()
        bare(document, hospitals)
        times["bare"].append(time.perf_counter() - begun)
        for name in ("plain", "masked"):
            spent = seconds_of_a_federation(document, hospitals, masked=name == "masked")
            times[name].append(spent)
    best = {name: min(spent) for name, spent in times.items()}
    plain, masked = best["plain"] / best["bare"], best["masked"] / best["bare"]
    few, many = coordinator_bytes(5), coordinator_bytes(50)
    publish(
        "round",
        [
            Result("federation without masks / bare training", plain, "×", 1.3),
            Result("federation with masks / bare training", masked, "×", 1.4),
            Result(f"peak memory, 5 sites, {MODEL:,} parameters", few / 1e6, "MB", None),
            Result(f"peak memory, 50 sites, {MODEL:,} parameters", many / 1e6, "MB", None),
            Result("peak memory, 50 sites / 5 sites", many / few, "×", 1.5),
            Result(
                "machine noise (slowest / fastest bare training)",
                max(times["bare"]) / best["bare"], "×", None,
            ),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
