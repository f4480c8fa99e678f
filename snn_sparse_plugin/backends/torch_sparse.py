"""A second sparse product: synapses by ``torch_sparse``, neurons by the backend below it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..core.backend import Backend, InputGrads, LayerCall, LayerResult, Needs, OutputGrads, Saved, calls
from ..core.spikes import at_active


class TorchSparseBackend(Backend):
    """Event input times W through ``torch_sparse.SparseTensor``; never chosen over the CPU or Triton kernels."""

    name = "torch_sparse"
    priority = 10

    @cached_property
    def _status(self) -> tuple[bool, str]:
        try:
            import torch_sparse
        except (ImportError, OSError) as error:
            hint = "pip install --no-build-isolation torch-scatter torch-sparse"
            return False, f"torch_sparse cannot be imported ({error}): {hint}"
        return True, f"torch_sparse {torch_sparse.__version__}"

    def available(self) -> tuple[bool, str]:
        return self._status

    def supports(self, op: str, *, dtype: torch.dtype, **_: Any) -> tuple[bool, str]:
        if op != "spiking_layer":
            return False, f"has no op {op!r}"
        if dtype not in (torch.float32, torch.float64):
            return False, f"runs in float32 and float64, not in {dtype}"
        return True, ""

    def _neurons(self, call: LayerCall) -> Backend:
        return select(
            "auto",
            "spiking_layer",
            device=call.v0.device,
            dtype=call.v0.dtype,
            spec=call.spec,
            surrogate=call.surrogate,
            recurrent=call.rec_weight is not None,
            without=self.name,
        )

    def _dense(self, call: LayerCall) -> LayerCall:
        """The same call with the synaptic product done."""
        if call.train is None:
            return call
        assert call.weight is not None
        current = call.train.to_torch_sparse().matmul(call.weight.detach().t().contiguous())
        if call.bias is not None:
            current = current + call.bias.detach()
        current = current.view(call.B, call.T, call.N).transpose(0, 1).contiguous()
        return replace(call, train=None, current=current, weight=None, bias=None)

    def spiking_layer(self, call: LayerCall) -> LayerResult:
        calls[self.name, "forward"] += 1
        return self._neurons(call).spiking_layer(self._dense(call))

    def spiking_layer_backward(
        self,
        call: LayerCall,
        saved: Saved,
        events: tuple[Tensor, Tensor] | None,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        calls[self.name, "backward"] += 1
        train, weight, backend = call.train, call.weight, self._neurons(call)
        if train is None or weight is None:
            return backend.spiking_layer_backward(call, saved, events, grads, needs)
        inner = needs._replace(input=True, weight=False, bias=False)
        found = backend.spiking_layer_backward(self._dense(call), saved, events, grads, inner)
        nu = found.input
        assert nu is not None
        rows = nu.transpose(0, 1).reshape(call.B * call.T, call.N)
        g_weight = train.to_torch_sparse().t().matmul(rows).t() if needs.weight else None
        g_bias = rows.sum(0) if needs.bias and call.bias is not None else None
        g_input = None
        if needs.input:
            g_input = nu @ weight
            if train.active is not None:
                g_input = at_active(g_input, train.active)
        return found._replace(input=g_input, weight=g_weight, bias=g_bias)
