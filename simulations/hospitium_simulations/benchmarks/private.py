"""Private training against plain PyTorch and Opacus: seconds per step, and peak memory.

Every side runs the same model on the same batch in one process and one thread, all sides in turn,
and the fastest of several rounds counts. Plain is the faster of the usual and the channels-last
layout, with the fused recurrent layers of torch. Memory is what one step adds to the process's
resident set, each measured in a process of its own.
"""

from __future__ import annotations

import copy
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.clipped_sum import clipped_sum
from hospitium_client.training.clipping.contributions import Instantiated
from hospitium_client.training.clipping.fast import contributions
from hospitium_client.training.clipping.opacus_hooks import with_private_recurrence
from hospitium_client.training.noise import SecureNoise
from hospitium_common.models.deep_cnn import deep_cnn
from hospitium_common.models.recurrent import RecurrentClassifier
from hospitium_common.models.small_cnn import small_cnn
from hospitium_common.study.schema import DeepCnn, Recurrent, SmallCnn
from hospitium_simulations.benchmarks.results import Result, publish

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 64
CLIP_NORM = 1.0
TARGETS = {
    "small CNN 28×28": 1.35,
    "ResNet-18 28×28": 1.6,
    "ResNet-18 64×64": 1.6,
    "LSTM 48×40, hidden 128": 1.35,
    "GRU 48×40, hidden 128": 1.3,
}
MEMORY_TARGET = 1.5
NOISE_TARGET = 0.1
ROUNDS = {"ResNet-18 28×28": 4, "ResNet-18 64×64": 2}
USUAL_ROUNDS = 25


