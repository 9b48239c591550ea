"""The sections of a study file that do not depend on the kind of data."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{1,62}$")]
Name = Annotated[str, Field(min_length=1, max_length=80)]


class Section(BaseModel):
    """A frozen table of the study file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Identity(Section):
    """``[study]``: what the study is called, and the seed of everything that is public."""

    id: Identifier
    title: str = Field(min_length=3, max_length=200)
    purpose: str = Field(default="", max_length=2000)
    seed: int = Field(default=1, ge=0, lt=2**31)


class Task(Section):
    """``[task]``: what is predicted."""

    kind: Literal["image_classification", "ehr_sequence_classification", "tabular_classification"]
    classes: tuple[Name, ...] = Field(min_length=1)
    labels: Literal["exclusive", "multi"] = "exclusive"

    @model_validator(mode="after")
    def _enough_classes(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("expected every class once, got a class twice")
        if self.labels == "exclusive" and len(self.classes) < 2:
            raise ValueError("expected at least two exclusive classes, got one")
        return self


class Training(Section):
    """``[training]``: what one site does in one round.

    Exactly one of ``local_epochs`` and ``local_steps`` decides how long a site trains. With
    privacy on, a batch is a Poisson sample of ``batch_size`` units on average, or, where
    ``sampling_rate`` is given, of that share of every site's units.
    """

    local_epochs: Positive | None = None
    local_steps: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=64, gt=0)
    sampling_rate: float | None = Field(default=None, gt=0, le=1)
    optimizer: Literal["sgd", "adam", "rmsprop"] = "sgd"
    learning_rate: Positive = 0.05
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: Probability = 0.0
    weight_decay: NotNegative = 0.0
    class_weights: tuple[Positive, ...] | None = None
    augmentation: Literal["none", "light"] = "none"
    validation_fraction: float = Field(default=0.15, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.2, gt=0, lt=0.5)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.local_epochs is None) == (self.local_steps is None):
            raise ValueError("expected exactly one of local_epochs and local_steps")
        if self.momentum and self.optimizer == "adam":
            raise ValueError("expected momentum = 0 with adam, which keeps its own")
        return self


class Privacy(Section):
    """``[privacy]``: the promise to every patient.

    ``mode = "none"`` trains without differential privacy and needs the site's consent too.
    ``delta`` defaults to 1/N^1.1 for the N patients of each site.

    With ``noise = "local"`` every site adds all the noise that its own promise needs. With
    ``"distributed"`` it adds 1/√honest_sites of it, and the sum of a round has enough as long as
    that many of its sites keep to the protocol and share nothing with the coordinator.

    With a ``clip_quantile`` the clipping norm begins at ``clip_norm`` and then follows that
    quantile of the gradients' norms at each site, counted with noise (Andrew et al. 2021).
    """

    mode: Literal["dp", "none"] = "dp"
    epsilon: Positive | None = None
    delta: float | None = Field(default=None, gt=0, lt=1)
    clip_norm: Positive = 1.0
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    unit: Literal["patient", "record"] = "patient"
    records_per_patient: int = Field(default=4, gt=0)
    engine: Literal["fast", "opacus"] = "fast"
    physical_batch: int = Field(default=256, gt=0)
    augmentation_multiplicity: int = Field(default=1, gt=0, le=32)
    noise: Literal["local", "distributed"] = "local"
    honest_sites: int = Field(default=1, ge=1, le=200)

    @model_validator(mode="after")
    def _epsilon_with_dp(self) -> Self:
        if self.mode == "dp" and self.epsilon is None:
            raise ValueError('expected epsilon with mode = "dp", got none')
        if self.mode == "none" and self.epsilon is not None:
            raise ValueError('expected no epsilon with mode = "none", which promises none')
        return self

    @model_validator(mode="after")
    def _who_adds_the_noise(self) -> Self:
        if (self.noise == "distributed") != (self.honest_sites > 1):
            raise ValueError(
                'expected honest_sites of at least 2 exactly when noise = "distributed", got '
                f"{self.honest_sites} with {self.noise!r}"
            )
        if self.noise == "distributed" and (self.mode == "none" or self.delta is None):
            raise ValueError(
                'expected mode = "dp" and a delta with noise = "distributed": all sites have to '
                "calibrate the same noise"
            )
        return self


