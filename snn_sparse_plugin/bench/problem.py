"""What is computed: a seeded or recorded input, and weights scaled so that every layer fires at the same rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..core.config import check_device
from ..core.errors import ConfigError
from ..data import load_spikes
from .layers import Layer, Shape


@dataclass(frozen=True)
class Config:
    """One measured computation.

    Args:
        op: ``"network"``: a training step without the optimizer, cross entropy on summed output spikes;
            ``"layer"``: one layer with a given gradient of its spikes; ``"s3gd"``: the second of two layers,
            its backward alone, with gradients to weights and input.
        inputs, layers: M, and the number of neurons of every layer; or (C, H, W), and layers as
            :meth:`~snn_sparse_plugin.bench.layers.Layer.parse` reads them.
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
        root: folder of N-MNIST's files; recordings (2, 34, 34), a millisecond each step, take the place of the
            Bernoulli input then.
    """

    op: Literal["network", "layer", "s3gd"] = "network"
    inputs: int | Shape = 700
    layers: tuple[int | str, ...] = (200, 200, 20)
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
    root: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not 0 < self.rate < 1:
            raise ConfigError(f"density and rate must lie in (0, 1], got {self.density} and {self.rate}.")
        if min(*self.size, self.steps, self.batch, *(layer.outputs for layer, _ in self.stages)) < 1:
            raise ConfigError("inputs, layers, steps and batch must be at least 1.")
        if (self.reset != "subtract" or self.readout) and self.op != "network":
            raise ConfigError(f"reset and readout are options of networks, not of {self.op}.")
        if self.root is not None and self.size != (2, 34, 34):
            raise ConfigError(f"recordings of N-MNIST are (2, 34, 34), the input is {self.size}.")
        check_device(self.device)

    @property
    def size(self) -> Shape:
        """Of one sample and step of the input."""
        return (self.inputs,) if isinstance(self.inputs, int) else self.inputs

    @property
    def stages(self) -> list[tuple[Layer, Shape]]:
        """Every layer and the size of its input."""
        found, size = [], self.size
        for given in self.layers:
            layer = Layer.parse(given)
            found.append((layer, size))
            size = layer.out_size(size)
        return found

    @property
    def neurons(self) -> list[Shape]:
        """The neurons of every layer, or their channels and map."""
        return [layer.out_size(size) for layer, size in self.stages]

    @property
    def neuron_steps(self) -> int:
        """Neurons x T x B of what is measured: what saved bytes are counted against."""
        each = [math.prod(size) for size in self.neurons]
        return (each[-1] if self.op == "s3gd" else sum(each)) * self.steps * self.batch


class Problem(NamedTuple):
    """``x`` (T, B, M), ``target`` (B,), per layer a weight (N, M), ``grad`` (T, B, N) of the last spikes.

    M and N are (C, H, W) where convolutions are; the weight of one is (C', C, kernel, kernel).
    """

    x: Tensor
    target: Tensor
    weights: tuple[Tensor, ...]
    rates: tuple[float, ...]
    grad: Tensor


@lru_cache(maxsize=2)
def make_problem(config: Config) -> Problem:
    """The problem of a config, the same on every call and in every process."""
    generator = torch.Generator().manual_seed(config.seed)
    T, B, last = config.steps, config.batch, config.neurons[-1]
    if config.root is None:
        x = (torch.rand(T, B, *config.size, generator=generator) < config.density).float()
        target = torch.randint(math.prod(last), (B,), generator=generator)
    else:
        data = load_spikes("n-mnist", config.root, steps=T, limit=B, merge_polarity=False).train
        spikes, target = data.batch(torch.arange(B) % len(data))
        x = spikes.to_dense().view(T, B, *config.size)
    x = x.to(config.device)
    weights, rates = scaled_weights(x, config, generator)
    grad = torch.randn(T, B, *last, generator=generator)
    return Problem(x, target.to(config.device), weights, rates, grad.to(config.device))


def scaled_weights(
    x: Tensor, config: Config, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """Normal weights of every layer, scaled until it fires at ``config.rate`` on input ``x``; and the rates reached.

    Those of a readout have a standard deviation of 2 / sqrt(M).
    """
    weights, rates = [], []
    spikes = x
    for k, (layer, size) in enumerate(config.stages):
        weight = torch.randn(layer.weight_shape(size), generator=generator).to(x.device)
        if config.readout and k == len(config.layers) - 1:
            weights.append(weight * 2 / weight.shape[1] ** 0.5)
            break
        # a part of the batch is enough to set a rate
        part = spikes[:, : 4 if layer.kernel else 16]
        weights.append(weight * _scale_for_rate(layer.current(part, weight), config))
        spikes = leaky_spikes(layer.current(spikes, weights[-1]), config.beta, config.reset)
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
