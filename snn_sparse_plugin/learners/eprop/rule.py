"""The weight gradient from local derivatives and learning signals: the textbook rule, and the same sum in chunks.

A neuron is a small system of its own, with states h (membrane, adaptation, …) and, behind its spikes, what the
readout remembers of them, r. With all spikes it receives held fixed, ::

    z_t = z(h_{t-1}, x_t)      h_t = h(h_{t-1}, x_t)      r_t = A r_{t-1} + b z_t

and the gradient is the sum over t of L_t dr_t/dW (for the one r that is the output) + D_t dz_t/dW.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...core.spikes import SpikeTrain
from .scan import Filter, Jacobian, Steps, on_cpu, on_triton, scan
from .synapses import Synapses

# a kernel sums over events up to this share of ones in the input, beyond it a matrix product is faster
_DENSE = 0.5
_IN_CACHE = 1 << 16  # traces that many samples may have at once


class TextbookRule:
    """Every trace of every synapse at every step: slow, and the reference for :class:`ChunkRule`."""

    def __init__(self, readout: Filter) -> None:
        self.readout = readout

    def process(
        self,
        steps: Steps,
        states: Sequence[int],
        inputs: Sequence[tuple[Synapses, Tensor]],
        carry: bool = True,
    ) -> None:
        A, b, out = self.readout
        whole = steps.dense()
        for synapses, x in inputs:
            traces = synapses.per_synapse  # d state / d W, by component
            for t in range(len(x)):
                local, pre = whole[t], x[t].unsqueeze(-2)

                def derivative(row: int, local: Tensor = local, pre: Tensor = pre) -> Tensor:
                    total = local[row, 0].unsqueeze(-1) * pre
                    for k, state in enumerate(states):
                        if state in traces:  # noqa: B023, called at once
                            total = total + local[row, 1 + k].unsqueeze(-1) * traces[state]  # noqa: B023
                    return total

                e = derivative(0)
                after = {state: derivative(1 + k) for k, state in enumerate(states)}
                for p in range(len(b)):
                    memory = b[p] * e
                    for q in range(len(b)):
                        if A[p, q] != 0 and ~q in traces:
                            memory = memory + A[p, q] * traces[~q]
                    after[~p] = memory
                e_bar = after[~out] if len(b) else e
                grad = (steps.filtered[t].unsqueeze(-1) * e_bar + steps.direct[t].unsqueeze(-1) * e).sum(0)
                synapses.add(grad if synapses.exists is None else synapses.spread(grad[synapses.exists]))
                traces.update(after)

    def reset(self) -> None:
        pass


class ChunkRule:
    """The same gradient from one scan back over a chunk of steps; traces per synapse are touched once per chunk."""

    def __init__(self, readout: Filter) -> None:
        self.readout = readout
        self.reset()

    def reset(self) -> None:
        self.shared: dict[int, dict[int, float]] | None = (
            None  # of every state with one decay: its row of numbers
        )

    def process(
        self,
        steps: Steps,
        states: Sequence[int],
        inputs: Sequence[tuple[Synapses, Tensor]],
        carry: bool = True,
    ) -> None:
        """Add the gradient of some steps.

        Args:
            states: which state each row and column of ``steps.local`` belongs to; a readout's component p is ``~p``.
            inputs: weights with what they received, (K, B, M).
            carry: False at the end of a sequence, when no trace is needed any more.
        """
        A, _, _ = self.readout
        shared = self._share(steps.local, states)
        for synapses, _ in inputs:
            self._expand(synapses, shared, steps.filtered.shape[-1])
        components = [*states, *(~p for p in range(len(A)))]
        own = [c for c in components if c not in shared]
        lanes = own if carry else []
        nu, start = scan(steps, self.readout, [components.index(c) for c in lanes])
        places = {c: k for k, c in enumerate(components)}
        for synapses, x in inputs:
            where = _kernels(synapses, x, bool(synapses.per_synapse or lanes))
            events = _events(x) if where == "backends.cpu" else x
            if where and events is not None:
                kernels = import_module(f"snn_sparse_plugin.{where}.eprop_chunk")
                self._by_kernel(kernels, synapses, events, nu, start, places, own, carry)
            else:
                synapses.add(nu[0].flatten(0, 1).T @ x.flatten(0, 1))
                for c, trace in synapses.per_input.items():
                    synapses.add(start[0, places[c]].T @ trace)
                if synapses.per_synapse or lanes:
                    self._per_synapse(synapses, x, nu, start, places, own, carry)
            if carry:
                synapses.per_input = _per_input(synapses.per_input, x, shared)

    @staticmethod
    def _by_kernel(
        kernels: Any,
        synapses: Synapses,
        events: Any,
        nu: Tensor,
        start: Tensor,
        places: dict[int, int],
        own: Sequence[int],
        carry: bool,
    ) -> None:
        """The same as the products below, as sums over the spikes of the input, with one pass over the traces."""
        kept = own if carry else list(synapses.per_synapse)
        traces = synapses.block(kept, nu.shape[2], nu)
        shared = [(places[c], trace) for c, trace in synapses.per_input.items()]
        own_at = [places[c] for c in kept]
        synapses.add(kernels.sum_and_carry(events, nu, start, shared, traces, own_at, carry).T)

    def _share(self, local: Jacobian, states: Sequence[int]) -> dict[int, dict[int, float]]:
        """States with the same decay for all neurons, samples and steps so far, that only such states feed."""
        found: dict[int, dict[int, float]] = {}
        if self.shared is None or self.shared:
            columns = [None, *states]
            for k, state in enumerate(states):
                row = {c: local.get((1 + k, place), 0.0) for place, c in enumerate(columns)}
                if not any(isinstance(n, Tensor) for n in row.values()):
                    found[state] = {c: n for c, n in row.items() if n != 0}  # type: ignore[misc]
        before = self.shared
        if before is not None:
            found = {s: row for s, row in found.items() if before.get(s) == row}
        while loose := [s for s, row in found.items() if any(c is not None and c not in found for c in row)]:
            for state in loose:
                del found[state]
        self.shared = found
        return found

    @staticmethod
    def _expand(synapses: Synapses, shared: dict[int, dict[int, float]], n: int) -> None:
        """Traces per input whose state is not shared any more become traces per synapse."""
        for state in [s for s in synapses.per_input if s not in shared]:
            trace = synapses.per_input.pop(state)
            B, M = trace.shape
            synapses.per_synapse[state] = synapses.kept(trace.unsqueeze(1).expand(B, n, M)).contiguous()

    @staticmethod
    def _per_synapse(
        synapses: Synapses,
        x: Tensor,
        nu: Tensor,
        start: Tensor,
        places: dict[int, int],
        own: Sequence[int],
        carry: bool,
    ) -> None:
        """What traces per synapse add to the gradient, and what becomes of them in the chunk.

        On a CPU sample by sample: one (N, M) at a time stays in cache, where (B, N, M) of anything new would not.
        """
        whole = not on_cpu(x) or x.shape[1] * synapses.shape[0] * synapses.shape[1] <= _IN_CACHE
        size = x.shape[1] if whole else 1
        total = nu.new_zeros(synapses.stored)
        if carry:
            dtype = synapses.trace_dtype or nu.dtype
            for c in own:
                if c not in synapses.per_synapse:
                    synapses.per_synapse[c] = nu.new_zeros(x.shape[1], *synapses.stored, dtype=dtype)
        for part in range(0, x.shape[1], size):
            b = slice(part, part + size)
            before = {c: traces[b].to(nu.dtype) for c, traces in synapses.per_synapse.items()}
            for c, trace in before.items():
                total += (synapses.rows(start[0, places[c], b]) * trace).sum(0)
            new = []
            for lane in range(len(own) if carry else 0):
                fresh = nu[1 + lane, :, b].permute(1, 2, 0) @ x[:, b].transpose(0, 1)
                for c, trace in synapses.per_input.items():
                    fresh.addcmul_(start[1 + lane, places[c], b].unsqueeze(-1), trace[b].unsqueeze(-2))
                if synapses.exists is not None:
                    fresh = fresh[:, synapses.exists[0], synapses.exists[1]]
                for c, trace in before.items():
                    fresh.addcmul_(synapses.rows(start[1 + lane, places[c], b]), trace)
                new.append(fresh)
            for c, fresh in zip(own, new, strict=False):
                synapses.per_synapse[c][b] = fresh
        synapses.add(synapses.spread(total))


def _kernels(synapses: Synapses, x: Tensor, traces: bool) -> str:
    """Whose kernel takes an input (K, B, M), or ``""``; a device's is for ``traces`` per synapse alone."""
    if synapses.exists is not None or x.shape[-1] == 1 or synapses.trace_dtype not in (None, x.dtype):
        return ""
    return "backends.cpu" if on_cpu(x) else "triton_kernels" if traces and on_triton(x) else ""


