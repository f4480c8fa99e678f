"""The ``triton`` backend: products with spikes for all steps at once, then one kernel that walks them.

Spikes travel bit-packed. The forward keeps checkpoints of the state, the backward replays from them; weight and input
gradients are products with the gradient of the input current. Nothing waits for the device: what Python would have to
know is decided there, or was read when it arrived. Triton is imported on first use.
"""

from __future__ import annotations

import os

import torch
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
from ..core.surrogates import KINDS, Surrogate


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
            return False, f"triton is not installed ({error}): pip install 'triton>=3.4'"
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

    def takes_half(self, device: torch.device, dtype: torch.dtype) -> bool:
        if dtype is torch.float16 or device.type != "cuda" or torch.version.hip:
            return True
        return torch.cuda.get_device_capability(device) >= (8, 0)  # an older one has no bfloat16

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
        with torch.cuda.device_of(call.v0):
            return _forward(call)

    def spiking_layer_backward(
        self,
        call: LayerCall,
        saved: Saved,
        events: tuple[Tensor, Tensor] | None,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        calls[self.name, "backward"] += 1
        with torch.cuda.device_of(call.v0):
            return _backward(call, saved, events, grads, needs)

    def ttfs(self, x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
        from ..triton_kernels.ttfs import forward

        calls[self.name, "ttfs"] += 1
        forward(x, table, out, times)

    def ttfs_backward(self, call: TtfsBackward) -> tuple[Tensor, Tensor]:
        from ..triton_kernels.ttfs import backward

        calls[self.name, "ttfs_backward"] += 1
        return backward(call)


def _forward(call: LayerCall) -> LayerResult:
    from ..triton_kernels import spiking_layer as kernels
    from ..triton_kernels import synapses

    _check_width(call, kernels.MAX_RECURRENT)
    spiking, size = call.spec.spiking, call.T * call.B * call.N
    threshold = call.threshold if spiking and call.needs_grad else None
    driven = synapses.drive(call)
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
    # by a number of float64 on the host: one kernel
    fraction = 1.0 if near is None else near / torch.tensor(max(1.0, size), dtype=torch.float64)
    saved = None
    if call.needs_grad:
        kept = out.v_checkpoints, out.i_checkpoints
        saved = Saved(
            threshold,
            v_checkpoints=kept[0],
            i_checkpoints=kept[1],
            near=near,
            adds_rows=driven.added_rows,
        )
    return LayerResult(out.spikes, None, out.mem, out.v, out.i, saved, fraction, out.words)


def _backward(
    call: LayerCall,
    saved: Saved,
    events: tuple[Tensor, Tensor] | None,
    grads: OutputGrads,
    needs: Needs,
) -> InputGrads:
    from ..triton_kernels import products, synapses
    from ..triton_kernels import spiking_layer as kernels

    T, N = call.T, call.N
    assert saved.v_checkpoints is not None
    if not call.spec.spiking and grads.spikes is not None:  # a readout's output is its membrane
        both = grads.spikes if grads.mem is None else grads.spikes + grads.mem
        grads = grads._replace(spikes=None, mem=both)
    driven = synapses.drive(call, saved.adds_rows)
    words = None
    if call.rec_weight is not None and call.spec.spiking:
        words = saved.words if events is None else pack_events(*events, (T, call.B, N))
        if words is None:  # a caller that kept none
            wanted = {"words": True, "spikes": False, "mem": False, "checkpoints": False}
            words = kernels.forward(call, driven.current, window=None, **wanted).words
    bias, rec_bias = needs.bias and call.bias is not None, needs.rec_bias and call.rec_bias is not None
    pairs = needs.input and driven.takes_pairs(call, needs.weight)
    out = kernels.backward(
        call,
        driven.current,
        words,
        (saved.v_checkpoints, saved.i_checkpoints),
        saved.threshold if call.spec.spiking else None,
        saved.near if call.min_active > 0 else None,
        grads,
        params=needs.params,
        sums=bias or rec_bias or (call.once and needs.input),
        in_place=call.weight is not None,  # the current was made here
        pairs=pairs,
    )
    nu, sums = out.nu, out.sums

    found: dict[str, Tensor | None] = {}
    if needs.input:
        if call.once:
            assert sums is not None
            found["input"] = sums[:1]
        else:
            assert nu is not None
            found["input"] = nu if call.weight is None else synapses.input_gradient(call, nu, out.odd)
    if needs.weight and call.weight is not None:
        assert nu is not None
        found["weight"] = driven.weight_gradient(nu, call.weight.shape[1], pairs)
    if bias:
        assert sums is not None
        found["bias"] = sums[0].sum(0)
    if call.rec_weight is not None:
        assert nu is not None
        if needs.rec_weight:
            assert words is not None
            found["rec_weight"] = products.weight_gradient(nu[1:], words[:-1], None, N)
        if rec_bias:
            assert sums is not None
            found["rec_bias"] = sums[1].sum(0)
        if needs.rec0:
            found["rec0"] = nu[0] if T else nu.new_zeros(nu.shape[1:])
    if needs.v0:
        found["v0"] = out.v0
    if needs.i0:
        found["i0"] = out.i0
    if needs.params and out.params is not None:
        found["params"] = out.params.sum(1)
    return InputGrads(**found)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _check_width(call: LayerCall, widest: int) -> None:
    if call.rec_weight is not None and widest < call.N:
        raise UnsupportedError(
            f"the triton backend runs recurrent layers of up to {widest} neurons, "
            f'this one has {call.N}: ask for backend="reference".'
        )
