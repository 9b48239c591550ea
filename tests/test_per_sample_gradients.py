"""The fast engine against a plain loop over single samples, in float64, layer by layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.unet import UNet
from torch import nn
from torch.nn import functional

from hospitium_client.training.clipping.clipped_sum import clipped_sum
from hospitium_client.training.clipping.fast import check_layers, contributions
from hospitium_client.training.clipping.opacus_hooks import OpacusHooks
from hospitium_common.errors import ConfigError
from hospitium_common.models import build
from hospitium_common.models.deep_cnn import ResidualBlock
from tests.test_models import CASES, inputs_for, study_for

FEW = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCE = 1e-5


def squares(logits):
    """A loss that weighs every output differently, so that no gradient cancels."""
    flat = logits.flatten(1)
    return ((flat - torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)) ** 2).sum(1)


def by_loop(model, inputs, loss=squares):
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for one in range(len(inputs)):
        grads = torch.autograd.grad(
            loss(model(inputs[one : one + 1])).sum(), parameters, allow_unused=True
        )
        flat = [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)
        ]
        rows.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(rows).detach()


def flattened(model, result):
    found = {id(p): g for p, g in result.gradients}
    return torch.cat([found[id(p)].flatten() for p in model.parameters() if p.requires_grad])


def assert_exact(model, inputs, engine=contributions, loss=squares):
    """Norms and clipped sums equal the loop's, for single records and for patients with several."""
    model, batch = model.double(), len(inputs)
    if inputs.is_floating_point():
        inputs = inputs.double()
    each = by_loop(model, inputs, loss)
    owners = torch.arange(batch) // 2 if batch > 1 else torch.zeros(1, dtype=torch.int64)
    for unit_of in (torch.arange(batch), owners):
        units = int(unit_of[-1]) + 1
        weights = 1.0 / torch.bincount(unit_of)[unit_of].double()
        patients = each.new_zeros(units, each.shape[1])
        patients.index_add_(0, unit_of, each * weights[:, None])
        norms = patients.norm(dim=1)
        clip = float(norms.median()) + 1e-3
        found, _ = engine(model, inputs, loss)
        result = clipped_sum(found, unit_of=unit_of, units=units, weights=weights, clip_norm=clip)
        want = (patients * (clip / (norms + 1e-6)).clamp(max=1.0)[:, None]).sum(0)
        scale = float(norms.max()) + 1e-9
        assert float((result.norms - norms).detach().abs().max()) / scale < TOLERANCE
        assert (
            float((flattened(model, result) - want).norm()) / (float(want.norm()) + 1e-9)
            < TOLERANCE
        )
        assert result.dropped == 0
        assert not result.norms.requires_grad
        assert not any(gradient.requires_grad for _, gradient in result.gradients)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@FEW
@given(
    batch=st.integers(1, 4), positions=st.integers(0, 9), wide=st.integers(1, 7),
    tall=st.integers(1, 7), bias=st.booleans(),
)  # fmt: skip
def test_linear_layers_with_and_without_positions(batch, positions, wide, tall, bias):
    shape = (batch, positions, wide) if positions else (batch, wide)
    assert_exact(nn.Linear(wide, tall, bias=bias), torch.randn(shape))


CONVOLUTIONS = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


@settings(FEW, max_examples=80)
@given(
    dimensions=st.integers(1, 3), transposed=st.booleans(), batch=st.integers(1, 3),
    narrow=st.integers(1, 3), rows=st.integers(1, 3), groups=st.integers(1, 3),
    options=st.fixed_dictionaries({
        "kernel_size": st.integers(1, 3), "stride": st.integers(1, 3),
        "padding": st.integers(0, 2), "dilation": st.integers(1, 2), "bias": st.booleans(),
    }),
    mode=st.sampled_from(["zeros", "zeros", "same", "reflect", "replicate", "circular"]),
    longer=st.integers(0, 2),
)  # fmt: skip
def test_convolutions_of_every_kind(
    dimensions, transposed, batch, narrow, rows, groups, options, mode, longer
):
    if mode == "same" and not transposed:
        options = options | {"padding": "same", "stride": 1}
    elif mode != "zeros" and not transposed:
        options = options | {"padding_mode": mode}
    layer = CONVOLUTIONS[transposed][dimensions - 1](
        narrow * groups, rows * groups, groups=groups, **options
    )
    size = [5 + longer, 6, 5][:dimensions]
    assert_exact(nn.Sequential(layer, nn.Tanh()), torch.randn(batch, narrow * groups, *size))


