"""A study in plain words, for the people who have to agree to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from hospitium_common.study.schema import EventSchema, ImageSchema, TableSchema

if TYPE_CHECKING:
    from hospitium_common.study import Study

STRATEGIES = {
    "fedavg": "the weighted mean of the updates (FedAvg)",
    "fedprox": "the weighted mean of updates that were held near the shared model (FedProx)",
    "fedavgm": "the weighted mean with server momentum (FedAvgM)",
    "fedadam": "an adaptive step along the mean update (FedAdam)",
    "fedyogi": "an adaptive step along the mean update (FedYogi)",
    "fedadagrad": "an adaptive step along the mean update (FedAdagrad)",
}


def explain(study: Study) -> tuple[tuple[str, str], ...]:
    """Return (question, answer) pairs: what is trained on what, what leaves, what is promised."""
    return (
        ("What is it for?", f"{study.study.title}. {study.study.purpose}".strip()),
        ("What is predicted?", _prediction(study)),
        ("What does a hospital bring?", _data(study)),
        ("What is trained?", _training(study)),
        ("What leaves a hospital?", _leaving(study)),
        ("What is promised?", promise(study)),
        ("Who has to be there?", _cohort(study)),
        ("What if a hospital does harm?", _robustness(study)),
        ("Which study is this exactly?", f"SHA-256 {study.digest.hex()}"),
    )


def promise(study: Study) -> str:
    """Return the privacy promise in one sentence."""
    privacy = study.privacy
    if not study.is_private:
        return (
            f"No differential privacy: only sums over {_summed(study)} leave the hospitals' masks, "
            "but nothing bounds what such a sum tells about one patient."
        )
    delta = "1/N^1.1 for a hospital's N patients" if privacy.delta is None else f"{privacy.delta:g}"
    unit = "patient" if privacy.unit == "patient" else "single record (not: patient)"
    return (
        f"Whatever anyone learns from all model updates of a hospital over the whole study would "
        f"have been nearly as likely without any one {unit}: epsilon {privacy.epsilon:g}, delta "
        f"{delta}, {_noise(study)}; counts and scores leave as exact "
        f"totals over {_summed(study)} and are not part of this promise."
    )


def _noise(study: Study) -> str:
    if not study.noise_is_distributed:
        return "with the noise added inside the hospital"
    honest = study.privacy.honest_sites
    return (
        f"with a share of the noise (1/√{honest}) added inside each hospital. No hospital keeps "
        f"this promise alone: it holds for the sum over {_summed(study)} if at least {honest} of "
        "the hospitals in it keep to the protocol and do not share what they know with the "
        "coordinator, and it is weaker if fewer do"
    )


def _summed(study: Study) -> str:
    """Return over whom the sums go that the coordinator can see."""
    return "the whole cohort" if study.robustness.groups == 1 else "the hospitals of one group"


def _prediction(study: Study) -> str:
    classes = ", ".join(study.task.classes)
    if study.task.labels == "multi":
        return f"Any number of: {classes}."
    return f"Exactly one of: {classes}."


def _data(study: Study) -> str:
    data = study.data
    if isinstance(data, ImageSchema):
        colour = "grey" if data.channels == 1 else "colour"
        return f"{colour.capitalize()} images, resized to {data.size[0]}×{data.size[1]} pixels."
    if isinstance(data, EventSchema):
        names = ", ".join(variable.name for variable in data.variables)
        known = ", ".join(variable.name for variable in data.statics) or "nothing"
        return (
            f"{data.window_hours:g} hours in steps of {data.step_hours:g} h of {names}; known at "
            f"admission: {known}."
        )
    if isinstance(data, TableSchema):
        return "One row per record: " + ", ".join(column.name for column in data.columns) + "."
    assert_never(data)


def _training(study: Study) -> str:
    training = study.training
    batch = (
        f"{training.batch_size}"
        if training.sampling_rate is None
        else f"{training.sampling_rate:.2%} of its patients"
    )
    length = (
        f"{training.local_steps} steps"
        if training.local_steps is not None
        else f"{training.local_epochs:g} passes over its training patients"
    )
    return (
        f"A {study.model.name}, {study.rounds} rounds; in each, every hospital makes {length} in "
        f"batches of {batch} with {training.optimizer}; the coordinator then takes "
        f"{STRATEGIES[study.strategy.name]}.{_beginning(study)}"
    )


def _beginning(study: Study) -> str:
    given = study.pretrained
    if given is None:
        return ""
    frozen = f", of which {', '.join(given.frozen)} are not trained" if given.frozen else ""
    return f" It begins from the weights file with SHA-256 {given.sha256}{frozen}."


def _leaving(study: Study) -> str:
    return (
        "Masked numbers only. The coordinator can remove the masks from the sum over "
        f"{_summed(study)}, never from one hospital's part. Sums of: the change of the model, "
        "record counts, feature means for normalisation, losses, confusion counts and score "
        "histograms. No record, no patient, no single hospital's figure."
    )


def _robustness(study: Study) -> str:
    rules, cohort = study.robustness, study.cohort
    parts = [
        f"No hospital counts for more than {cohort.weight_cap} records, and a mean update that is "
        "out of all proportion to the rounds before is not used."
    ]
    if rules.update_norm is not None:
        parts.append(
            f"Every hospital scales its update down to a norm of {rules.update_norm:g} before it "
            "is masked; a longer mean is not used."
        )
    if rules.gate is not None:
        parts.append(
            f"A round after which the validation {rules.gate_metric} is worse by more than "
            f"{rules.gate:g} is undone."
        )
    if rules.groups > 1:
        how = (
            "their median, coordinate by coordinate"
            if rules.combine == "median"
            else "their mean without the extremes of every coordinate"
        )
        smallest = max(cohort.minimum_sites, 3)
        parts.append(
            f"The updates are added up in {rules.groups} fixed groups and the model takes {how}, "
            "so that one bad group does not decide. The price is privacy: the coordinator sees "
            f"the sum of every group, of as few as {smallest} hospitals instead of the whole "
            "cohort, and a group's counts and scores too."
        )
    else:
        parts.append("One hospital's update still enters the mean: harm is bounded, not excluded.")
    return " ".join(parts)


def _cohort(study: Study) -> str:
    cohort = study.cohort
    each = "" if study.robustness.groups == 1 else " in every group"
    return (
        f"At least {cohort.minimum_sites} hospitals{each}, and more than two thirds of those "
        f"invited; otherwise the round does not happen. At most {cohort.maximum_sites} take part."
    )