def subject(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model and a batch for it."""
    if "ResNet" in name:
        size = int(name[-2:])
        network = deep_cnn(DeepCnn(name="resnet18"), channels=1, size=(size, size), classes=2)
        return network, torch.randn(BATCH, 1, size, size)
    if "CNN" in name:
        options = SmallCnn(name="small_cnn", dropout=0.0)
        return small_cnn(options, channels=1, classes=2), torch.randn(BATCH, 1, 28, 28)
    kind = Recurrent(
        name="lstm" if "LSTM" in name else "gru", hidden=128, layers=1, dropout=0.0, pooling="last"
    )
    inputs = torch.randn(BATCH, 48, 40)
    inputs[..., -1] = 1.0
    return RecurrentClassifier(kind, features=40, classes=2), inputs


def _losses(logits: Tensor) -> Tensor:
    targets = torch.arange(BATCH) % 2
    return functional.cross_entropy(logits, targets, reduction="none")


def sides(name: str) -> dict[str, Callable[[], object]]:
    """Return one step of every side; those that cannot train the model are left out."""
    model, inputs = subject(name)
    found: dict[str, Callable[[], object]] = {"plain": _plain(copy.deepcopy(model), inputs)}
    if inputs.dim() == 4:
        last = torch.channels_last
        twin = copy.deepcopy(model).to(memory_format=last)  # type: ignore[call-overload]  # missing in torch's stub
        found["plain, channels last"] = _plain(twin, inputs.contiguous(memory_format=last))
    found["ours"] = lambda: _ours(model, inputs)
    hooked = GradSampleModule(with_private_recurrence(copy.deepcopy(model)), loss_reduction="sum")
    ghost = GradSampleModuleFastGradientClipping(
        with_private_recurrence(copy.deepcopy(model)), max_grad_norm=CLIP_NORM, loss_reduction="sum"
    )
    for label, step in (
        ("Opacus hooks", lambda: _hooks(hooked, inputs)),
        ("Opacus ghost", lambda: _ghost(ghost, inputs)),
    ):
        if _runs(step):
            found[label] = step
    return found


def _runs(step: Callable[[], object]) -> bool:
    """Whether a side can train the model: Opacus refuses layers that work in place."""
    try:
        step()
    except RuntimeError:
        return False
    return True


def _plain(model: nn.Module, inputs: Tensor) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        _losses(model(inputs)).mean().backward()  # type: ignore[no-untyped-call]  # torch types backward so

    return step


def _ours(model: nn.Module, inputs: Tensor) -> object:
    return _clipped(contributions(model, inputs, _losses)[0])


def _clipped(found: object) -> object:
    return clipped_sum(
        found,  # type: ignore[arg-type]  # a list of contributions, whichever engine made it
        unit_of=torch.arange(BATCH),
        units=BATCH,
        weights=torch.ones(BATCH),
        clip_norm=CLIP_NORM,
    )


def _hooks(model: GradSampleModule, inputs: Tensor) -> None:
    model.zero_grad()
    _losses(model(inputs)).sum().backward()  # type: ignore[no-untyped-call]  # torch types backward so
    gradients = [(p, p.grad_sample) for p in model.parameters()]
    _clipped([Instantiated(gradients)])
    for parameter in model.parameters():
        parameter.grad_sample = None


def _ghost(model: GradSampleModuleFastGradientClipping, inputs: Tensor) -> None:
    model.zero_grad()
    losses = _losses(model(inputs))
    losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]  # torch types backward so
    model.zero_grad()
    factors = model.get_clipping_coef()
    model.disable_hooks()
    (factors * losses).sum().backward()
    model.enable_hooks()


def _fastest(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side and round; the sides take turns."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            begin = time.perf_counter()
            step()
            times[label].append(time.perf_counter() - begin)
    return times


def _memory(name: str, label: str, answer: object) -> None:
    """Report by how many KiB the process grew at its highest, over two steps of one side."""
    torch.set_num_threads(1)
    model, inputs = subject(name)
    step = _plain(model, inputs) if label == "plain" else lambda: _ours(model, inputs)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _resident("VmRSS")
    step()
    step()
    answer.put(_resident("VmHWM") - before)  # type: ignore[attr-defined]  # a multiprocessing queue


def _resident(field: str) -> int:
    """Return a field of the process's memory status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _peak(name: str, label: str) -> int:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_memory, args=(name, label, answer))
    process.start()
    grown: int = answer.get()
    process.join()
    return grown


def measure(name: str, table: Table) -> list[Result]:
    """Measure one model; add its line to the table and return its figures."""
    times = _fastest(sides(name), ROUNDS.get(name, USUAL_ROUNDS))
    best = {label: min(values) for label, values in times.items()}
    plain = min(seconds for label, seconds in best.items() if label.startswith("plain"))
    noise = sorted(times["plain"])[len(times["plain"]) // 2] / best["plain"] - 1
    parameters = sum(p.numel() for p in subject(name)[0].parameters())
    source = SecureNoise(bytes(32))
    drawing = min(_fastest({"": lambda: source.normal((parameters,), 1.0)}, 5)[""])
    memory = _peak(name, "ours") / _peak(name, "plain")
    ratio, target = best["ours"] / plain, TARGETS[name]
    others = [best.get(label, float("nan")) / plain for label in ("Opacus hooks", "Opacus ghost")]
    table.add_row(
        name, f"{BATCH / plain:,.0f}/s", *(f"{value:.2f}" for value in others), f"{ratio:.2f}",
        f"{target:g}", f"{memory:.2f}", f"{drawing / best['ours']:.1%}", f"{noise:.0%}",
    )  # fmt: skip
    return [
        Result(f"{name}: ours / plain, time", ratio, "ratio", target),
        Result(f"{name}: ours / plain, peak memory", memory, "ratio", MEMORY_TARGET),
        Result(f"{name}: secure noise / step", drawing / best["ours"], "share", NOISE_TARGET),
        *(
            Result(f"{name}: {label} / plain, time", value, "ratio", None)
            for label, value in zip(("Opacus hooks", "Opacus ghost"), others, strict=True)
            if value == value  # not a number where Opacus cannot train the model
        ),
    ]  # fmt: skip


def main() -> None:
    """Measure every model, print the table and write the figures."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = Table(title=f"Time of a private step over a plain one (batch {BATCH}, one thread)")
    for column in (
        "model", "plain", "Opacus hooks", "Opacus ghost", "ours", "at most", "memory",
        "secure noise", "machine noise",
    ):  # fmt: skip
        table.add_column(column)
    figures = [figure for name in TARGETS for figure in measure(name, table)]
    Console(width=130).print(table)
    publish("private", figures)


if __name__ == "__main__":
    main()
