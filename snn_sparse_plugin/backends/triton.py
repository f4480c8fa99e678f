"""The ``triton`` backend: products with spikes for all steps at once, then one kernel that walks them.

Spikes travel bit-packed. The forward keeps checkpoints of the state, the backward replays from them; weight and input
gradients are products with the gradient of the input current. Nothing waits for the device: what Python would have to
know is decided there, or was read when it arrived. Triton is imported on first use.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.backend import (
    Backend,
    InputGrads,
    LayerCall,
    LayerResult,
    Needs,
    OutputGrads,
    Saved,
    TtfsBackward,
    calls,
)
from ..core.bits import pack_events
from ..core.dynamics import NeuronSpec
from ..core.equations import Equations
from ..core.errors import UnsupportedError
from ..core.spikes import at_active
from ..core.surrogates import KINDS, Surrogate


class TritonBackend(Backend):
    """Fused Triton kernels on CUDA and ROCm devices; on the CPU under ``TRITON_INTERPRET=1``, for tests."""

    name = "triton"
    equations = True
    takes_dense = True
    takes_half = True
    priority = 100

    def available(self) -> tuple[bool, str]:
        try:
            from triton import __version__
        except ImportError as error:
            return False, f"triton is not installed ({error}): pip install snn-sparse-plugin[triton]"
        from ..triton_kernels import OLDEST

        if tuple(int(part) for part in __version__.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return (
                False,
                f"triton {__version__} does not compile every kernel: {oldest} (torch 2.8) and newer do",
            )
        if _interpreting():
            return True, f"triton {__version__} (interpreter)"
        if not torch.cuda.is_available():
            return False, "torch sees no CUDA or ROCm device"
        return True, f"triton {__version__}"

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
        if op not in ("spiking_layer", "ttfs"):
            return False, f"has no op {op!r}"
        if device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
            return False, f"runs on CUDA and ROCm devices, not on {device.type}"
        if dtype not in (torch.float32, torch.float64):
            return False, f"computes in float32 and float64, not in {dtype}"
        if recurrent and spec is not None and not spec.spiking:
            return False, "feeds spikes back, and a readout has none"
        if surrogate is not None and surrogate.kind not in KINDS:
            return False, f"has no kernel for {surrogate!r}; its formula is known to Python only"
        return True, ""

    def spiking_layer(self, call: LayerCall) -> LayerResult:
        calls[self.name, "forward"] += 1
        from ..triton_kernels import spiking_layer as kernels

        _check_width(call, kernels.MAX_RECURRENT)
        spiking, size = call.spec.spiking, call.T * call.B * call.N
        threshold = call.threshold if spiking and call.needs_grad else None
        driven = _driven(call, None)
        out = kernels.forward(
            call,
            driven.current,
            words=spiking and (call.want_events or call.rec_weight is not None),
            spikes=spiking and call.want_spikes,
            mem=call.want_mem,
            checkpoints=call.needs_grad,
            window=threshold,
        )
        near = out.near
        fraction = 1.0 if near is None else near.double() / max(1, size)
        saved = None
        if call.needs_grad:
            kept = out.v_checkpoints, out.i_checkpoints
            rows = driven.words is not None
            saved = Saved(threshold, v_checkpoints=kept[0], i_checkpoints=kept[1], near=near, adds_rows=rows)
        return LayerResult(out.spikes, None, out.mem, out.v, out.i, saved, fraction, out.words)

    def spiking_layer_backward(
        self,
        call: LayerCall,
        saved: Saved,
        events: tuple[Tensor, Tensor] | None,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        calls[self.name, "backward"] += 1
        from ..triton_kernels import products
        from ..triton_kernels import spiking_layer as kernels

        T, N = call.T, call.N
        assert saved.v_checkpoints is not None
        if not call.spec.spiking and grads.spikes is not None:  # a readout's output is its membrane
            both = grads.spikes if grads.mem is None else grads.spikes + grads.mem
            grads = grads._replace(spikes=None, mem=both)
        driven = _driven(call, saved.adds_rows)
        words = None
        if call.rec_weight is not None and call.spec.spiking:
            words = saved.words if events is None else pack_events(*events, (T, call.B, N))
            if words is None:  # a caller that kept none
                wanted = {"words": True, "spikes": False, "mem": False, "checkpoints": False}
                words = kernels.forward(call, driven.current, window=None, **wanted).words
        out = kernels.backward(
            call,
            driven.current,
            words,
            (saved.v_checkpoints, saved.i_checkpoints),
            saved.threshold if call.spec.spiking else None,
            saved.near if call.min_active > 0 else None,
            grads,
            params=needs.params,
            in_place=call.weight is not None,  # the current was made here
        )
        nu = out.nu

        found: dict[str, Tensor | None] = {}
        if needs.input:
            found["input"] = nu if call.weight is None else _input_grad(call, nu)
        if needs.weight and call.weight is not None:
            found["weight"] = driven.weight_gradient(nu, call.weight.shape[1])
        if needs.bias and call.bias is not None:
            found["bias"] = nu.sum((0, 1))
        if call.rec_weight is not None:
            if needs.rec_weight:
                assert words is not None
                found["rec_weight"] = products.weight_gradient(nu[1:], words[:-1], None, N)
            if needs.rec_bias and call.rec_bias is not None:
                found["rec_bias"] = nu[1:].sum((0, 1))
            if needs.rec0:
                found["rec0"] = nu[0] if T else nu.new_zeros(nu.shape[1:])
        if needs.v0:
            found["v0"] = out.v0
        if needs.i0:
            found["i0"] = out.i0
        if needs.params and out.params is not None:
            found["params"] = out.params.sum(1)
        return InputGrads(**found)

    def ttfs(self, x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
        from ..triton_kernels.ttfs import forward

        calls[self.name, "ttfs"] += 1
        forward(x, table, out, times)

    def ttfs_backward(self, call: TtfsBackward) -> tuple[Tensor, Tensor]:
        from ..triton_kernels.ttfs import backward

        calls[self.name, "ttfs_backward"] += 1
        return backward(call)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _check_width(call: LayerCall, widest: int) -> None:
    if call.rec_weight is not None and widest < call.N:
        raise UnsupportedError(
            f"the triton backend runs recurrent layers of up to {widest} neurons, "
            f'this one has {call.N}: ask for backend="reference".'
        )


class _Driven(NamedTuple):
    """The input current (T, B, C * N), and what it was made from: events as words, with values where they are graded,
    or numbers (T, B, M) alone."""

    current: Tensor
    words: Tensor | None = None
    values: Tensor | None = None

    def weight_gradient(self, nu: Tensor, features: int) -> Tensor:
        from ..triton_kernels import products

        if self.words is not None:
            return products.weight_gradient(nu, self.words, self.values, features)
        assert self.values is not None
        return nu.flatten(0, 1).t() @ self.values.flatten(0, 1)


def _driven(call: LayerCall, rows: bool | None) -> _Driven:
    """``rows``: how the forward multiplied a dense input; None: this is the forward."""
    from ..triton_kernels import products
    from ..triton_kernels.choice import adds_rows

    if call.weight is None:
        assert call.current is not None
        return _Driven(call.current)
    weight, bias = call.weight.detach(), None if call.bias is None else call.bias.detach()
    with torch.autocast(weight.device.type, enabled=False):
        if call.train is not None:
            words = call.train.words
            values = None if call.train.values is None else call.train._dense_data()
            return _Driven(products.current(words, values, weight, bias), words, values)
        assert call.dense is not None
        x = call.dense.detach()
        if not (adds_rows(call.name, x, weight) if rows is None else rows):
            return _Driven(F.linear(x, weight, bias), None, x)
        words = products.packed(x)
        return _Driven(products.current(words, x, weight, bias), words, x)


def _input_grad(call: LayerCall, nu: Tensor) -> Tensor:
    assert call.weight is not None
    grad = nu @ call.weight.detach()
    active = None if call.train is None else call.train.active
    return grad if active is None else at_active(grad, active)
