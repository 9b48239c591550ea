"""Local training: losses that do not mix records, optimizers, augmentation, repeatability."""

import pytest
import torch

from hospitium_client.samples import Samples
from hospitium_client.training.augment import light
from hospitium_client.training.local import train_without_privacy
from hospitium_client.training.losses import per_sample_loss
from hospitium_client.training.optimizers import local_optimizer
from hospitium_common.entropy import seeded_entropy
from hospitium_common.models import build, tensors_of
from hospitium_common.study import parse_study
from tests.test_study import edited


def plain(extra: str = "") -> str:
    """The template without privacy, and with the gentler training that fits it then."""
    text = edited("epsilon = 8.0", "").replace('mode = "dp"', 'mode = "none"')
    for private, gentle in (
        ("rounds = 40 ", "rounds = 20 "), ("width = 16", "width = 32"),
        ("local_steps = 4 ", "local_epochs = 1 "), ("batch_size = 512", "batch_size = 64"),
        ("learning_rate = 1.0", "learning_rate = 0.05"), ("momentum = 0.0", "momentum = 0.9"),
        ('name = "fedavgm"', 'name = "fedavg"'), ("norm_groups = 1 ", "# norm_groups "),
        ("weight_standardisation = true", "# weight_standardisation"),
    ):  # fmt: skip
        assert private in text
        text = text.replace(private, gentle)
    return text.replace("[privacy]", f"{extra}\n[privacy]")


def films(count: int = 40) -> Samples:
    """Bright films are ill, dark ones are not."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(count) % 2
    noise = torch.rand(count, 1, 28, 28, generator=generator)
    inputs = noise * 0.5 + 0.5 * targets.view(-1, 1, 1, 1)
    return Samples(inputs=inputs, targets=targets, patients=torch.arange(count))


def test_class_weights_scale_a_records_loss_whoever_stands_beside_it():
    study = parse_study(plain("class_weights = [1.0, 3.0]"))
    loss = per_sample_loss(study)
    logits = torch.zeros(3, 2)
    # ln 2 for even odds, times 1/2 and 3/2: the weights divided by their mean 2
    expected = torch.tensor([0.5, 1.5, 1.5]) * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(loss(logits, torch.tensor([0, 1, 1])), expected)
    torch.testing.assert_close(loss(logits[:1], torch.tensor([1])), expected[1:2])


def test_independent_labels_add_their_losses():
    study = parse_study(plain().replace('labels = "exclusive"', 'labels = "multi"'))
    losses = per_sample_loss(study)(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(losses, 2 * torch.log(torch.tensor([2.0])))


@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.05), ("adam", 0.003), ("rmsprop", 0.0005)])
def test_every_optimizer_learns_what_is_bright(name, rate):
    text = plain().replace('optimizer = "sgd"', f'optimizer = "{name}"')
    text = text.replace("momentum = 0.9", "momentum = 0.0").replace(
        "batch_size = 64", "batch_size = 8"
    )
    text = text.replace("learning_rate = 0.05", f"learning_rate = {rate}")
    study, samples = parse_study(text.replace("local_epochs = 1", "local_epochs = 3")), films()
    model = build(study)
    first = train_without_privacy(model, samples, study, 1, entropy=seeded_entropy(b"a"))
    second = train_without_privacy(model, samples, study, 1, entropy=seeded_entropy(b"b"))
    assert first.steps == 15
    assert second.mean_loss < 0.9 * first.mean_loss


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone():
    study, samples = parse_study(plain().replace("width = 32", "width = 8\ndropout = 0.3")), films()
    results = []
    state = torch.random.get_rng_state()
    for _ in range(2):
        model = build(study)
        train_without_privacy(model, samples, study, 1, entropy=seeded_entropy(b"same"))
        results.append(tensors_of(model))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all((results[0][name] == results[1][name]).all() for name in results[0])


def test_the_schedule_reaches_the_optimizer():
    study = parse_study(plain())
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    rates = [local_optimizer(study, parameters, r).param_groups[0]["lr"] for r in (1, 11, 20)]
    assert rates == pytest.approx([0.05, 0.025, 0.0003], abs=5e-5)


def test_the_proximal_pull_keeps_the_model_nearer_to_where_it_began():
    samples, distances = films(), []
    for mu in (None, 5.0):
        text = plain()
        if mu:
            text = text.replace('name = "fedavg"', f'name = "fedprox"\nproximal_mu = {mu}')
        study = parse_study(text.replace("local_epochs = 1", "local_epochs = 4"))
        model = build(study)
        begin = tensors_of(model)
        train_without_privacy(model, samples, study, 1, entropy=seeded_entropy(b"a"))
        end = tensors_of(model)
        distances.append(sum(float(((end[n] - begin[n]) ** 2).sum()) for n in begin) ** 0.5)
    assert distances[1] < 0.8 * distances[0]


def test_augmentation_moves_each_picture_on_its_own():
    images = films(6).inputs
    both = light(images, torch.Generator().manual_seed(1))
    changed = images.clone()
    changed[3:] = 0.0
    again = light(changed, torch.Generator().manual_seed(1))
    assert both.shape == images.shape
    torch.testing.assert_close(both[:3], again[:3])
    assert float((both - images).abs().mean()) > 0.01
