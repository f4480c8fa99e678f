"""The published networks: hidden layers of LIF neurons and a leaky readout, over all steps at once."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.errors import ConfigError
from ..core.spikes import SpikeTrain
from ..core.surrogates import Surrogate
from ..ops.spiking_conv import spiking_conv
from ..ops.spiking_layer import SpikingLayerOutput, spiking_layer
from .settings import SLOPE, ConvSettings, Settings

_READOUT = NeuronSpec(reset="none", spiking=False)


class Output(NamedTuple):
    """``mem`` (T, B, classes) of the readout; of each hidden layer its spikes and active fraction."""

    mem: Tensor
    spikes: list[SpikeTrain]
    active: list[float | Tensor]


class Network(nn.Module):
    """Linear, LIF, ..., Linear, leaky integrator; no biases [Perez-Nieves & Goodman 2021].

    Hidden neurons are snnTorch's ``Leaky``: v <- beta v + W s - s_out, threshold 1, detached reset by subtraction in
    the step after a spike. The readout is y <- beta_out y + (1 - beta_out) W s.

    Args:
        features, classes: sizes of input and output.
        settings: the rest.
        seed: of the weights; the same seed gives the same weights, sparse or dense.

    Example:
        >>> from snn_sparse_plugin.experiments.settings import settings_of
        >>> net = Network(64, 10, settings_of("digits"), seed=0)
        >>> net(SpikeTrain.from_dense((torch.rand(100, 4, 64) < 0.01).float())).mem.shape
        torch.Size([100, 4, 10])
    """

    def __init__(self, features: int, classes: int, settings: Settings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        *hidden, self.readout = self._layers(features, classes)
        self.hidden = nn.ModuleList(hidden)
        generator = torch.Generator().manual_seed(seed)
        for layer in (*hidden, self.readout):
            weight = layer.weight
            bound = weight[0].numel() ** -0.5
            if settings.init == "normal":
                nn.init.normal_(weight, std=20 * (1 - settings.beta) * bound, generator=generator)
            else:
                nn.init.uniform_(weight, -bound, bound, generator=generator)

    def _layers(self, features: int, classes: int) -> list[Any]:
        """The hidden layers and the readout, whose weights are not set yet."""
        sizes = [features, *[self.settings.hidden] * self.settings.layers, classes]
        return [skip_init(nn.Linear, m, n, bias=False) for m, n in pairwise(sizes)]

    def current(self, x: Tensor, k: int) -> Tensor:
        """Of hidden layer ``k``, counted from 1, in plain torch: what a loop computes from the spikes of a step."""
        return self.hidden[k - 1](x)  # type: ignore[no-any-return]

    def layer(self, x: SpikeTrain | Tensor, k: int, *, sparse: bool = True) -> SpikingLayerOutput:
        """Hidden layer ``k``, counted from 1, over all steps; spikes leave as events."""
        return spiking_layer(x, self.hidden[k - 1].weight, **self._neurons(k, sparse))  # type: ignore[arg-type]

    def _neurons(self, k: int, sparse: bool) -> dict[str, Any]:
        chosen = self.settings
        return {
            "params": NeuronParams(mem=chosen.beta),
            "surrogate": Surrogate("fast_sigmoid", (SLOPE,)),
            "events": True,
            "name": f"hidden layer {k}",
            "backprop_threshold": chosen.threshold if sparse else None,
            "min_active": chosen.min_active,
        }

    def forward(self, x: SpikeTrain | Tensor, *, sparse: bool = True, first: int = 0) -> Output:
        """``x`` (T, B, features). ``sparse`` False: the exact surrogate gradient at every neuron-step.

        ``first`` > 0: ``x`` are the spikes of that hidden layer, and only what follows it runs.
        """
        spikes, active = [], []
        for k in range(first + 1, len(self.hidden) + 1):
            out = self.layer(x, k, sparse=sparse)
            x = out.spikes
            spikes.append(out.spikes)
            active.append(out.active_fraction)
        decay = self.settings.beta_readout
        mem = spiking_layer(
            x.flatten(2) if isinstance(x, Tensor) else x.flatten(),
            self.readout.weight * (1 - decay),
            spec=_READOUT,
            params=NeuronParams(mem=decay),
            name="readout",
        ).spikes
        return Output(mem, spikes, active)


class ConvNetwork(Network):
    """Convolution, max-pool, LIF, ..., Linear, leaky integrator; no biases. Neurons are those of :class:`Network`.

    Args:
        features: C·H·W of square maps, C 1 or 2.

    Raises:
        ConfigError: features of which no such map can be made, or maps that are pooled to nothing.

    Example:
        >>> from snn_sparse_plugin.experiments.settings import conv_settings_of
        >>> net = ConvNetwork(64, 10, conv_settings_of("digits"), seed=0)
        >>> out = net(SpikeTrain.from_dense((torch.rand(100, 4, 64) < 0.01).float()))
        >>> out.mem.shape, out.spikes[0].shape
        (torch.Size([100, 4, 10]), torch.Size([100, 4, 8, 4, 4]))
    """

    settings: ConvSettings

    def _layers(self, features: int, classes: int) -> list[Any]:
        s = self.settings
        self.sizes, found = [_map_of(features)], []
        for _ in range(s.layers):
            channels, *sides = self.sizes[-1]
            found.append(
                skip_init(nn.Conv2d, channels, s.hidden, s.kernel, padding=s.kernel // 2, bias=False)
            )
            self.sizes.append((s.hidden, *(n // s.pool for n in sides)))
        if min(self.sizes[-1]) < 1:
            raise ConfigError(f"{s.layers} layers pool a map of {self.sizes[0][1:]} to nothing.")
        return [*found, skip_init(nn.Linear, math.prod(self.sizes[-1]), classes, bias=False)]

    def current(self, x: Tensor, k: int) -> Tensor:
        maps = self.hidden[k - 1](x.reshape(-1, *self.sizes[k - 1]))
        return F.max_pool2d(maps, self.settings.pool)

    def layer(self, x: SpikeTrain | Tensor, k: int, *, sparse: bool = True) -> SpikingLayerOutput:
        size = self.sizes[k - 1]
        conv: Any = self.hidden[k - 1]
        return spiking_conv(
            x.reshape(*x.shape[:2], *size) if isinstance(x, Tensor) else x.view(*size),
            conv.weight,
            padding=conv.padding,
            pool=nn.MaxPool2d(self.settings.pool),
            **self._neurons(k, sparse),
        )


def _map_of(features: int) -> tuple[int, ...]:
    for channels in (1, 2):
        side = math.isqrt(features // channels)
        if channels * side * side == features:
            return channels, side, side
    raise ConfigError(f"{features} features are no square map of one or two channels.")


def make_network(features: int, classes: int, settings: Settings, seed: int) -> Network:
    """The network of these settings."""
    kind = ConvNetwork if isinstance(settings, ConvSettings) else Network
    return kind(features, classes, settings, seed)
