"""The data schema of a study: what every site has to bring, in which units and ranges."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hospitium_common.study.sections import Name, Positive, Section


class Variable(Section):
    """A measured variable; outside ``low`` to ``high`` a value is implausible: it is missing.

    ``scale = "log"`` is for values that spread over orders of magnitude, as many laboratory
    values do; the model then sees their logarithm.
    """

    name: Name
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    unit: str = ""
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got {self.low} and {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f'expected low > 0 with scale = "log", got {self.low}')
        return self


def _unique(variables: tuple[Variable, ...]) -> None:
    names = [variable.name for variable in variables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected every variable once, got {twice[0]!r} twice")


class ImageSchema(Section):
    """``[data]`` of an imaging study: pictures as ``[channel, height, width]`` in 0 to 1."""

    kind: Literal["image"] = "image"
    channels: Literal[1, 3] = 1
    size: tuple[Annotated[int, Field(ge=8, le=1024)], Annotated[int, Field(ge=8, le=1024)]]


class EventSchema(Section):
    """``[data]`` of an EHR study: variables on a grid of ``step_hours`` over ``window_hours``.

    ``statics`` are known at admission; they ride along every step.
    """

    kind: Literal["events"] = "events"
    window_hours: Positive = 48.0
    step_hours: Positive = 1.0
    variables: tuple[Variable, ...] = Field(min_length=1)
    statics: tuple[Variable, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique(self.variables + self.statics)
        if (
            not 1 <= self.steps <= 2000
            or abs(self.steps * self.step_hours - self.window_hours) > 1e-9
        ):
            raise ValueError(
                "expected window_hours to be 1 to 2000 whole steps of step_hours, got "
                f"{self.window_hours} and {self.step_hours}"
            )
        return self

    @property
    def steps(self) -> int:
        """How many steps of the grid fill the window."""
        return round(self.window_hours / self.step_hours)

    @property
    def features(self) -> int:
        """Channels a model sees per step: value, mask and age per variable, statics, valid flag."""
        return 3 * len(self.variables) + 2 * len(self.statics) + 1


class TableSchema(Section):
    """``[data]`` of a tabular study: one row of numbers per record."""

    kind: Literal["table"] = "table"
    columns: tuple[Variable, ...] = Field(min_length=1)
    missing: Literal["refuse", "mask"] = "mask"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique(self.columns)
        return self

    @property
    def features(self) -> int:
        """Numbers a model sees per row: a value, and a mask where gaps are allowed, per column."""
        return len(self.columns) * (2 if self.missing == "mask" else 1)


Schema = Annotated[ImageSchema | EventSchema | TableSchema, Field(discriminator="kind")]


class SmallCnn(Section):
    """``[model] name = "small_cnn"``: three convolutions, about 100,000 parameters at width 32.

    ``norm_groups`` is GroupNorm's number of groups, which must divide the width (default: a quarter
    of it); 1 normalises all channels together, which learns faster under much noise.
    ``weight_standardisation`` keeps every filter at mean 0 and norm 1 (Qiao et al. 2019).
    """

    name: Literal["small_cnn"]
    width: int = Field(default=32, ge=4, le=256, multiple_of=4)
    norm_groups: int | None = Field(default=None, ge=1)
    weight_standardisation: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _groups_of_equal_size(self) -> Self:
        if self.norm_groups is not None and self.width % self.norm_groups:
            raise ValueError(
                f"expected norm_groups to divide the width, got {self.norm_groups} and {self.width}"
            )
        return self


class DeepCnn(Section):
    """``[model] name = "resnet18" | "densenet121"``: MONAI's, with GroupNorm."""

    name: Literal["resnet18", "densenet121"]


class Recurrent(Section):
    """``[model] name = "lstm" | "gru"``."""

    name: Literal["lstm", "gru"]
    hidden: int = Field(default=64, ge=4, le=1024)
    layers: Literal[1, 2, 3] = 1
    pooling: Literal["last", "mean"] = "last"
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Mlp(Section):
    """``[model] name = "mlp"``; ``hidden = []`` is logistic regression."""

    name: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = (32,)
    dropout: float = Field(default=0.0, ge=0, lt=1)


Model = Annotated[SmallCnn | DeepCnn | Recurrent | Mlp, Field(discriminator="name")]

MODELS_BY_DATA: dict[str, tuple[str, ...]] = {
    "image": ("small_cnn", "resnet18", "densenet121"),
    "events": ("lstm", "gru"),
    "table": ("mlp",),
}
DATA_BY_TASK = {
    "image_classification": "image",
    "ehr_sequence_classification": "events",
    "tabular_classification": "table",
}

__all__ = [
    "DATA_BY_TASK",
    "MODELS_BY_DATA",
    "DeepCnn",
    "EventSchema",
    "ImageSchema",
    "Mlp",
    "Model",
    "Recurrent",
    "Schema",
    "SmallCnn",
    "TableSchema",
    "Variable",
]
