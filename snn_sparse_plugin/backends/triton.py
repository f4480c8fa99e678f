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
        from ..triton_kernels.choice import pairs_for_input_gradient

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
        bias, rec_bias = needs.bias and call.bias is not None, needs.rec_bias and call.rec_bias is not None
        pairs = (
            needs.input
            and call.weight is not None
            and call.rec_weight is None  # the recurrence reads nu back
            and (driven.words is not None or not needs.weight)  # the library's product of a dense input, too
            and pairs_for_input_gradient(T * call.B, call.weight)
        )
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
                found["input"] = nu if call.weight is None else _input_grad(call, nu, out.odd)
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
    or numbers (T, B, M) alone. ``added_rows``: so the events were multiplied."""

    current: Tensor
    words: Tensor | None = None
    values: Tensor | None = None
    added_rows: bool | None = None

    def weight_gradient(self, nu: Tensor, features: int, pairs: bool) -> Tensor:
        from ..triton_kernels import products

        if self.words is not None:
            return products.weight_gradient(nu, self.words, self.values, features, pairs)
        assert self.values is not None
        return nu.flatten(0, 1).t() @ self.values.flatten(0, 1)


def _driven(call: LayerCall, rows: bool | None) -> _Driven:
    """``rows``: how the forward multiplied its input; None: this is the forward."""
    from ..triton_kernels import products, terms
    from ..triton_kernels.choice import adds_rows, adds_rows_of_bits

    if call.weight is None:
        assert call.current is not None
        return _Driven(call.current)
    weight, bias = call.weight.detach(), None if call.bias is None else call.bias.detach()
    with torch.autocast(weight.device.type, enabled=False):
        if call.train is not None:
            words = call.train.words
            values = None if call.train.values is None else call.train._dense_data()
            if rows is None:
                rows = values is not None or adds_rows_of_bits(call.name, words, weight)
            if not rows:
                return _Driven(terms.current(words, weight, bias), words, None, False)
            return _Driven(products.current(words, values, weight, bias), words, values, True)
        # numbers of any kind, which no bf16 is known to hold
        assert call.dense is not None
        x = call.dense.detach()
        if not (adds_rows(call.name, x, weight) if rows is None else rows):
            return _Driven(F.linear(x, weight, bias), None, x, False)
        words = products.packed(x)
        return _Driven(products.current(words, x, weight, bias), words, x, True)


def _input_grad(call: LayerCall, nu: Tensor, odd: Tensor | None) -> Tensor:
    """``odd`` is given where nu is pairs of bf16 numbers."""
    from ..triton_kernels import terms

    assert call.weight is not None
    weight = call.weight.detach()
    grad = nu @ weight if odd is None else terms.input_gradient(nu, odd, weight)
    active = None if call.train is None else call.train.active
    return grad if active is None else at_active(grad, active)
