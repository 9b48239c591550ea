"""LSTM and GRU that keep what per-sample gradients need: fused forward, one pass back in time.

Time comes first inside (``[time, batch, ...]``), so that every step works on contiguous memory;
what does not depend on the step before is computed for all steps at once. tanh(x) is taken as
2·sigmoid(2x) − 1, so that one sigmoid serves all gates of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.recurrent_contribution import (
    Parameters,
    RecurrentGradients,
)

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

    from hospitium_client.training.clipping.recording import Recording


CACHED = 1 << 18
"""Gates are worked on in parts of about this many numbers, which stay in cache."""


def recorded_states(layer: nn.LSTM | nn.GRU, inputs: Tensor, recording: Recording) -> Tensor:
    """Return the layer's states ``[batch, time, hidden]`` like the layer itself does.

    Its contributions are recorded on the way back.
    """
    kind = _Lstm if isinstance(layer, nn.LSTM) else _Gru
    states = inputs.transpose(0, 1) if layer.batch_first else inputs
    for depth in range(layer.num_layers):
        directions = []
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            weights = [
                getattr(layer, f"{name}_l{depth}{suffix}", None)
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            given = states.flip(0) if suffix else states
            out = kind.apply(given.contiguous(), recording.anchor, recording, *weights)  # type: ignore[no-untyped-call]  # torch types apply so
            directions.append(out.flip(0) if suffix else out)
        states = torch.cat(directions, 2) if layer.bidirectional else directions[0]
        if layer.dropout and layer.training and depth < layer.num_layers - 1:
            states = functional.dropout(states, layer.dropout)
    return states.transpose(0, 1) if layer.batch_first else states


def _sum_of_biases(bias_in: Tensor | None, bias_across: Tensor | None, into: Tensor) -> Tensor:
    if bias_in is None or bias_across is None:
        return into.new_zeros(into.shape[1])
    return bias_in + bias_across


def _parts(gates: Tensor) -> list[slice]:
    """Cut ``[time, ...]`` into parts that stay in cache while they are worked on."""
    steps, number = len(gates), max(1, CACHED // max(1, gates[0].numel()))
    return [slice(begin, min(begin + number, steps)) for begin in range(0, steps, number)]


def _states_from_zero(inputs: Tensor, size: int) -> Tensor:
    """Return room for ``[time + 1, batch, size]``, the first of them zero."""
    states = inputs.new_empty(len(inputs) + 1, inputs.shape[1], size)
    states[0].zero_()
    return states


class _Lstm(torch.autograd.Function):
    """Gates in torch's order: input, forget, cell, output."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, anchor: Tensor, recording: Recording,
        weight_in: Tensor, weight_across: Tensor, bias_in: Tensor | None,
        bias_across: Tensor | None,
    ) -> Tensor:  # fmt: skip
        steps, batch, _ = inputs.shape
        size = weight_across.shape[1]
        twice = weight_in.new_ones(4 * size)
        twice[2 * size : 3 * size] = 2.0  # the cell gate's tanh as a sigmoid
        into, across = weight_in.t() * twice, weight_across.t() * twice
        bias = _sum_of_biases(bias_in, bias_across, into) * twice
        gates = inputs.new_empty(steps, batch, 4 * size)
        hidden, cells = (_states_from_zero(inputs, size) for _ in range(2))
        curved = inputs.new_empty(steps, batch, size)
        minus = inputs.new_tensor(-1.0)
        before, *later = hidden.unbind(0)
        old, *changed = cells.unbind(0)
        for part in _parts(gates):
            torch.addmm(bias, inputs[part].flatten(0, 1), into, out=gates[part].flatten(0, 1))
            four = gates[part].view(-1, batch, 4, size).unbind(0)
            for gate, (enter, forget, fresh, out), now, new, curve in zip(
                gates[part], (step.unbind(1) for step in four), later[part], changed[part],
                curved[part], strict=True,
            ):  # fmt: skip
                gate.addmm_(before, across).sigmoid_()
                torch.mul(forget, old, out=new)
                new.addcmul_(enter, fresh, value=2.0).sub_(enter)
                torch.mul(new, 2.0, out=curve).sigmoid_()
                torch.add(minus, curve, alpha=2.0, out=curve)
                torch.mul(out, curve, out=now)
                before, old = now, new
        kept: Any = ctx
        kept.kept = inputs, gates, hidden, cells, curved
        kept.recording = recording
        kept.parameters = Parameters(weight_in, weight_across, bias_in, bias_across)
        return hidden[1:]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept: Any = ctx
        inputs, gates, hidden, cells, curved = kept.kept
        weight_in, weight_across = kept.parameters.weight_in, kept.parameters.weight_across
        d_cell, d_hidden = torch.zeros_like(curved[0]), torch.zeros_like(curved[0])
        for part in reversed(_parts(gates)):
            through = _gate_slopes(gates[part], cells[part], curved[part])
            of_gates = gates[part].view(*through[0].shape[:2], 4, -1)
            for gate, of_three, of_out, given, through_cell, forget in zip(
                *(
                    reversed(values.unbind(0))
                    for values in (
                        gates[part], of_gates[:, :, :3], of_gates[:, :, 3], grads[0][part], *through
                    )
                ),
                strict=True,
            ):  # fmt: skip
                d_hidden += given
                d_cell.addcmul_(d_hidden, through_cell)
                of_three *= d_cell[:, None]
                of_out *= d_hidden
                d_cell *= forget
                torch.mm(gate, weight_across, out=d_hidden)
        kept.recording.contributions.append(
            RecurrentGradients(kept.parameters, inputs.detach(), hidden[:-1], gates)
        )
        needed = ctx.needs_input_grad[0]  # type: ignore[attr-defined]  # torch sets it
        d_inputs = gates @ weight_in if needed else None
        kept.kept = None
        return d_inputs, torch.zeros_like(kept.recording.anchor), *[None] * 5


