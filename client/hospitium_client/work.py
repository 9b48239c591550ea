"""What a site computes for one round: data and training together, before any masking.

Nothing here leaves the site: a `Contribution` has no encoder for the wire; `session` masks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

from hospitium_client.data.prepare import feature_sums, prepare
from hospitium_client.data.split import Split, split
from hospitium_client.training.accounting import calibrate_noise, check_delta, default_delta
from hospitium_client.training.device import PROCESSOR
from hospitium_client.training.evaluate import evaluate
from hospitium_client.training.local import (
    private_plan,
    protected_units,
    train_with_privacy,
    train_without_privacy,
)
from hospitium_client.training.update_noise import update_noise
from hospitium_common.durable import write_durably
from hospitium_common.errors import DataRejected, PeerProtocolError
from hospitium_common.metrics import EvaluationTotals, StatisticsSums, TailLayout, TrainingSums
from hospitium_common.models import build, load_tensors, shared_layout, tensors_of
from hospitium_common.normalisation import Normalisation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from hospitium_client.data.records import Records
    from hospitium_client.samples import Samples
    from hospitium_client.training.private import PrivateStepPlan
    from hospitium_common.entropy import Entropy
    from hospitium_common.parameters import Tensors
    from hospitium_common.study import Study


SMALLEST_SHARE = 2.0
"""A site's share of distributed noise spreads over at least so many steps of the quantiser."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """A site's part of a sum: the weighted update ``[size]`` (or nothing) and its tail."""

    vector: NDArray[np.float32]
    tail: NDArray[np.uint64]


def shortened(
    update: NDArray[np.float32], longest: float | None
) -> tuple[NDArray[np.float32], bool]:
    """Scale an update down to the norm that the study allows; say whether it was longer.

    A millionth is left for rounding to float32. Under differential privacy this comes after the
    noise and costs nothing.
    """
    if longest is None:
        return update, False
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm <= longest:
        return update, False
    return (update * (longest * (1 - 1e-6) / norm)).astype(np.float32), True


class SiteWork:
    """One site's data for one study, and what it does with it round by round."""

    def __init__(
        self,
        study: Study,
        records: Records,
        home: Path,
        *,
        smallest_count: int = 0,
        on_step: Callable[[], None] | None = None,
        device: torch.device = PROCESSOR,
    ) -> None:
        self._study, self._records, self.home = study, records, home
        self._smallest_count, self._on_step = smallest_count, on_step
        self._device = device
        self._model = build(study).to(device)
        self.layout = shared_layout(study, self._model)
        self.tail_layout = TailLayout.of(study, self.layout)
        self._samples: tuple[bytes, Samples, Samples, Samples] | None = None

    @cached_property
    def _split(self) -> Split:
        return split(self._records, self._study)

    def statistics(self) -> Contribution:
        """Count training records and classes, and add up the features for normalisation."""
        records = self._records.take(self._split.train)
        targets, classes = records.targets, len(self._study.task.classes)
        if self._study.task.labels == "exclusive":
            counts = np.bincount(targets, minlength=classes)
        else:
            counts = targets.sum(axis=0).astype(np.int64)
        sums = StatisticsSums(
            records=len(records),
            class_counts=counts.astype(np.int64),
            features=feature_sums(records, self._study),
        )
        return Contribution(vector=np.zeros(0, np.float32), tail=self.tail_layout.pack(sums))

    def plan(self, normalisation: bytes) -> PrivateStepPlan:
        """Return how this site trains privately in every round: its noise fits the whole study."""
        train, _, _ = self._prepared(normalisation)
        study, privacy = self._study, self._study.privacy
        units = protected_units(study, train)
        if units == 0:
            raise DataRejected("expected at least one training patient, got none")
        delta = privacy.delta if privacy.delta is not None else default_delta(units)
        check_delta(delta, units)
        unit_plan = private_plan(study, train, noise_multiplier=1.0)
        assert privacy.epsilon is not None  # noqa: S101 - Privacy's validator: epsilon with dp
        noise = calibrate_noise(
            epsilon=privacy.epsilon,
            delta=delta,
            sample_rate=unit_plan.sample_rate,
            steps=unit_plan.steps * study.rounds,
        )
        return private_plan(study, train, noise_multiplier=noise)

    def delta(self, normalisation: bytes) -> float:
        """Return the delta of this site's promise."""
        train, _, _ = self._prepared(normalisation)
        given = self._study.privacy.delta
        return default_delta(protected_units(self._study, train)) if given is None else given

    def train(
        self,
        training_round: int,
        parameters: NDArray[np.float32],
        normalisation: bytes,
        entropy: Entropy,
    ) -> Contribution:
        """Evaluate the model that was received, train it, and return the weighted update."""
        study = self._study
        train, validation, _ = self._prepared(normalisation)
        self._load(parameters)
        seen = evaluate(self._model, validation, study, self._smallest_count)
        noise = 0.0
        if study.is_private:
            plan = self.plan(normalisation)
            if not study.noise_is_distributed:
                noise = update_noise(study, plan, training_round, protected_units(study, train))
            totals = train_with_privacy(
                self._model, train, study, training_round, plan=plan, home=self.home,
                entropy=entropy, on_step=self._on_step,
            )  # fmt: skip
        else:
            totals = train_without_privacy(
                self._model, train, study, training_round, entropy=entropy,
                on_step=self._on_step,
            )  # fmt: skip
        after = tensors_of(self._model)
        self._keep_norms(after)
        moved = self.layout.flatten({name: after[name] for name in self.layout.names})
        weight = self._weight(train)
        update, was_longer = shortened(moved - parameters, study.robustness.update_norm)
        if was_longer:
            noise *= float(np.linalg.norm(update) / np.linalg.norm(moved - parameters)) ** 2
        scaled = (update * (weight / study.cohort.weight_cap)).astype(np.float32)
        ends = np.cumsum(self.layout.lengths)[:-1]
        sums = TrainingSums(
            weight=weight,
            clipped=0,
            steps=totals.steps,
            # A count that depends on single patients: with a promise to them it stays here.
            dropped=0 if study.is_private else totals.dropped_non_finite,
            scaled_down=int(was_longer),
            # With a share of the noise only the sum of all updates may be known: no other figure.
            second_moments=tuple(
                0.0 if study.noise_is_distributed else float((piece.astype(np.float64) ** 2).sum())
                for piece in np.split(scaled, ends)
            ),
            validation=seen,
            noise_square=noise * len(scaled) * (weight / study.cohort.weight_cap) ** 2,
        )
        return Contribution(vector=scaled, tail=self.tail_layout.pack(sums))

    def evaluate(self, parameters: NDArray[np.float32], normalisation: bytes) -> Contribution:
        """Evaluate a model on the patients that were held out."""
        _, validation, test = self._prepared(normalisation)
        self._load(parameters)
        sums = EvaluationTotals(
            validation=evaluate(self._model, validation, self._study, self._smallest_count),
            test=evaluate(self._model, test, self._study, self._smallest_count),
        )
        return Contribution(vector=np.zeros(0, np.float32), tail=self.tail_layout.pack(sums))

    def check_share(
        self, training_round: int, normalisation: bytes, steps: Sequence[float]
    ) -> None:
        """Refuse to hand in a share of noise that rounding could take away.

        ``steps`` are the quantiser's step sizes, per tensor. Rounded normal deviates add up like
        deviates that are rounded after their sum if each spreads over `SMALLEST_SHARE` steps: the
        difference in distribution is below exp(-2 pi² SMALLEST_SHARE²) (Kairouz, Liu and Steinke
        2021 for the discrete Gaussian).

        Raises:
            PeerProtocolError: the coordinator's quantiser is too coarse for this site's share.
        """
        study, plan = self._study, self.plan(normalisation)
        if not study.noise_is_distributed:
            return
        share = study.learning_rate(training_round) * plan.own_noise
        share /= plan.sample_rate * study.cohort.weight_cap
        if max(steps) * SMALLEST_SHARE > share:
            raise PeerProtocolError(
                f"training round {training_round}: expected a quantiser that is at least "
                f"{SMALLEST_SHARE:g} times finer than this site's share of the noise, got a "
                "coarser one",
                blame=0,
            )

    def _weight(self, train: Samples) -> int:
        """Return what the update counts for: records, or units where their noise has to add up.

        Raises:
            DataRejected: the cap would scale this site's share of the noise down.
        """
        cap = self._study.cohort.weight_cap
        if not self._study.noise_is_distributed:
            return min(len(train), cap)
        units = protected_units(self._study, train)
        if units > cap:
            raise DataRejected(
                "expected at most cohort.weight_cap training patients where the noise is "
                "distributed, got more: the cap would scale down this site's share"
            )
        return units

    def _prepared(self, normalisation: bytes) -> tuple[Samples, Samples, Samples]:
        """Return training, validation and test samples; prepared once per normalisation."""
        if self._samples is None or self._samples[0] != normalisation:
            figures = Normalisation.decode(normalisation, self._study)
            parts = (self._split.train, self._split.validation, self._split.test)
            train, validation, test = (
                prepare(self._records.take(part), figures, self._study).to(self._device)
                for part in parts
            )
            self._samples = normalisation, train, validation, test
        return self._samples[1:]

    def _load(self, parameters: NDArray[np.float32]) -> None:
        tensors = tensors_of(self._model) | self.layout.unflatten(parameters)
        if self._study.strategy.local_norms and self._norms.exists():
            tensors |= safetensors.numpy.load(self._norms.read_bytes())
        load_tensors(self._model, tensors)

    def _keep_norms(self, tensors: Tensors) -> None:
        if self._study.strategy.local_norms:
            own = {name: t for name, t in tensors.items() if name not in self.layout.names}
            write_durably(self._norms, safetensors.numpy.save(own))

    @property
    def _norms(self) -> Path:
        return self.home / "norms.safetensors"
