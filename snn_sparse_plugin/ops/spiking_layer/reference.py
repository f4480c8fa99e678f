"""The specification of the op: the obvious loop in torch. Every other backend must equal it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.backend import (
    CHUNK,
    Backend,
    InputGrads,
    LayerCall,
    LayerResult,
    Needs,
    OutputGrads,
    Saved,
    TtfsBackward,
    calls,
    check_finite,
    keeps_active,
)
from ...core.canonical import Spike, step
from ...core.equations import Equations
from ...core.programs import step as equations_step
from ...core.spikes import Active, SpikeTrain, at_active
from ..ttfs import reference as ttfs_reference
from ..ttfs.kernels import family


def run(
    call: LayerCall, spike: Spike, current: Tensor, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The loop over T: -> (distances, spikes, membranes) each (T, B, N), and the final v and i."""
    spec, params = call.spec, inputs["params"]
    v, i = inputs["v0"], inputs["i0"]
    state = dict(zip(spec.states, v.unbind(0), strict=True)) if isinstance(spec, Equations) else {}
    s: Any = None
    distance: Any
    distances, spikes, mems = [], [], []
    for t, x in enumerate(current.unbind(0)):
        rec = None
        if call.rec_weight is not None:
            rec = inputs["rec0"] if t == 0 else F.linear(s, inputs["rec_weight"], inputs["rec_bias"])
        if isinstance(spec, Equations):
            distance, s, state = equations_step(spec.program, state, x, rec, params, spike)
            membrane = state[spec.membrane]
            distance, s = (membrane, membrane) if s is None else (distance, s)
        else:
            distance, s, v, i = step(spec, params, x, rec, v, i, spike)
            membrane = v
        distances.append(distance)
        spikes.append(s)
        mems.append(membrane)
    if state:
        v = torch.stack(list(state.values()))
    if not spikes:
        empty = current.new_zeros(0, call.B, call.N)
        return empty, empty, empty, v, i
    return torch.stack(distances), torch.stack(spikes), torch.stack(mems), v, i


_FIELDS = ("weight", "bias", "rec_weight", "rec_bias", "rec0", "v0", "i0", "params")


