"""LSTM and GRU that keep what per-sample gradients need: fused forward, one pass back in time.

Time comes first inside (``[time, batch, ...]``), so that every step works on contiguous memory; what
does not depend on the step before is computed for all steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hospitium_client.training.clipping.contributions import OuterProducts

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx
    from torch.nn import Parameter


@dataclass
class Recording:
    """What a recurrent layer leaves behind: contributions, filled in on the way back."""

    contributions: list[OuterProducts] = field(default_factory=list)


def recorded_forward(
    layer: nn.LSTM | nn.GRU, inputs: Tensor, recording: Recording, anchor: Tensor
) -> Tensor:
    """Return the layer's states ``[batch, time, hidden]`` like the layer itself does.

    ``anchor`` is any tensor that requires a gradient; it makes autograd come back here.
    """
    kind = _Lstm if isinstance(layer, nn.LSTM) else _Gru
    states = (inputs if layer.batch_first else inputs.transpose(0, 1)).transpose(0, 1)
    for depth in range(layer.num_layers):
        directions = []
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            weights = [
                getattr(layer, f"{name}_l{depth}{suffix}", None)
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            given = states.flip(0) if suffix else states
            out = kind.apply(given, anchor, recording, *weights)  # type: ignore[no-untyped-call]  # torch types apply so
            directions.append(out.flip(0) if suffix else out)
        states = torch.cat(directions, 2) if layer.bidirectional else directions[0]
        if layer.dropout and layer.training and depth < layer.num_layers - 1:
            states = functional.dropout(states, layer.dropout)
    states = states.transpose(0, 1)
    return states if layer.batch_first else states.transpose(0, 1)


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    steps, batch, _ = inputs.shape
    return functional.linear(inputs.reshape(steps * batch, -1), weight, bias).view(steps, batch, -1)


def _batch_first(values: Tensor) -> Tensor:
    return values.transpose(0, 1)


def _record(
    recording: Recording, inputs: Tensor, before: Tensor, into: Tensor, across: Tensor,
    parameters: tuple[Parameter, Parameter, Parameter | None, Parameter | None],
) -> None:  # fmt: skip
    weight_in, weight_across, bias_in, bias_across = parameters
    recording.contributions += [
        OuterProducts(weight_in, bias_in, _batch_first(inputs), _batch_first(into)),
        OuterProducts(weight_across, bias_across, _batch_first(before), _batch_first(across)),
    ]


class _Lstm(torch.autograd.Function):
    """Gates in torch's order: input, forget, cell, output."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, anchor: Tensor, recording: Recording,
        weight_in: Parameter, weight_across: Parameter, bias_in: Parameter | None,
        bias_across: Parameter | None,
    ) -> Tensor:  # fmt: skip
        steps, batch, _ = inputs.shape
        size = weight_across.shape[1]
        bias = None if bias_in is None or bias_across is None else bias_in + bias_across
        gates = _project(inputs, weight_in, bias)
        hidden = inputs.new_zeros(steps + 1, batch, size)
        cells = inputs.new_zeros(steps + 1, batch, size)
        curved = inputs.new_empty(steps, batch, size)
        across = weight_across.t().contiguous()
        for t in range(steps):
            gate = gates[t]
            gate.addmm_(hidden[t], across)
            gate[:, : 2 * size].sigmoid_()
            gate[:, 2 * size : 3 * size].tanh_()
            gate[:, 3 * size :].sigmoid_()
            cell = torch.mul(gate[:, size : 2 * size], cells[t], out=cells[t + 1])
            cell.addcmul_(gate[:, :size], gate[:, 2 * size : 3 * size])
            torch.tanh(cell, out=curved[t])
            torch.mul(gate[:, 3 * size :], curved[t], out=hidden[t + 1])
        kept: Any = ctx
        kept.kept = inputs, gates, hidden, cells, curved
        kept.recording = recording
        kept.parameters = weight_in, weight_across, bias_in, bias_across
        return hidden[1:]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept: Any = ctx
        inputs, gates, hidden, cells, curved = kept.kept
        weight_in, weight_across, bias_in, _ = kept.parameters
        steps, batch, size = curved.shape
        four = gates.view(steps, batch, 4, size)
        into, forget, new, out = four.unbind(2)
        slope = torch.empty_like(four)
        torch.mul(new, into * (1 - into), out=slope[:, :, 0])
        torch.mul(cells[:-1], forget * (1 - forget), out=slope[:, :, 1])
        torch.mul(into, 1 - new * new, out=slope[:, :, 2])
        torch.mul(curved, out * (1 - out), out=slope[:, :, 3])
        through_cell = out * (1 - curved * curved)
        d_gates = torch.empty_like(gates)
        d_four = d_gates.view(steps, batch, 4, size)
        d_cell, d_hidden = torch.zeros_like(curved[0]), torch.zeros_like(curved[0])
        given = grads[0]
        for t in range(steps - 1, -1, -1):
            d_hidden += given[t]
            d_cell.addcmul_(d_hidden, through_cell[t])
            torch.mul(slope[t, :, :3], d_cell[:, None], out=d_four[t, :, :3])
            torch.mul(slope[t, :, 3], d_hidden, out=d_four[t, :, 3])
            d_cell *= forget[t]
            torch.mm(d_gates[t], weight_across, out=d_hidden)
        _record(kept.recording, inputs, hidden[:-1], d_gates, d_gates, kept.parameters)
        d_inputs = d_gates @ weight_in if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]  # torch sets it
        return d_inputs, torch.zeros(()), *[None] * 5


