"""The readout of :class:`LSNNNetwork` over a chunk of steps: outputs, errors, and the gradient of its weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...backends.cpu.eprop import leaky
from .blocks import Targets, Totals
from .layer import WatchedLayer
from .options import FiringRate
from .scan import on_cpu


class Common(NamedTuple):
    """What is common to all layers of a network."""

    dtype: torch.dtype
    device: torch.device
    kappa: float
    decay: float  # of the memory behind the spikes, as the learner has it
    rate_reg: FiringRate | None
    carry: bool  # whether a chunk hands traces on to the next

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype("float32" if self.dtype == torch.float32 else "float64")


class CompiledReadout:
    def __init__(
        self, common: Common, watched: WatchedLayer, linear: nn.Linear, B: int, state: Tensor | None
    ) -> None:
        self.kappa, self.watched, self.linear = common.kappa, watched, linear
        zeros = torch.zeros((), dtype=common.dtype, device=common.device)
        self.y = zeros.repeat(B, self.linear.out_features)
        if state is not None:
            self.y.copy_(state.detach())
        self.zeta, self.bias_zeta = zeros.repeat(B, self.linear.in_features), zeros.repeat(B, 1)

    def errors(self, z: Tensor, target: Targets, totals: Totals) -> Tensor | None:
        """dE/dy of every step, (K, B, C); None where the loss of no step depends on it."""
        with torch.no_grad():
            y = self.linear(z)
        _leaky(y, self.y, self.kappa)
        self.y = y[-1].clone()
        with torch.enable_grad():
            y.requires_grad_()
            loss = totals.add_all(y, target)
            if not loss.requires_grad:
                return None
            loss.backward()
        return y.grad

    def learn(self, z: Tensor, errors: Tensor | None) -> None:
        kappa, K = self.kappa, len(z)
        ones = z.new_ones(K, z.shape[1], 1)
        parameters = [(self.linear.weight, z, "zeta"), (self.linear.bias, ones, "bias_zeta")]
        if errors is not None:
            nu = errors.clone(memory_format=torch.contiguous_format)
            _leaky(nu, torch.zeros_like(self.y), kappa, reverse=True)
        weights = kappa ** torch.arange(K - 1, -1, -1, dtype=z.dtype, device=z.device)
        for weight, x, name in parameters:
            if weight is None:
                continue
            trace = getattr(self, name)
            if errors is not None and weight.requires_grad:
                grad = nu.flatten(0, 1).T @ x.flatten(0, 1) + (kappa * nu[0]).T @ trace
                self.watched.add(weight, grad, None)
            setattr(self, name, kappa**K * trace + torch.tensordot(weights, x, 1))

    def tensors(self) -> dict[str, Tensor]:
        return {"y": self.y, "zeta": self.zeta, "bias_zeta": self.bias_zeta}


def _leaky(x: Tensor, before: Tensor, kappa: float, reverse: bool = False) -> None:
    if on_cpu(x):
        flat = x.numpy().reshape(len(x), -1)
        leaky(flat, before.contiguous().numpy().reshape(-1), flat.dtype.type(kappa), reverse)
    else:
        kernels: Any = import_module("snn_sparse_plugin.triton_kernels.eprop")
        kernels.leak(x, before, kappa, reverse)
