"""The ``triton`` backend: one kernel launch walks all steps of a layer; spikes travel bit-packed.

The forward keeps checkpoints of the state, the backward replays from them; weight and input gradients are
matrix products with the gradient of the input current. Triton is imported on first use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

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
    enough,
)
from ..core.bits import pack_events, unpack
from ..core.dynamics import NeuronSpec
from ..core.equations import Equations
from ..core.errors import UnsupportedError
from ..core.spikes import at_active
from ..core.surrogates import KINDS, Surrogate

if TYPE_CHECKING:
    from ..triton_kernels.spiking_layer import Backward, Forward

_TILE = 2**24  # elements of the unpacked input multiplied at a time for the weight gradient


class TritonBackend(Backend):
    """Fused Triton kernels on CUDA and ROCm devices; on the CPU under ``TRITON_INTERPRET=1``, for tests."""

    name = "triton"
    equations = True
    takes_dense = True
    priority = 100

    def available(self) -> tuple[bool, str]:
        try:
            from triton import __version__
        except ImportError as error:
            return False, f"triton is not installed ({error}): pip install snn-sparse-plugin[triton]"
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
        spec, size = call.spec, call.T * call.B * call.N
        threshold = call.threshold if spec.spiking and call.needs_grad else None
        out = self._forward(
            call,
            words=spec.spiking and (call.want_events or call.rec_weight is not None),
            spikes=spec.spiking and call.want_spikes,
            mem=call.want_mem,
            checkpoints=call.needs_grad,
            window=threshold,
        )
        near = None if out.near is None else out.near.sum()
        fraction = 1.0 if near is None else near.double() / max(1, size)
        saved = None
        if call.needs_grad:
            saved = Saved(
                threshold, v_checkpoints=out.v_checkpoints, i_checkpoints=out.i_checkpoints, near=near
            )
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
        from ..triton_kernels import spiking_layer as kernels

        T, B, N = call.T, call.B, call.N
        assert saved.v_checkpoints is not None
        if not call.spec.spiking and grads.spikes is not None:  # a readout's output is its membrane
            both = grads.spikes if grads.mem is None else grads.spikes + grads.mem
            grads = grads._replace(spikes=None, mem=both)
        words = None
        if call.rec_weight is not None and call.spec.spiking:
            words = saved.words if events is None else pack_events(*events, (T, B, N))
            if words is None:  # a caller that kept none
                words = self._forward(
                    call, words=True, spikes=False, mem=False, checkpoints=False, window=None
                ).words
        current, in_words = _inputs(call)
        checkpoints = (saved.v_checkpoints, saved.i_checkpoints)

        def adjoint(window: float | None) -> Backward:
            return kernels.backward(
                call, current, in_words, words, checkpoints, window, grads, params=needs.params
            )

        out = adjoint(saved.threshold if call.spec.spiking else None)
        if saved.near is not None and call.min_active > 0:
            # the kernel has its window built in, and whether it holds is known on the device alone
            holds, exact = saved.near >= enough(call), adjoint(None)
            pairs: Any = zip(out, exact, strict=True)
            out = kernels.Backward._make(a if a is None else torch.where(holds, a, b) for a, b in pairs)
        nu = out.nu

        found: dict[str, Tensor | None] = {}
        if needs.input:
            found["input"] = nu if call.weight is None else _input_grad(call, nu)
        if needs.weight and call.weight is not None:
            dense = None if in_words is not None else _dense(call)
            found["weight"] = _outer(nu, in_words, dense, call.weight.shape[1])
        if needs.bias and call.bias is not None:
            found["bias"] = nu.sum((0, 1))
        if call.rec_weight is not None:
            if needs.rec_weight:
                assert words is not None
                found["rec_weight"] = _outer(nu[1:], words[:-1], None, N)
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

    def _forward(self, call: LayerCall, **wanted: Any) -> Forward:
        from ..triton_kernels import spiking_layer as kernels

        if call.rec_weight is not None and call.N > kernels.MAX_RECURRENT:
            raise UnsupportedError(
                f"the triton backend runs recurrent layers of up to {kernels.MAX_RECURRENT} neurons, "
                f'this one has {call.N}: ask for backend="reference".'
            )
        return kernels.forward(call, *_inputs(call), **wanted)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _inputs(call: LayerCall) -> tuple[Tensor | None, Tensor | None]:
    """What the kernels read: the current (T, B, N), or the packed spikes of a binary train."""
    if call.weight is None:
        return call.current, None
    if call.train is not None and call.train.values is None:
        return None, call.train.words
    with torch.no_grad(), torch.autocast(call.v0.device.type, enabled=False):
        return F.linear(_dense(call), call.weight, call.bias), None


def _dense(call: LayerCall) -> Tensor:
    """The input (T, B, M) in numbers."""
    if call.train is not None:
        return call.train._dense_data()
    assert call.dense is not None
    return call.dense.detach()


def _outer(nu: Tensor, words: Tensor | None, dense: Tensor | None, features: int) -> Tensor:
    """Sum over steps and samples of nu outer spikes, (N, features); words are unpacked a tile at a time."""
    T, B, N = nu.shape
    if words is None:
        assert dense is not None
        return nu.flatten(0, 1).t() @ dense.flatten(0, 1)
    grad = nu.new_zeros(N, features)
    steps = max(1, _TILE // max(1, B * features))
    for t in range(0, T, steps):
        tile = unpack(words[t : t + steps], features).to(nu.dtype)
        grad.addmm_(nu[t : t + steps].flatten(0, 1).t(), tile.flatten(0, 1))
    return grad


def _input_grad(call: LayerCall, nu: Tensor) -> Tensor:
    assert call.weight is not None
    grad = nu @ call.weight.detach()
    active = None if call.train is None else call.train.active
    return grad if active is None else at_active(grad, active)