def _gate_slopes(gates: Tensor, cells: Tensor, curved: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a part's gates ``[time, batch, 4 · hidden]`` into their slopes, in place.

    The first three are per change of the cell, the last is per change of the state. Returns how
    a state changes with its cell, and how a cell changes with the one before.
    """
    steps, batch, size = curved.shape
    enter, forget, fresh, out = gates.clone().view(steps, batch, 4, size).unbind(2)
    of_enter, of_forget, of_fresh, of_out = gates.view(steps, batch, 4, size).unbind(2)
    zero, minus = gates.new_tensor(0.0), gates.new_tensor(-1.0)
    gates.addcmul_(gates, gates, value=-1.0)  # s − s²
    torch.addcmul(zero, of_fresh, enter, value=4.0, out=of_fresh)
    of_enter.mul_(torch.add(minus, fresh, alpha=2.0, out=fresh))
    of_forget.mul_(cells)
    of_out.mul_(curved)
    return torch.addcmul(out, out, curved.square_(), value=-1.0, out=out), forget


class _Gru(torch.autograd.Function):
    """One buffer holds ``[new from inputs | reset | update | new from the state]``.

    Its first three quarters belong to the input weights, its last three to the recurrent ones.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, anchor: Tensor, recording: Recording,
        weight_in: Tensor, weight_across: Tensor, bias_in: Tensor | None,
        bias_across: Tensor | None,
    ) -> Tensor:  # fmt: skip
        steps, batch, _ = inputs.shape
        size = weight_across.shape[1]
        gates = inputs.new_zeros(steps, batch, 4 * size)
        if bias_in is not None and bias_across is not None:
            across_rest, across_new = bias_across[: 2 * size], bias_across[2 * size :]
            into_rest, into_new = bias_in[: 2 * size], bias_in[2 * size :]
            gates += torch.cat([into_new, into_rest + across_rest, across_new])
        rolled = weight_in.roll(size, 0).t()  # new, reset, update
        gates.view(steps * batch, -1)[:, : 3 * size].addmm_(inputs.flatten(0, 1), rolled)
        hidden = _states_from_zero(inputs, size)
        across = weight_across.t().contiguous()
        for gate, before, now in zip(gates, hidden[:-1], hidden[1:], strict=True):
            gate[:, size:].addmm_(before, across)
            gate[:, size : 3 * size].sigmoid_()
            new, reset, update, recalled = gate.view(batch, 4, size).unbind(1)
            new.addcmul_(reset, recalled).mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)
            torch.lerp(new, before, update, out=now)
        kept: Any = ctx
        kept.kept = inputs, gates, hidden
        kept.recording = recording
        kept.parameters = Parameters(weight_in, weight_across, bias_in, bias_across)
        return hidden[1:]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept: Any = ctx
        inputs, gates, hidden = kept.kept
        weight_in, weight_across = kept.parameters.weight_in, kept.parameters.weight_across
        steps, batch, size = hidden.shape[0] - 1, hidden.shape[1], hidden.shape[2]
        new, reset, update, recalled = gates.view(steps, batch, 4, size).unbind(2)
        slopes = torch.empty_like(gates)
        four = slopes.view(steps, batch, 4, size)
        keep = 1 - update
        torch.mul(keep, 1 - new.square(), out=four[:, :, 0])
        torch.mul(hidden[:-1] - new, keep.mul_(update), out=four[:, :, 2])
        torch.mul(four[:, :, 0], reset, out=four[:, :, 3])
        torch.mul(four[:, :, 3], (1 - reset).mul_(recalled), out=four[:, :, 1])
        d_hidden, given = torch.zeros_like(hidden[0]), grads[0]
        for t in range(steps - 1, -1, -1):
            d_hidden += given[t]
            four[t] *= d_hidden[:, None]
            d_hidden *= update[t]
            d_hidden.addmm_(slopes[t, :, size:], weight_across)
        kept.recording.contributions.append(
            RecurrentGradients(kept.parameters, inputs.detach(), hidden[:-1], slopes)
        )
        needed = ctx.needs_input_grad[0]  # type: ignore[attr-defined]  # torch sets it
        d_inputs = slopes[:, :, : 3 * size] @ weight_in.roll(size, 0) if needed else None
        kept.kept = None
        return d_inputs, torch.zeros_like(kept.recording.anchor), *[None] * 5