@FEW
@given(
    channels=st.sampled_from([1, 3, 6, 12]), out=st.sampled_from([2, 12]),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 2), (5, 1)]), stride=st.integers(1, 2),
    padding=st.integers(0, 2), dilation=st.integers(1, 2), size=st.sampled_from([(9, 9), (10, 11)]),
)  # fmt: skip
def test_image_convolutions_of_every_width(channels, out, kernel, stride, padding, dilation, size):
    first = nn.Conv2d(2, channels, 1)
    second = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, dilation=dilation)
    assert_exact(nn.Sequential(first, nn.Tanh(), second), torch.randn(2, 2, *size))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(
    ("stride", "dilation", "padding"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 1, 0)]
)
def test_convolutions_with_more_channels_than_pixels(size, stride, dilation, padding):
    if padding == 0 and size < 3:
        size = 4
    layer = nn.Conv2d(48, 40, 3, stride=stride, dilation=dilation, padding=padding)
    assert_exact(layer, torch.randn(3, 48, size, size))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), (3, 3, 4, 4)),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (3, 3, 6, 6)),
        (nn.Conv3d(24, 20, 3, padding=1), (2, 24, 2, 2, 2)),
        (nn.GroupNorm(2, 6), (3, 6, 5, 4)),
        (nn.GroupNorm(2, 16), (3, 16, 5, 4)),
        (nn.GroupNorm(2, 6), (3, 6, 3, 2, 2)),
        (nn.GroupNorm(3, 6), (3, 6)),
        (nn.LayerNorm([5, 4]), (3, 6, 5, 4)),
        (nn.LayerNorm(4), (3, 4)),
        (nn.InstanceNorm2d(3, affine=True), (3, 3, 4, 4)),
        (nn.PReLU(3), (3, 3, 4)),
        (nn.Bilinear, None),
    ],
)
def test_every_other_layer(layer, shape):
    if shape is None:
        model = nn.Bilinear(2, 3, 4)

        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.pair = model

            def forward(self, inputs):
                return self.pair(inputs[:, :2], inputs[:, 2:])

        with pytest.raises(ConfigError, match="one tensor"):
            contributions(Pair(), torch.randn(2, 5), squares)
        return
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.2, 1.0)
    assert_exact(nn.Sequential(layer, nn.Tanh()), torch.randn(shape))


@pytest.mark.parametrize("padding", [None, 0])
def test_an_embedding_counts_repeated_words_once_per_use(padding):
    words = torch.tensor([[1, 1, 2], [0, 3, 3], [4, 4, 4]])
    assert_exact(nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Flatten()), words)


class Recurrent(nn.Module):
    def __init__(self, layer, wide):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(wide, 2)

    def forward(self, inputs):
        states = self.layer(inputs)[0]
        time = 1 if self.layer.batch_first else 0
        return self.head(states.select(time, -1) + states.mean(time))


@FEW
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU]), batch=st.integers(1, 4), steps=st.integers(1, 20),
    features=st.integers(1, 5), hidden=st.integers(1, 6), layers=st.integers(1, 3),
    both=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_recurrent_layers_of_every_shape(kind, batch, steps, features, hidden, layers, both, bias):
    layer = kind(features, hidden, layers, batch_first=True, bidirectional=both, bias=bias)
    assert_exact(Recurrent(layer, hidden * (2 if both else 1)), torch.randn(batch, steps, features))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_recording_forward_is_the_layers_own(kind):
    model = Recurrent(kind(5, 8, 2, batch_first=True), 8)
    inputs, seen = torch.randn(4, 7, 5), []
    contributions(model, inputs, lambda logits: seen.append(logits) or squares(logits))
    torch.testing.assert_close(seen[0], model(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if "lstm" in c or "gru" in c])
def test_shuffled_lengths_give_every_patient_the_same_gradient(case):
    """Packed sequences reorder a batch by length; ours stay where they are."""
    study = study_for(case)
    model, inputs = build(study).double().eval(), inputs_for(study, 6).double()
    lengths = torch.tensor([3, 1, 5, 2, 4, 6])
    inputs = inputs[:, : int(lengths.max())].clone()
    inputs[..., -1] = (torch.arange(inputs.shape[1]) < lengths[:, None]).double()
    inputs[..., :-1] *= inputs[..., -1:]
    assert_exact(model, inputs)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    norms = [
        clipped_sum(
            contributions(model, x, squares)[0], unit_of=torch.arange(6), units=6,
            weights=torch.ones(6).double(), clip_norm=1.0,
        ).norms
        for x in (inputs, inputs[order])
    ]  # fmt: skip
    torch.testing.assert_close(norms[0][order], norms[1])


@pytest.mark.parametrize("case", list(CASES))
def test_every_model_of_the_house(case):
    study = study_for(case)
    assert_exact(build(study).eval(), inputs_for(study, 2))


@pytest.mark.parametrize("case", [c for c in CASES if "resnet" not in c])
def test_opacus_finds_the_same_clipped_sums(case):
    study = study_for(case)
    model = build(study).double()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    assert_exact(model, inputs_for(study, 4), OpacusHooks(model).contributions)


