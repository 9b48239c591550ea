"""Every model of the house: shapes, independence of a batch's records, the same first weights."""

import pytest
import torch

from hospitium_common.models import build, is_norm_parameter, load_tensors, tensors_of
from hospitium_common.parameters import Layout
from hospitium_common.study import Study

EVENTS = {
    "window_hours": 6,
    "step_hours": 1,
    "variables": [{"name": "heart rate", "low": 20, "high": 250}],
    "statics": [{"name": "age", "low": 0, "high": 120}],
}
TABLE = {"columns": [{"name": "age", "low": 0, "high": 120}], "missing": "mask"}
CASES = {
    "small cnn, grey": ("image", {"channels": 1, "size": [28, 28]}, {"name": "small_cnn"}),
    "small cnn, colour": ("image", {"channels": 3, "size": [9, 17]}, {"name": "small_cnn"}),
    "small cnn, standardised": (
        "image",
        {"channels": 1, "size": [12, 12]},
        {"name": "small_cnn", "width": 8, "norm_groups": 1, "weight_standardisation": True},
    ),
    "resnet, small": ("image", {"channels": 1, "size": [28, 28]}, {"name": "resnet18"}),
    "resnet, large": ("image", {"channels": 3, "size": [96, 80]}, {"name": "resnet18"}),
    "densenet, small": ("image", {"channels": 1, "size": [28, 28]}, {"name": "densenet121"}),
    "lstm, last state": ("ehr_sequence", EVENTS, {"name": "lstm", "layers": 2}),
    "gru, mean state": ("ehr_sequence", EVENTS, {"name": "gru", "pooling": "mean"}),
    "mlp": ("tabular", TABLE, {"name": "mlp", "hidden": [8, 4]}),
    "logistic regression": ("tabular", TABLE, {"name": "mlp", "hidden": []}),
}


def study_for(case: str) -> Study:
    kind, data, model = CASES[case]
    return Study.model_validate(
        {
            "format": 1,
            "rounds": 2,
            "study": {"id": "a-study", "title": "A study"},
            "task": {"kind": f"{kind}_classification", "classes": ["a", "b", "c"]},
            "data": data,
            "model": model,
            "training": {"local_epochs": 1},
            "privacy": {"mode": "none"},
        }
    )


def inputs_for(study: Study, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if study.data.kind == "image":
        shape = (batch, study.data.channels, *study.data.size)
        return torch.rand(shape, generator=generator)
    if study.data.kind == "table":
        return torch.rand(batch, study.data.features, generator=generator)
    inputs = torch.rand(batch, study.data.steps, study.data.features, generator=generator)
    for record in range(batch):
        inputs[record, 1 + record % study.data.steps :] = 0.0
        inputs[record, : 1 + record % study.data.steps, -1] = 1.0
    return inputs


@pytest.mark.parametrize("case", CASES)
def test_a_record_gets_the_same_logits_alone_and_in_company(case):
    study = study_for(case)
    model = build(study)  # in training mode: no model of the house has dropout by default
    assert not list(model.buffers())
    inputs = inputs_for(study, 5)
    together = model(inputs)
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(5)])
    assert together.shape == (5, 3)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["small cnn, grey", "lstm, last state", "mlp"])
def test_every_site_starts_from_the_same_weights_and_leaves_the_global_generator_alone(case):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first, second = (tensors_of(build(study_for(case))) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("case", ["lstm, last state", "gru, mean state"])
def test_what_stands_in_the_padding_does_not_matter(case):
    study = study_for(case)
    model = build(study).eval()
    inputs = inputs_for(study, 4)
    garbled = inputs.clone()
    garbled[..., :-1] += 100.0 * (1.0 - inputs[..., -1:])
    torch.testing.assert_close(model(inputs), model(garbled))


def test_a_model_survives_the_trip_through_a_flat_vector():
    study = study_for("gru, mean state")
    model = build(study)
    tensors = tensors_of(model)
    layout = Layout.of(tensors)
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.size,) == (sum(p.numel() for p in model.parameters()),)
    load_tensors(model, layout.unflatten(vector * 2))
    assert all((tensors_of(model)[name] == 2 * tensors[name]).all() for name in tensors)


def test_norm_layers_are_told_apart():
    model = build(study_for("small cnn, grey"))
    norms = [name for name, _ in model.named_parameters() if is_norm_parameter(name, model)]
    assert norms == ["1.weight", "1.bias", "5.weight", "5.bias", "9.weight", "9.bias"]


def test_standardised_filters_do_not_depend_on_the_scale_and_the_mean_of_their_weights():
    model = build(study_for("small cnn, standardised")).eval()
    inputs = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    before = model(inputs)
    with torch.no_grad():
        weight = model[0].weight
        weight.mul_(3.0).add_(0.5)
    torch.testing.assert_close(model(inputs), before, rtol=1e-2, atol=1e-3)
