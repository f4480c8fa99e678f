"""The CPU backend: numba kernels, threads over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.backend import (
    Backend,
    InputGrads,
    LayerBackward,
    LayerCall,
    LayerResult,
    Needs,
    OutputGrads,
    PooledEvents,
    Saved,
    TtfsBackward,
    calls,
)
from ...core.convolution import Convolution
from ...core.dynamics import NeuronSpec
from ...core.equations import Equations
from ...core.spikes import SpikeTrain
from ...core.surrogates import CUSTOM, Surrogate


class CPUBackend(Backend):
    """Event-driven kernels for float32 and float64 CPU tensors; deterministic for a given number of threads."""

    name = "cpu"
    priority = 50
    equations = True
    takes_products = True

    def available(self) -> tuple[bool, str]:
        import numba

        return True, f"numba {numba.__version__}, {torch.get_num_threads()} threads"

    def supports(
        self,
        op: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        spec: NeuronSpec | Equations | None = None,
        surrogate: Surrogate | None = None,
        recurrent: bool = False,
    ) -> tuple[bool, str]:
        if op not in ("spiking_layer", "convolution", "ttfs"):
            return False, f"has no op {op!r}"
        if device.type != "cpu":
            return False, f"runs on CPU tensors, not on {device.type}"
        if dtype not in (torch.float32, torch.float64):
            return False, f"runs in float32 and float64, not in {dtype}"
        if surrogate is not None and surrogate.code == CUSTOM:
            return False, "has no kernel for a custom surrogate function"
        return True, ""

    def spiking_layer(self, call: LayerCall) -> LayerResult:
        return self._forward([call])[0]

    def spiking_layers(self, layers: Sequence[LayerCall]) -> list[LayerResult]:
        if self._overrides("spiking_layer"):
            return super().spiking_layers(layers)
        return self._forward(layers)

    def spiking_layer_backward(
        self,
        call: LayerCall,
        saved: Saved,
        events: tuple[Tensor, Tensor] | None,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        return self._backward([LayerBackward(call, saved, events, needs)], grads)[0]

    def spiking_layers_backward(
        self, layers: Sequence[LayerBackward], grads: OutputGrads
    ) -> list[InputGrads]:
        if self._overrides("spiking_layer_backward"):
            return super().spiking_layers_backward(layers, grads)
        return self._backward(layers, grads)

    def _overrides(self, method: str) -> bool:
        """Whether somebody wants to be asked for each layer: a subclass, or who has put a function in the place."""
        return getattr(getattr(self, method), "__func__", None) is not _OWN[method]

    def _forward(self, layers: Sequence[LayerCall]) -> list[LayerResult]:
        from .spiking_layer import run_forward

        calls[self.name, "forward"] += len(layers)
        return run_forward(layers)

    def _backward(self, layers: Sequence[LayerBackward], grads: OutputGrads) -> list[InputGrads]:
        from .spiking_layer_backward import run_backward

        calls[self.name, "backward"] += len(layers)
        return run_backward(layers, grads)

    def prefers_events(self, conv: Convolution, density: float, masked: bool) -> bool:
        from .conv import prefers_events

        return prefers_events(conv, density, masked)

    def convolution(
        self,
        conv: Convolution,
        train: SpikeTrain,
        weight: Tensor,
        bias: Tensor | None,
        keep_winners: bool,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        from .conv import forward

        return forward(conv, train, weight, bias, keep_winners, factors)

    def convolution_backward(
        self,
        conv: Convolution,
        train: SpikeTrain,
        weight: Tensor,
        nu: Tensor,
        winners: Tensor | None,
        *,
        weight_grad: bool,
        bias_grad: bool,
        input: str,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from .conv import backward

        return backward(
            conv, train, weight, nu, winners, weight_grad=weight_grad, bias_grad=bias_grad, input=input
        )

    def pool(self, conv: Convolution, train: SpikeTrain) -> PooledEvents:
        calls[self.name, "pool"] += 1
        if conv.pool is not None and conv.pool.kind == "avg":
            from .conv_average import average

            return average(conv, train)
        from .conv_pool import pool

        return pool(conv, train)

    def pool_backward(self, conv: Convolution, train: SpikeTrain, grad: Tensor) -> Tensor:
        if conv.pool is not None and conv.pool.kind == "avg":
            from .conv_average import average_backward

            return average_backward(conv, grad)
        from .conv_pool import pool_backward

        return pool_backward(conv, train, grad)

    def ttfs(self, x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
        from .ttfs import forward

        calls[self.name, "ttfs"] += 1
        forward(x, table, out, times)

    def ttfs_backward(self, call: TtfsBackward) -> tuple[Tensor, Tensor]:
        from .ttfs import backward

        calls[self.name, "ttfs_backward"] += 1
        d_tau, d_t_d = torch.tensor(backward(call), dtype=torch.float64)
        return d_tau, d_t_d


_OWN = {name: vars(CPUBackend)[name] for name in ("spiking_layer", "spiking_layer_backward")}

__all__: list[Any] = ["CPUBackend"]
