"""The study document: validated, frozen, hashed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hospitium_common.study.schema import DATA_BY_TASK, MODELS_BY_DATA, Model, Schema
from hospitium_common.study.sections import (
    Cohort,
    EarlyStopping,
    Evaluation,
    Identity,
    Pretrained,
    Privacy,
    Robustness,
    Section,
    Strategy,
    Task,
    Training,
)


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """Return the one byte string for a document (RFC 8785's rules for a study's types)."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


class Study(Section):
    """Everything that a federated training will do, before it does it.

    Two studies with the same content have the same ``digest``, whatever their files look like:
    comments, order and defaults left out do not matter.
    """

    format: Literal[1]
    study: Identity
    task: Task
    data: Schema
    model: Model
    training: Training
    rounds: int = Field(gt=0, le=1000)
    privacy: Privacy
    cohort: Cohort = Cohort()
    strategy: Strategy = Strategy()
    robustness: Robustness = Robustness()
    evaluation: Evaluation = Evaluation()
    early_stopping: EarlyStopping | None = None
    pretrained: Pretrained | None = None

    @model_validator(mode="before")
    @classmethod
    def _data_kind_follows_from_the_task(cls, document: Any) -> Any:
        """People write what is predicted; the kind of data follows and need not be said twice."""
        try:
            kind = DATA_BY_TASK[document["task"]["kind"]]
            return {**document, "data": {"kind": kind, **document["data"]}}
        except (KeyError, TypeError):
            return document

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        kind = DATA_BY_TASK[self.task.kind]
        if self.data.kind != kind:
            raise ValueError(
                f"expected data.kind = {kind!r} for task.kind = {self.task.kind!r}, "
                f"got {self.data.kind!r}"
            )
        if self.model.name not in MODELS_BY_DATA[kind]:
            raise ValueError(
                f"expected model.name to be one of {', '.join(MODELS_BY_DATA[kind])} for "
                f"{self.task.kind}, got {self.model.name!r}"
            )
        weights = self.training.class_weights
        if weights is not None and len(weights) != len(self.task.classes):
            raise ValueError(
                f"expected training.class_weights for {len(self.task.classes)} classes, "
                f"got {len(weights)}"
            )
        if self.training.augmentation != "none" and kind != "image":
            raise ValueError('expected training.augmentation = "none" without images')
        if self.privacy.augmentation_multiplicity > 1 and self.training.augmentation == "none":
            raise ValueError(
                "expected training.augmentation with privacy.augmentation_multiplicity > 1"
            )
        smallest = self.robustness.groups * self.cohort.minimum_sites
        if self.robustness.groups > 1 and self.cohort.maximum_sites < smallest:
            raise ValueError(
                f"expected cohort.maximum_sites ≥ {smallest} for {self.robustness.groups} groups "
                f"of at least cohort.minimum_sites, got {self.cohort.maximum_sites}"
            )
        if self.training.sampling_rate is not None and not self.is_private:
            raise ValueError('expected no training.sampling_rate with privacy.mode = "none"')
        return self

    @model_validator(mode="after")
    def _distributed_noise_adds_up(self) -> Self:
        """Only a sum of clipped sums carries shares of noise; nothing may come before the sum."""
        if not self.noise_is_distributed:
            return self
        training, honest, smallest = (
            self.training, self.privacy.honest_sites, self.cohort.minimum_sites,
        )  # fmt: skip
        plain = training.local_steps == 1 and training.optimizer == "sgd"
        for broken, reason in (
            (
                training.sampling_rate is None,
                "training.sampling_rate: all sites have to draw patients with one probability",
            ),
            (
                not plain or training.weight_decay > 0,
                "training.local_steps = 1 of plain sgd without weight decay: what follows a first "
                "step would depend on one site's share of the noise alone",
            ),
            (
                self.strategy.local_norms,
                "strategy.local_norms = false: what stays at a site has one share of noise only",
            ),
            (
                self.privacy.clip_quantile is not None,
                "no privacy.clip_quantile: all sites have to clip alike",
            ),
            (
                self.robustness.update_norm is not None,
                "no robustness.update_norm: its scale would tell of an update with one share",
            ),
            (
                honest > smallest,
                f"privacy.honest_sites ≤ cohort.minimum_sites, got {honest} and {smallest}: a "
                "smaller cohort would carry too little noise",
            ),
        ):
            if broken:
                raise ValueError(f'privacy.noise = "distributed": expected {reason}')
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON (RFC 8785's rules for this document's types)."""
        return hashlib.sha256(self.canonical()).digest()

    def canonical(self) -> bytes:
        """Return the one byte string that stands for this study."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def is_private(self) -> bool:
        """Whether sites train with differential privacy."""
        return self.privacy.mode == "dp"

    @property
    def noise_is_distributed(self) -> bool:
        """Whether a site adds a share of the noise only, so that its update alone may not leave."""
        return self.privacy.noise == "distributed"

    def sampling_rate(self, units: int) -> float:
        """Probability of each of a site's ``units`` training patients (or records) per step."""
        if self.training.sampling_rate is not None:
            return self.training.sampling_rate
        return min(1.0, self.training.batch_size / units)

    def steps_per_round(self, units: int) -> int:
        """Optimizer steps that a site with ``units`` training patients (or records) makes."""
        if self.training.local_steps is not None:
            return self.training.local_steps
        assert self.training.local_epochs is not None  # noqa: S101 - Training's validator: one of the two
        epochs, rate = self.training.local_epochs, self.training.sampling_rate
        steps = epochs * units / self.training.batch_size if rate is None else epochs / rate
        return max(1, math.ceil(steps))

    def learning_rate(self, training_round: int) -> float:
        """The sites' learning rate in training round 1, 2, … of the study."""
        rate = self.training.learning_rate
        if self.training.schedule == "constant":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * (training_round - 1) / self.rounds))
