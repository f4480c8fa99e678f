"""A network of :class:`LSNN` layers and one :class:`LeakyReadout`, step by step or all steps at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.dynamics import NeuronParams, NeuronSpec, NeuronState
from ...core.errors import ConfigError
from ...core.spikes import SpikeTrain
from ...ops.spiking_layer import spiking_layer
from .lsnn import LSNN


class LeakyReadout(nn.Module):
    """Linear leaky integrators: ``y_t = kappa y_{t-1} + W z_t + b``, kappa = exp(-dt / tau_out).

    Args:
        input_size, output_size: N and the number of outputs C.
        tau_out, dt: time constant and step, in the same unit.
        bias: whether there is a b.

    Example:
        >>> y, state = LeakyReadout(256, 20)(torch.zeros(32, 256))
        >>> y.shape
        torch.Size([32, 20])
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        tau_out: float = 20.0,
        dt: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not (tau_out > 0 and dt > 0):
            raise ConfigError(f"LeakyReadout(tau_out={tau_out}, dt={dt}): must be positive.")
        self.tau_out, self.dt = tau_out, dt
        self.linear = nn.Linear(input_size, output_size, bias=bias)

    @property
    def kappa(self) -> float:
        """Decay of the output in one step."""
        return math.exp(-self.dt / self.tau_out)

    def forward(self, z: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Spikes (B, N) -> outputs (B, C), which are also the state."""
        y = self.linear(z) if state is None else self.kappa * state + self.linear(z)
        return y, y

    def unroll(self, z: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All steps of spikes (T, B, N) at once -> outputs (T, B, C) and the last one, with exact gradients."""
        out = spiking_layer(
            z,
            self.linear.weight,
            self.linear.bias,
            spec=NeuronSpec(reset="none", spiking=False),
            params=NeuronParams(mem=self.kappa),
            state=None if state is None else NeuronState(v=state),
        )
        return out.spikes, out.state.v

    def extra_repr(self) -> str:
        return f"tau_out={self.tau_out:g}, dt={self.dt:g}"


class LSNNNetwork(nn.Module):
    """Layers of :class:`LSNN`, each driven by the one below and each feeding the one :class:`LeakyReadout`.

    Args:
        input_size: number of input channels M.
        hidden_sizes: neurons of every layer, or of the one layer.
        output_size: number of outputs C.
        tau_out, bias: of the readout.
        **options: options of every :class:`LSNN`.

    Example:
        >>> net = LSNNNetwork(700, 256, 20)
        >>> y, state = net(torch.zeros(32, 700))
        >>> y.shape
        torch.Size([32, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | list[int],
        output_size: int,
        *,
        tau_out: float = 20.0,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = [hidden_sizes] if isinstance(hidden_sizes, int) else list(hidden_sizes)
        if not sizes:
            raise ConfigError("LSNNNetwork needs at least one hidden layer.")
        inputs = [input_size, *sizes[:-1]]
        self.layers = nn.ModuleList(LSNN(m, n, **options) for m, n in zip(inputs, sizes, strict=True))
        dt = options.get("dt", 1.0)
        self.readout = LeakyReadout(sum(sizes), output_size, tau_out=tau_out, dt=dt, bias=bias)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step of inputs (B, M) -> outputs (B, C) and the state, a tuple of the layers' and the readout's."""
        states = (None,) * (len(self.layers) + 1) if state is None else state
        spikes, after = [], []
        for layer, before in zip(self.layers, states, strict=False):
            x, now = layer(x, before)
            spikes.append(x)
            after.append(now)
        y, out = self.readout(_side_by_side(spikes), states[-1])
        return y, (*after, out)

    def unroll(self, x: Tensor | SpikeTrain, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        """All steps of inputs (T, B, M) at once -> outputs (T, B, C), spikes of all layers (T, B, N), last state.

        Its backward is exact backward through time, many times faster than that of a loop over steps.

        Example:
            >>> outputs, spikes, state = LSNNNetwork(700, [64, 32], 20).unroll(torch.zeros(9, 4, 700))
            >>> outputs.shape, spikes.shape
            (torch.Size([9, 4, 20]), torch.Size([9, 4, 96]))
        """
        states = (None,) * (len(self.layers) + 1) if state is None else state
        spikes: list[Tensor] = []
        after = []
        for layer, before in zip(self.layers, states, strict=False):
            z, now = layer.unroll(x, before)  # type: ignore[operator]
            x = z
            spikes.append(z)
            after.append(now)
        z = _side_by_side(spikes)
        y, out = self.readout.unroll(z, states[-1])
        return y, z, (*after, out)


def _side_by_side(spikes: list[Tensor]) -> Tensor:
    return spikes[0] if len(spikes) == 1 else torch.cat(spikes, -1)
