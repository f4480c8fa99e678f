"""The published network: hidden layers of LIF neurons and a leaky readout, over all steps at once."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.spikes import SpikeTrain
from ..core.surrogates import Surrogate
from ..ops.spiking_layer import SpikingLayerOutput, spiking_layer
from .settings import SLOPE, Settings

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
        sizes = [features, *[settings.hidden] * settings.layers, classes]
        linears = [skip_init(nn.Linear, m, n, bias=False) for m, n in pairwise(sizes)]
        generator = torch.Generator().manual_seed(seed)
        for linear in linears:
            bound = linear.in_features**-0.5
            if settings.init == "normal":
                nn.init.normal_(linear.weight, std=20 * (1 - settings.beta) * bound, generator=generator)
            else:
                nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        *hidden, self.readout = linears
        self.hidden = nn.ModuleList(hidden)

    def layer(self, x: SpikeTrain | Tensor, k: int, *, sparse: bool = True) -> SpikingLayerOutput:
        """Hidden layer ``k``, counted from 1, over all steps; spikes leave as events."""
        chosen = self.settings
        return spiking_layer(
            x,
            self.hidden[k - 1].weight,  # type: ignore[arg-type]
            params=NeuronParams(mem=chosen.beta),
            surrogate=Surrogate("fast_sigmoid", (SLOPE,)),
            events=True,
            name=f"hidden layer {k}",
            backprop_threshold=chosen.threshold if sparse else None,
            min_active=chosen.min_active,
        )

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
            x,
            self.readout.weight * (1 - decay),
            spec=_READOUT,
            params=NeuronParams(mem=decay),
            name="readout",
        ).spikes
        return Output(mem, spikes, active)
