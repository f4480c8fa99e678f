"""What is computed: a seeded input, and weights scaled so that every layer fires at the same rate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import check_device
from ..core.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """One measured computation.

    Args:
        op: ``"network"``: a training step without the optimizer, cross entropy on summed output spikes;
            ``"layer"``: one layer with a given gradient of its spikes; ``"s3gd"``: the second of two layers,
            its backward alone, with gradients to weights and input.
        inputs, layers: M, and the number of neurons of every layer.
        steps, batch: T and B.
        density: input spikes per input and step (Bernoulli).
        rate: output spikes per neuron and step of every layer.
        beta: decay of Leaky; thresholds are 1.
        surrogate, slope: ``"fast_sigmoid"`` or ``"atan"``, with its slope or alpha.
        window: ``backprop_threshold`` of the sparse providers.
        reset: of Leaky: ``"subtract"``, its default, or ``"zero"``, for networks only: then the neurons of all
            libraries compute the same spikes.
        readout: the last layer of a network is a leaky integrator without spikes, y = beta y + (1 - beta) W s, and
            the loss is of its maximum over time instead of the spike counts [Perez-Nieves & Goodman 2021].
    """

    op: Literal["network", "layer", "s3gd"] = "network"
    inputs: int = 700
    layers: tuple[int, ...] = (200, 200, 20)
    steps: int = 100
    batch: int = 64
    density: float = 0.02
    rate: float = 0.03
    beta: float = 0.9
    surrogate: Literal["fast_sigmoid", "atan"] = "fast_sigmoid"
    slope: float = 100.0
    window: float | Literal["auto"] | None = "auto"
    device: str = "cpu"
    seed: int = 0
    reset: Literal["subtract", "zero"] = "subtract"
    readout: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not 0 < self.rate < 1:
            raise ConfigError(f"density and rate must lie in (0, 1], got {self.density} and {self.rate}.")
        if min(self.inputs, self.steps, self.batch, *self.layers) < 1:
            raise ConfigError("inputs, layers, steps and batch must be at least 1.")
        if (self.reset != "subtract" or self.readout) and self.op != "network":
            raise ConfigError(f"reset and readout are options of networks, not of {self.op}.")
        check_device(self.device)

    @property
    def neuron_steps(self) -> int:
        """Neurons x T x B of what is measured: what saved bytes are counted against."""
        neurons = self.layers[-1] if self.op == "s3gd" else sum(self.layers)
        return neurons * self.steps * self.batch


class Problem(NamedTuple):
    """``x`` (T, B, M), ``target`` (B,), per layer a weight (N, M), ``grad`` (T, B, N) of the last spikes."""

    x: Tensor
    target: Tensor
    weights: tuple[Tensor, ...]
    rates: tuple[float, ...]
    grad: Tensor


@lru_cache(maxsize=2)
def make_problem(config: Config) -> Problem:
    """The problem of a config, the same on every call and in every process."""
    generator = torch.Generator().manual_seed(config.seed)
    T, B, M = config.steps, config.batch, config.inputs
    x = (torch.rand(T, B, M, generator=generator) < config.density).float()
    x = x.to(config.device)
    target = torch.randint(config.layers[-1], (B,), generator=generator)
    weights, rates = scaled_weights(x, config, generator)
    grad = torch.randn(T, B, config.layers[-1], generator=generator)
    return Problem(x, target.to(config.device), weights, rates, grad.to(config.device))


def scaled_weights(
    x: Tensor, config: Config, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """Normal weights of every layer, scaled until it fires at ``config.rate`` on input ``x``; and the rates reached.

    Those of a readout have a standard deviation of 2 / sqrt(M).
    """
    weights, rates = [], []
    spikes = x
    for k, n in enumerate(config.layers):
        weight = torch.randn(n, spikes.shape[2], generator=generator).to(x.device)
        if config.readout and k == len(config.layers) - 1:
            weights.append(weight * 2 / spikes.shape[2] ** 0.5)
            break
        # a part of the batch is enough to set a rate
        scale = _scale_for_rate(F.linear(spikes[:, :16], weight), config)
        weights.append(weight * scale)
        spikes = leaky_spikes(F.linear(spikes, weights[-1]), config.beta, config.reset)
        rates.append(float(spikes.mean()))
    return tuple(weights), tuple(rates)


def leaky_spikes(current: Tensor, beta: float, reset: str = "subtract") -> Tensor:
    """Spikes (T, B, N) of snnTorch's Leaky, threshold 1, reset by subtraction or to zero one step later."""
    v = torch.zeros_like(current[0])
    spikes = []
    for x in current.unbind(0):
        before = (v > 1).to(v.dtype)
        v = beta * (1 - before) * v + x if reset == "zero" else beta * v + x - before
        spikes.append((v > 1).to(v.dtype))
    return torch.stack(spikes)


def _scale_for_rate(current: Tensor, config: Config) -> float:
    """Bisection in the logarithm: the rate grows with the scale of zero-mean weights."""
    spread = float(current.std())
    if not spread > 0:  # no input spike at all: nothing to scale
        return 1.0
    low, high = 1e-2 / spread, 1e2 / spread
    for _ in range(20):
        middle = (low * high) ** 0.5
        if float(leaky_spikes(current * middle, config.beta, config.reset).mean()) < config.rate:
            low = middle
        else:
            high = middle
    return high
