"""The same network as snnTorch's users write it: a loop over steps, every layer called once per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import MissingDependencyError
from ..core.surrogates import Surrogate
from .network import Network
from .settings import SLOPE


class LoopOutput(NamedTuple):
    """``mem`` (T, B, classes) of the readout, and of each hidden layer its spike counts (B, N...)."""

    mem: Tensor
    counts: list[Tensor]


def _snntorch() -> tuple[Any, Any]:
    try:
        import snntorch
        from snntorch.surrogate import fast_sigmoid
    except ImportError as error:
        raise MissingDependencyError("snnTorch is not installed: pip install snntorch") from error
    return snntorch.Leaky, fast_sigmoid(slope=SLOPE)


class StepLoop(nn.Module):
    """snnTorch's ``Leaky`` under autograd, with the weights of a :class:`Network`: its Parameters, not copies.

    Raises:
        MissingDependencyError: snnTorch is not installed.
    """

    def __init__(self, net: Network) -> None:
        super().__init__()
        Leaky, grad = _snntorch()
        self.net, settings = net, net.settings
        self.lif = nn.ModuleList(Leaky(beta=settings.beta, spike_grad=grad) for _ in net.hidden)
        self.integrator = Leaky(
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
            for k, lif in enumerate(self.lif):
                spikes, mems[k] = lif(self.net.current(spikes, k + 1), mems[k])
                counts[k] = spikes if counts[k] is None else counts[k] + spikes
            _, mem = self.integrator(F.linear(spikes.flatten(1), weight), mem)
            record.append(mem)
        return LoopOutput(torch.stack(record), counts)  # type: ignore[arg-type]


class LayerLoop(nn.Module):
    """One hidden layer as such a loop: spikes (T, B, M) -> (T, B, N). ``current``: of the spikes of a step."""

    def __init__(self, current: Callable[[Tensor], Tensor], beta: float) -> None:
        super().__init__()
        Leaky, grad = _snntorch()
        self.current, self.lif = current, Leaky(beta=beta, spike_grad=grad)

    def forward(self, x: Tensor) -> Tensor:
        mem, record = self.lif.reset_mem(), []
        for spikes in x.unbind(0):
            spikes, mem = self.lif(self.current(spikes), mem)
            record.append(spikes)
        return torch.stack(record)


class IndexedLoop(nn.Module):
    """The same as published with [Perez-Nieves & Goodman 2021]: the product of all steps first, then ``h[:, t]``.

    Under autograd each index makes a zero tensor of the size of ``h``, so its backward grows with T squared.
    """

    def __init__(self, current: Callable[[Tensor], Tensor], beta: float) -> None:
        super().__init__()
        self.current, self.beta, self.spike = current, beta, Surrogate("fast_sigmoid", (SLOPE,))

    def forward(self, x: Tensor) -> Tensor:
        h = self.current(x.transpose(0, 1))
        mem = torch.zeros_like(h[:, 0])
        record = []
        for t in range(h.shape[1]):
            mem = self.beta * mem + h[:, t] - (mem.detach() > 1).to(mem.dtype)
            record.append(self.spike(mem - 1))
        return torch.stack(record)