def test_opacus_follows_the_residual_blocks_of_the_house():
    model = res_net(2, ResidualBlock).double()
    model.act = nn.ReLU()  # at the entrance, where the house asks MONAI for the same
    assert_exact(model, torch.randn(2, 1, 16, 16), OpacusHooks(model).contributions)


@pytest.mark.parametrize("size", [(5, 4), (5, 4, 3), (40, 30)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_gives_what_the_layer_gives(size, groups):
    model = nn.Sequential(nn.GroupNorm(groups, 8))
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 2.0)
        model[0].bias.normal_()
    inputs, seen = torch.randn(3, 8, *size) * 2 + 3, []
    contributions(model, inputs, lambda out: seen.append(out) or squares(out))
    torch.testing.assert_close(seen[0], model(inputs), rtol=1e-4, atol=1e-4)


def u_net(dimensions):
    return UNet(
        dimensions, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1,
        norm=("group", {"num_groups": 2}),
    )  # fmt: skip


def dense_net(dimensions):
    return DenseNet(
        dimensions, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2), bn_size=2,
        norm=("group", {"num_groups": 4}), act=("relu", {"inplace": True}),
    )  # fmt: skip


def res_net(dimensions, block="bottleneck"):
    network = ResNet(
        block, [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=dimensions, n_input_channels=1,
        num_classes=2, conv1_t_size=3, conv1_t_stride=1,
    )  # fmt: skip
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, nn.GroupNorm(2, layer.num_features))
    return network


@pytest.mark.parametrize("network", [u_net, dense_net, res_net])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_networks_from_monai_train_privately(network, dimensions):
    model, side = network(dimensions), 16 if dimensions == 2 else 8
    check_layers(model)
    assert_exact(model, torch.randn(2, 1, *[side] * dimensions))


@pytest.mark.parametrize("case", list(CASES))
def test_everything_is_computed_where_the_model_is(case):
    """On torch's device without memory, one tensor made on the processor would raise."""
    study = study_for(case)
    model, inputs = build(study).to("meta"), inputs_for(study, 3).to("meta")
    found, losses = contributions(model, inputs, lambda logits: logits.square().sum(1))
    factors = losses.new_ones(3)
    assert all(one.squared_norms().shape == (3,) for one in found)
    sums = {id(p): (p, total) for one in found for p, total in one.weighted_sum(factors)}
    assert sums.keys() == {id(p) for p in model.parameters()}
    assert all(total.is_meta and total.shape == p.shape for p, total in sums.values())


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(96, 2))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    found, _ = contributions(model.double(), torch.randn(3, 2, 6, 6).double(), squares)
    result = clipped_sum(
        found, unit_of=torch.arange(3), units=3, weights=torch.ones(3).double(), clip_norm=1.0
    )
    assert {id(p) for p, _ in result.gradients} == {
        id(p) for p in (model[1].weight, model[3].weight, model[3].bias)
    }
    each = by_loop(model, torch.randn(1, 2, 6, 6).double())
    assert each.shape[1] == 6 + 96 * 2 + 2


def test_layers_that_mix_records_are_refused_by_name():
    for layer in (nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)):
        with pytest.raises(ConfigError, match=r"'1'.*mixes the records"):
            check_layers(nn.Sequential(nn.Conv2d(3, 3, 1), layer))


def test_shared_and_repeated_and_hidden_parameters_are_refused():
    one = nn.Linear(3, 3)
    twin = nn.Linear(3, 3)
    twin.weight = one.weight
    with pytest.raises(ConfigError, match="share a parameter"):
        check_layers(nn.Sequential(one, twin))
    with pytest.raises(ConfigError, match="used twice"):
        contributions(nn.Sequential(one, nn.ReLU(), one), torch.randn(2, 3), squares)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, inputs):
            return functional.linear(inputs, self.layer.weight)

    with pytest.raises(ConfigError, match="no forward call"):
        contributions(Functional(), torch.randn(2, 3), squares)
    assert all(p.requires_grad for p in one.parameters())


def test_a_layer_that_changes_its_input_in_place_is_no_trouble():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    assert_exact(model, torch.randn(4, 1, 6, 6))
    with pytest.raises(ConfigError, match="in place"):
        OpacusHooks(model).contributions(model, torch.randn(4, 1, 6, 6).double(), squares)


def test_gradients_that_cancel_over_time_never_look_shorter_than_they_are():
    """Two large opposite terms leave a small gradient; Gram matrices would lose it to rounding."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 2, 40) * 1e3
    inputs[:, 1] = -inputs[:, 0] + torch.randn(8, 40) * 1e-2
    layer = nn.Linear(40, 40, bias=False)
    total = nn.Sequential(layer)
    found, _ = contributions(total, inputs, lambda out: out.sum((1, 2)))
    exact = by_loop(total.double(), inputs.double(), lambda out: out.sum((1, 2))).norm(dim=1)
    assert bool((found[0].squared_norms().sqrt().double() >= exact * (1 - 1e-4)).all())