class Cohort(Section):
    """``[cohort]``: who has to be there, and the numbers of secure aggregation.

    A site's weight is its number of training records, at most ``weight_cap``. ``update_bound``
    is the largest weighted change of one coordinate that the first round can carry; later rounds
    take their bounds from the round before. ``rotation`` mixes coordinates before they are rounded,
    which makes rounding finer; by default in rings of 16 bits. ``deadline_s`` is how long a site
    may work on a round, ``exchange_s`` how long it may take for messages that need no work.
    """

    minimum_sites: int = Field(default=5, ge=3, le=200)
    maximum_sites: int = Field(default=16, ge=3, le=200)
    deadline_s: Positive = 3600.0
    exchange_s: Positive = 300.0
    weight_cap: int = Field(default=10_000, gt=0, lt=2**32)
    ring_bits: Literal[16, 24, 32] = 24
    rotation: bool | None = None
    update_bound: Positive = 2.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum_sites > self.maximum_sites:
            raise ValueError(
                f"expected minimum_sites ≤ maximum_sites, got {self.minimum_sites} and "
                f"{self.maximum_sites}"
            )
        return self


class Strategy(Section):
    """``[strategy]``: how the coordinator turns the mean update into the next model.

    ``proximal_mu`` is FedProx's pull towards the global model (Li et al. 2020); the adaptive
    ones are those of Reddi et al. 2021. ``local_norms`` keeps normalisation layers at the
    sites (FedBN, Li et al. 2021). ``averaging`` > 0 keeps a moving average of the versions with
    that decay per round and releases it instead of the version that did best on validation
    patients (De et al. 2022): where these are few, the best of many versions is a matter of luck.
    It costs no privacy.
    """

    name: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    server_learning_rate: Positive = 1.0
    server_momentum: Probability = 0.9
    beta_1: Probability = 0.9
    beta_2: Probability = 0.99
    tau: Positive = 1e-3
    proximal_mu: NotNegative = 0.0
    local_norms: bool = False
    averaging: Probability = 0.0

    @model_validator(mode="after")
    def _proximal_where_it_belongs(self) -> Self:
        if (self.name == "fedprox") != (self.proximal_mu > 0):
            raise ValueError(
                'expected proximal_mu > 0 exactly when name = "fedprox", got '
                f"{self.name!r} with {self.proximal_mu}"
            )
        return self


class Robustness(Section):
    """``[robustness]``: how far a site that means harm, or has a fault, can move the model.

    ``update_norm`` is the longest update (Euclidean norm, before weighing) that a site hands in;
    a longer one it scales down itself, and a mean that is longer is not used. ``groups`` > 1 adds
    up the updates of fixed groups of sites apart, and ``combine`` says how the groups' means
    become one; the price is that sums over a group's sites become visible. ``gate`` is the largest
    loss of ``gate_metric`` on validation patients that one round may bring; after a larger one the
    model goes back to the one before. After ``most_rejected`` rounds that led nowhere the study
    waits for a person.
    """

    update_norm: Positive | None = None
    groups: int = Field(default=1, ge=1, le=64)
    combine: Literal["median", "trimmed_mean"] = "median"
    gate: Positive | None = None
    gate_metric: Literal["auroc", "loss"] = "auroc"
    most_rejected: int = Field(default=3, gt=0)

    @model_validator(mode="after")
    def _enough_groups(self) -> Self:
        if self.groups == 2:
            raise ValueError(
                "expected one group, or at least 3: between two, nobody can tell which one is bad"
            )
        return self


class Pretrained(Section):
    """``[pretrained]``: a local safetensors file that the first weights come from.

    ``frozen`` holds beginnings of parameter names, such as ``"recurrent."``: those parameters stay
    as they are in the file, are not trained and do not travel.
    """

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    frozen: tuple[Name, ...] = ()


class EarlyStopping(Section):
    """``[early_stopping]``: stop when the federated validation metric stands still."""

    metric: Literal["auroc", "loss"] = "auroc"
    patience: int = Field(default=5, gt=0)
    min_delta: NotNegative = 0.0


class Evaluation(Section):
    """``[evaluation]``: how finely score histograms are binned; the error of AUROC is stated."""

    score_bins: int = Field(default=1000, ge=20, le=2000, multiple_of=2)