class ReferenceBackend(Backend):
    """Plain torch, any device, any floating dtype; backward runs the loop again under autograd."""

    name = "reference"
    priority = -100
    equations = True

    def available(self) -> tuple[bool, str]:
        return True, f"torch {torch.__version__}"

    def supports(self, op: str, **_: Any) -> tuple[bool, str]:
        return (True, "") if op in ("spiking_layer", "ttfs") else (False, f"has no op {op!r}")

    def ttfs(self, x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
        calls[self.name, "ttfs"] += 1
        found = ttfs_reference.forward(x, table)
        out.copy_(found[0])
        times.copy_(found[1])

    def ttfs_backward(self, call: TtfsBackward) -> tuple[Tensor, Tensor]:
        calls[self.name, "ttfs_backward"] += 1
        tau, t_d = call.tau.to(call.x.dtype), call.t_d.to(call.x.dtype)
        d_x, d_tau, d_t_d = ttfs_reference.backward(*call[:4], tau, t_d, family(call.rate))
        call.out.copy_(d_x)
        return d_tau, d_t_d

    def spiking_layer(self, call: LayerCall) -> LayerResult:
        calls[self.name, "forward"] += 1
        inputs: dict[str, Any] = {name: getattr(call, name) for name in _FIELDS}
        with torch.no_grad():
            current: Any = call.current
            if call.train is not None:
                current = F.linear(call.train._dense_data().flatten(2), inputs["weight"], call.bias)
            distances, spikes, mems, v, i = run(call, lambda x: (x > 0).to(x.dtype), current, inputs)
        check_finite(call, v)
        active, fraction, threshold = None, 1.0, call.threshold
        if call.spec.spiking and threshold is not None and call.needs_grad and distances.numel():
            near = distances.abs() < threshold
            fraction = float(near.sum()) / max(1, near.numel())
            if fraction < call.min_active:
                threshold = None
            elif call.save_active and keeps_active(call):
                indptr, indices = _csr(near)
                active = Active(indptr, indices)
        saved = None
        if call.needs_grad:
            chunks = torch.zeros(-(-call.T // CHUNK), call.B, call.N, dtype=v.dtype, device=v.device)
            static: dict[str, Any] = (
                {} if call.save_active else {"v_checkpoints": chunks, "i_checkpoints": chunks.clone()}
            )
            saved = Saved(threshold, active, **static)
        return LayerResult(
            spikes if call.want_spikes else None,
            _csr(spikes != 0) if call.want_events else None,
            mems if call.want_mem else None,
            v.clone(),
            None if i is None else i.clone(),
            saved,
            fraction,
        )

    def spiking_layer_backward(
        self,
        call: LayerCall,
        saved: Saved,
        events: tuple[Tensor, Tensor] | None,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        calls[self.name, "backward"] += 1
        arguments = (call, saved, events, grads, needs)
        if _autograd_works():
            return self._backward(*arguments)
        # inside a torch.library op nothing is recorded on this thread, and gradients would silently be zero
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(self._backward, *arguments).result()

    def _backward(
        self,
        call: LayerCall,
        saved: Saved,
        events: tuple[Tensor, Tensor] | None,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        surrogate, threshold = call.surrogate, saved.threshold

        def spike(x: Tensor) -> Tensor:
            return _Replay.apply(x, surrogate, threshold)

        with torch.enable_grad():
            inputs: dict[str, Any] = {
                name: None if (x := getattr(call, name)) is None else x.detach().requires_grad_()
                for name in _FIELDS
            }
            dense = call.current if call.train is None else call.train._dense_data().flatten(2)
            assert dense is not None
            dense = dense.detach().requires_grad_()
            current = dense if call.train is None else F.linear(dense, inputs["weight"], inputs["bias"])
            _, spikes, mems, v, i = run(call, spike, current, inputs)
            pairs = [(spikes, grads.spikes), (mems, grads.mem), (v, grads.v), (i, grads.i)]
            if grads.active is not None:
                assert saved.active is not None
                train = SpikeTrain(saved.active.indptr, saved.active.indices, spikes.shape, grads.active)
                pairs.append((spikes, train._dense_data()))
            pairs = [(out, g) for out, g in pairs if g is not None and out is not None and out.requires_grad]
            leaves = [dense, *(x for x in inputs.values() if x is not None)]
            if pairs:
                outs, gs = zip(*pairs, strict=True)
                found: Any = torch.autograd.grad(outs, leaves, gs, allow_unused=True)
            else:
                found = (None,) * len(leaves)
        by_leaf = {id(leaf): g for leaf, g in zip(leaves, found, strict=True)}

        def result(leaf: Tensor | None, wanted: bool) -> Tensor | None:
            if leaf is None or not wanted:
                return None
            g = by_leaf[id(leaf)]
            return torch.zeros_like(leaf) if g is None else g

        grad_input = result(dense, needs.input)
        if grad_input is not None and call.train is not None and call.train.active is not None:
            grad_input = at_active(grad_input, call.train.active)
        return InputGrads(
            grad_input, *(result(inputs[name], need) for name, need in zip(_FIELDS, needs[1:], strict=True))
        )


def _autograd_works() -> bool:
    with torch.enable_grad():
        return (torch.zeros((), requires_grad=True) * 1).requires_grad


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Any, threshold: float | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate, ctx.threshold = surrogate, threshold
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        grad = ctx.surrogate.grad(x) * grads[0]
        return (grad if ctx.threshold is None else grad * (x.abs() < ctx.threshold)), None, None


def _csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    """indptr and indices (int32) of a (T, B, N) mask, rows b * T + t."""
    rows, columns = mask.transpose(0, 1).reshape(-1, mask.shape[-1]).nonzero(as_tuple=True)
    indptr = torch.zeros(mask.shape[0] * mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    indptr[1:] = torch.bincount(rows, minlength=indptr.numel() - 1).cumsum(0)
    return indptr, columns.to(torch.int32)