def _events(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The events of an input (K, B, M), row ``b K + t``; None where a matrix product is faster."""
    train = SpikeTrain.from_dense(x)
    if train.indices.numel() > _DENSE * x.numel():
        return None
    return train.indptr, train.indices, train.values


def _per_input(
    traces: dict[int, Tensor], x: Tensor, shared: dict[int, dict[int, float]]
) -> dict[int, Tensor]:
    """``trace = D trace + e x_t`` over the steps of x, with numbers D and e."""
    names = list(shared)
    if not names:
        return {}
    K = len(x)
    whole, weights = _decay(tuple((s, tuple(shared[s].items())) for s in names), K, x.dtype, x.device)
    after = (weights @ x.reshape(K, -1)).view(-1, *x.shape[1:])
    if traces:
        after = after + torch.einsum("sc,cbm->sbm", whole, torch.stack([traces[c] for c in names]))
    return dict(zip(names, after.unbind(), strict=True))


@lru_cache(maxsize=64)
def _decay(
    shared: tuple[tuple[int, tuple[tuple[int | None, float], ...]], ...],
    K: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """D^K (S, S), and what is left after K steps of an input at each of them, (S, K)."""
    rows = {s: dict(row) for s, row in shared}
    D = torch.tensor([[rows[s].get(c, 0.0) for c in rows] for s in rows], dtype=dtype)
    power = torch.tensor([rows[s].get(None, 0.0) for s in rows], dtype=dtype)
    weights = []
    for _ in range(K):
        weights.append(power)
        power = D @ power
    return torch.linalg.matrix_power(D, K).to(device), torch.stack(weights[::-1], 1).to(device)


RULES: dict[str, type[ChunkRule] | type[TextbookRule]] = {
    "chunk": ChunkRule,
    "offline": ChunkRule,
    "step": TextbookRule,
}
