"""Server optimizers against torch and by hand, and aggregates that must not be applied."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hospitium_common.errors import PeerProtocolError
from hospitium_server import aggregation
from tests.federation_kit import study_of

ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
ROUNDS = 6


def study_with(name, **more):
    if name == "fedprox":
        more["proximal_mu"] = 0.1
    return study_of(strategy={"name": name, **more})


def updates(size=5, rounds=ROUNDS):
    """Mean updates of several rounds, of very different sizes, with zeros and sign changes."""
    generator = np.random.default_rng(7)
    drawn = generator.normal(size=(rounds, size)) * 10.0 ** generator.integers(-4, 1, size)
    drawn[2, 0] = 0.0
    return drawn


def walk(study, given, start=None):
    """Apply the updates one after another; return the parameters after each."""
    parameters = np.zeros(given.shape[1], np.float32) if start is None else start
    state, path = aggregation.start(study, given.shape[1]), []
    for update in given:
        state, parameters = aggregation.apply(study, state, parameters, update)
        path.append(parameters)
    return np.array(path)


def walk_in_torch(optimizer_of, given, prepare=None):
    """The same walk by a torch optimizer whose gradient is minus the mean update."""
    parameter = torch.zeros(given.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_of([parameter])
    if prepare:
        prepare(optimizer, parameter)
    path = []
    for update in given:
        parameter.grad = -torch.tensor(update)
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_averaging_adds_the_mean_update(name):
    study = study_with(name)
    moved = walk(study, np.array([[0.5, -2.0], [0.25, 1.0]]), np.array([1.0, 1.0], np.float32))
    np.testing.assert_array_equal(moved, [[1.5, -1.0], [1.75, 0.0]])


@pytest.mark.parametrize("rate", [0.1, 1.0, 2.5])
def test_averaging_with_a_server_rate_is_plain_gradient_descent(rate):
    expected = walk_in_torch(lambda p: torch.optim.SGD(p, lr=rate), updates())
    moved = walk(study_with("fedavg", server_learning_rate=rate), updates())
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_fedavgm_is_gradient_descent_with_momentum(momentum):
    expected = walk_in_torch(lambda p: torch.optim.SGD(p, lr=0.3, momentum=momentum), updates())
    study = study_with("fedavgm", server_learning_rate=0.3, server_momentum=momentum)
    np.testing.assert_allclose(walk(study, updates()), expected, rtol=1e-5, atol=1e-7)


def test_fedadagrad_without_momentum_is_torchs_adagrad():
    tau = 0.01
    expected = walk_in_torch(
        lambda p: torch.optim.Adagrad(p, lr=0.2, initial_accumulator_value=tau**2, eps=tau),
        updates(),
    )
    study = study_with("fedadagrad", server_learning_rate=0.2, beta_1=0.0, tau=tau)
    np.testing.assert_allclose(walk(study, updates()), expected, rtol=1e-5, atol=1e-7)


def test_fedadam_without_momentum_is_torchs_rmsprop_begun_at_tau_squared():
    tau, beta_2 = 0.01, 0.95

    def begin(optimizer, parameter):
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "square_avg": torch.full_like(parameter, tau**2).detach(),
        }

    expected = walk_in_torch(
        lambda p: torch.optim.RMSprop(p, lr=0.2, alpha=beta_2, eps=tau), updates(), begin
    )
    study = study_with("fedadam", server_learning_rate=0.2, beta_1=0.0, beta_2=beta_2, tau=tau)
    np.testing.assert_allclose(walk(study, updates()), expected, rtol=1e-5, atol=1e-7)


def by_hand(name, given, *, rate, beta_1, beta_2, tau):
    """One coordinate, one number at a time: Reddi et al. 2021, algorithm 2."""
    position, momentum, variance, path = 0.0, 0.0, tau**2, []
    for update in given:
        momentum = beta_1 * momentum + (1 - beta_1) * update
        square = update * update
        if name == "fedadagrad":
            variance += square
        elif name == "fedadam":
            variance = beta_2 * variance + (1 - beta_2) * square
        else:
            sign = (variance > square) - (variance < square)
            variance -= (1 - beta_2) * square * sign
        position += rate * momentum / (math.sqrt(variance) + tau)
        path.append(position)
    return path


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_strategies_follow_algorithm_2_for_several_rounds(name):
    numbers = {"rate": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001}
    study = study_with(
        name, server_learning_rate=numbers["rate"], beta_1=0.9, beta_2=0.99, tau=0.001
    )
    moved = walk(study, updates())
    for coordinate in range(updates().shape[1]):
        expected = by_hand(name, updates()[:, coordinate].tolist(), **numbers)
        np.testing.assert_allclose(moved[:, coordinate], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "variances"),
    [
        # tau² = 1/4; updates 1 and then 1/4, beta_2 = 1/2
        ("fedadagrad", (1.25, 1.3125)),
        ("fedadam", (0.625, 0.34375)),
        ("fedyogi", (0.75, 0.71875)),  # 1/4 < 1: up by 1/2; 3/4 > 1/16: down by 1/32
    ],
)
def test_two_adaptive_steps_in_numbers_that_fit_on_paper(name, variances):
    study = study_with(name, server_learning_rate=1.0, beta_1=0.5, beta_2=0.5, tau=0.5)
    state, position = aggregation.start(study, 1), np.zeros(1, np.float32)
    walked = 0.0
    for update, momentum, variance in zip((1.0, 0.25), (0.5, 0.375), variances, strict=True):
        state, position = aggregation.apply(study, state, position, np.array([update]))
        assert state.first[0] == momentum
        assert state.second[0] == variance
        walked += momentum / (math.sqrt(variance) + 0.5)
        assert position[0] == pytest.approx(walked, rel=1e-6)


def test_yogi_leaves_a_variance_that_the_update_already_has():
    study = study_with("fedyogi", beta_1=0.5, beta_2=0.5, tau=0.5)
    state = aggregation.start(study, 1)
    state, _ = aggregation.apply(study, state, np.zeros(1, np.float32), np.array([-0.5]))
    assert state.second[0] == 0.25


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["fedavg", "fedprox", "fedavgm", *ADAPTIVE]),
    arrays.arrays(np.float64, (4, 3), elements=st.floats(-5, 5)),
)
def test_every_strategy_stays_finite_and_keeps_its_second_moments_positive(name, given):
    study = study_with(name)
    state, parameters = aggregation.start(study, 3), np.ones(3, np.float32)
    for update in given:
        before = parameters.copy(), state.first.copy(), state.second.copy()
        later, moved = aggregation.apply(study, state, parameters, update)
        for kept, was in zip((parameters, state.first, state.second), before, strict=True):
            np.testing.assert_array_equal(kept, was)  # a refused round must leave no trace
        state, parameters = later, moved
        assert parameters.dtype == np.float32
        assert np.isfinite(parameters).all()
        assert (state.second > 0).all()


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", *ADAPTIVE])
def test_an_update_of_nothing_at_the_start_moves_nothing(name):
    parameters = np.array([1.5, -2.5], np.float32)
    study = study_with(name)
    state = aggregation.start(study, 2)
    _, moved = aggregation.apply(study, state, parameters, np.zeros(2))
    np.testing.assert_array_equal(moved, parameters)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", *ADAPTIVE])
def test_every_strategy_walks_to_the_point_that_all_sites_pull_to(name):
    goal = np.array([1.0, -2.0, 0.5])
    study = study_with(name, server_learning_rate=0.2, server_momentum=0.5)
    state, parameters = aggregation.start(study, 3), np.zeros(3, np.float32)
    for _ in range(400):
        pull = 0.5 * (goal - parameters)
        state, parameters = aggregation.apply(study, state, parameters, pull)
    np.testing.assert_allclose(parameters, goal, atol=0.05)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("fedavg", 0, 0), ("fedprox", 0, 0), ("fedavgm", 4, 0)] + [(name, 4, 4) for name in ADAPTIVE],
)
def test_a_strategy_keeps_only_the_moments_that_it_uses(name, first, second):
    state = aggregation.start(study_with(name, tau=0.1), 4)
    assert (len(state.first), len(state.second)) == (first, second)
    assert not state.first.any()
    np.testing.assert_allclose(state.second, np.full(second, 0.01))


def test_the_model_moves_in_double_precision_and_is_rounded_once():
    # in float32 alone, 1/3 of 3e-8 beside 1 would be lost before the rate multiplied it
    study = study_with("fedavg", server_learning_rate=100.0)
    _, moved = aggregation.apply(
        study, aggregation.start(study, 1), np.ones(1, np.float32), np.array([1e-8])
    )
    assert moved[0] == np.float32(1 + 1e-6)


def test_the_norm_of_a_good_aggregate_is_returned():
    assert aggregation.check_aggregate(np.array([3.0, 4.0]), [], 5.0) == 5.0


REFUSED = {
    "holds NaN": ([math.nan, 0.0], [], 9.0, "finite"),
    "holds infinity": ([math.inf, 0.0], [], 9.0, "finite"),
    "is longer than clipping allows": ([3.0, 4.0], [], 4.9, "norm ≤ 4.9, got 5"),
    "is eleven times what was usual": ([11.0, 0.0], [0.5, 1.0, 90.0], 99.0, "poisoning"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_aggregate_is_refused_that(case):
    update, before, bound, message = REFUSED[case]
    with pytest.raises(PeerProtocolError, match=message):
        aggregation.check_aggregate(np.array(update), before, bound)


@pytest.mark.parametrize(
    ("norm", "before"), [(10.0, [0.5, 1.0, 2.0]), (50.0, [1.0, 1.0]), (50.0, [])]
)
def test_rounds_before_bound_an_aggregate_only_from_three_on_and_by_their_median(norm, before):
    assert aggregation.check_aggregate(np.array([norm]), before, 99.0) == norm


def test_the_moving_average_of_the_versions_by_hand():
    study = study_with("fedavg", averaging=0.75)
    state, parameters = aggregation.start(study, 1), np.zeros(1, np.float32)
    averages = []
    for update in (4.0, 4.0, -8.0):  # versions 4, 8, 0
        state, parameters = aggregation.apply(study, state, parameters, np.array([update]))
        averages.append(float(state.average[0]))
    assert averages == [4.0, 0.75 * 4 + 0.25 * 8, 0.75 * 5 + 0.25 * 0]


def test_no_average_is_kept_unless_the_study_asks_for_it():
    study = study_with("fedavg")
    state, _ = aggregation.apply(study, aggregation.start(study, 2), np.zeros(2, np.float32), ONES)
    assert len(state.average) == 0


ONES = np.ones(2)