class _Gru(torch.autograd.Function):
    """Gates in torch's order: reset, update, new."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, anchor: Tensor, recording: Recording,
        weight_in: Parameter, weight_across: Parameter, bias_in: Parameter | None,
        bias_across: Parameter | None,
    ) -> Tensor:  # fmt: skip
        steps, batch, _ = inputs.shape
        size = weight_across.shape[1]
        gates = _project(inputs, weight_in, bias_in)
        hidden = inputs.new_zeros(steps + 1, batch, size)
        recalled = inputs.new_empty(steps, batch, size)
        across = weight_across.t().contiguous()
        for t in range(steps):
            gate = gates[t]
            moved = hidden[t] @ across
            if bias_across is not None:
                moved += bias_across
            gate[:, : 2 * size].add_(moved[:, : 2 * size]).sigmoid_()
            recalled[t] = moved[:, 2 * size :]
            gate[:, 2 * size :].addcmul_(gate[:, :size], recalled[t]).tanh_()
            torch.lerp(gate[:, 2 * size :], hidden[t], gate[:, size : 2 * size], out=hidden[t + 1])
        kept: Any = ctx
        kept.kept = inputs, gates, hidden, recalled
        kept.recording = recording
        kept.parameters = weight_in, weight_across, bias_in, bias_across
        return hidden[1:]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept: Any = ctx
        inputs, gates, hidden, recalled = kept.kept
        weight_in, weight_across, _, _ = kept.parameters
        steps, batch, size = recalled.shape
        reset, update, new = gates.view(steps, batch, 3, size).unbind(2)
        d_into, d_across = torch.empty_like(gates), torch.empty_like(gates)
        new_slope = (1 - update) * (1 - new * new)
        update_slope = (hidden[:-1] - new) * update * (1 - update)
        reset_slope = recalled * reset * (1 - reset)
        d_hidden, given = torch.zeros_like(recalled[0]), grads[0]
        for t in range(steps - 1, -1, -1):
            d_hidden = d_hidden + given[t]
            d_new = d_hidden * new_slope[t]
            d_into[t, :, 2 * size :] = d_new
            torch.mul(d_new, reset_slope[t], out=d_into[t, :, :size])
            torch.mul(d_hidden, update_slope[t], out=d_into[t, :, size : 2 * size])
            d_across[t, :, : 2 * size] = d_into[t, :, : 2 * size]
            torch.mul(d_new, reset[t], out=d_across[t, :, 2 * size :])
            d_hidden = torch.addmm(d_hidden * update[t], d_across[t], weight_across)
        _record(kept.recording, inputs, hidden[:-1], d_into, d_across, kept.parameters)
        d_inputs = d_into @ weight_in if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]  # torch sets it
        return d_inputs, torch.zeros(()), *[None] * 5
