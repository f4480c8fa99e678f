"""The same network as snnTorch's users write it: a loop over steps, every layer called once per step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MissingDependencyError
from .network import Network
from .settings import SLOPE


class LoopOutput(NamedTuple):
    """``mem`` (T, B, classes) of the readout, and of each hidden layer its spike counts (B, N)."""

    mem: Tensor
    counts: list[Tensor]


class StepLoop(nn.Module):
    """snnTorch's ``Leaky`` under autograd, with the weights of a :class:`Network`: the same Parameters, not copies.

    Raises:
        MissingDependencyError: snnTorch is not installed.
    """

    def __init__(self, net: Network) -> None:
        super().__init__()
        try:
            import snntorch
            from snntorch.surrogate import fast_sigmoid
        except ImportError as error:
            raise MissingDependencyError("snnTorch is not installed: pip install snntorch") from error
        self.net = net
        settings, grad = net.settings, fast_sigmoid(slope=SLOPE)
        self.lif = nn.ModuleList(snntorch.Leaky(beta=settings.beta, spike_grad=grad) for _ in net.hidden)
        self.integrator = snntorch.Leaky(
            beta=settings.beta_readout, spike_grad=grad, reset_mechanism="none", surrogate_disable=True
        )

    def forward(self, x: Tensor) -> LoopOutput:
        """``x`` dense, (T, B, features)."""
        mems = [lif.reset_mem() for lif in self.lif]  # type: ignore[operator]
        mem = self.integrator.reset_mem()  # type: ignore[operator]
        weight = self.net.readout.weight * (1 - self.net.settings.beta_readout)
        counts: list[Tensor | None] = [None] * len(mems)
        record = []
        for spikes in x.unbind(0):
            for k, (linear, lif) in enumerate(zip(self.net.hidden, self.lif, strict=True)):
                spikes, mems[k] = lif(linear(spikes), mems[k])
                counts[k] = spikes if counts[k] is None else counts[k] + spikes
            _, mem = self.integrator(F.linear(spikes, weight), mem)
            record.append(mem)
        return LoopOutput(torch.stack(record), counts)  # type: ignore[arg-type]
