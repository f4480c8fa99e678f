"""The weight gradient from local derivatives and learning signals: the textbook rule, and the same sum in chunks.

A neuron is a small system of its own, with states h (membrane, adaptation, …) and, behind its spikes, what the
readout remembers of them, r. With all spikes it receives held fixed, ::

    z_t = z(h_{t-1}, x_t)      h_t = h(h_{t-1}, x_t)      r_t = A r_{t-1} + b z_t

and the gradient is the sum over t of L_t dr_t/dW (for the one r that is the output) + D_t dz_t/dW.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

Jacobian = dict[tuple[int, int], Tensor]
"""Local derivatives of one step, each (B, N); rows z, h_1, …, columns x, h_1, …; what is missing is zero."""


class Filter(NamedTuple):
    """What the readout remembers of a spike: ``r_t = A r_{t-1} + b z_t``, the output being component ``out``.

    No components (m = 0): the readout has no memory.
    """

    A: Tensor  # (m, m)
    b: Tensor  # (m,)
    out: int = 0


NO_MEMORY = Filter(torch.zeros(0, 0), torch.zeros(0))


class Steps(NamedTuple):
    """Some steps of one layer, oldest first."""

    local: Tensor  # (K, 1 + d, 1 + d, B, N), see Jacobian
    filtered: Tensor  # (K, B, N): L, the learning signal that comes through the readout
    direct: Tensor  # (K, B, N): D, what acts on the spikes themselves


class Synapses:
    """One weight matrix (N, M), the traces of its synapses and its gradient so far.

    Traces of a state whose decay is one number for all neurons are kept per input, (B, M): they are the same for
    every neuron. The others are kept per synapse, (B, N, M), or (B, synapses) where a mask says which exist.
    """

    def __init__(self, shape: Sequence[int], mask: Tensor | None, trace_dtype: torch.dtype | None) -> None:
        self.shape, self.trace_dtype = tuple(shape), trace_dtype
        self.exists = None if mask is None or bool(mask.all()) else mask.nonzero(as_tuple=True)
        self.per_input: dict[int, Tensor] = {}
        self.per_synapse: dict[int, Tensor] = {}
        self.grad: Tensor | None = None

    def add(self, grad: Tensor) -> None:
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def kept(self, traces: Tensor) -> Tensor:
        """(..., N, M) as it is stored."""
        traces = traces if self.exists is None else traces[..., self.exists[0], self.exists[1]]
        return traces if self.trace_dtype is None else traces.to(self.trace_dtype)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in which one sample's traces per synapse are kept."""
        return self.shape if self.exists is None else (len(self.exists[0]),)

    def rows(self, factor: Tensor) -> Tensor:
        """A factor of every neuron, (B, N), for each of its synapses."""
        return factor.unsqueeze(-1) if self.exists is None else factor[:, self.exists[0]]

    def spread(self, summed: Tensor) -> Tensor:
        """(N, M) of what was summed over samples in the form of storage."""
        if self.exists is None:
            return summed
        out = summed.new_zeros(self.shape)
        out[self.exists] = summed
        return out

    def reset(self) -> None:
        self.per_input, self.per_synapse = {}, {}


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
        for synapses, x in inputs:
            traces = synapses.per_synapse  # d state / d W, by component
            for t in range(len(x)):
                local, pre = steps.local[t], x[t].unsqueeze(-2)

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
            self._expand(synapses, shared, steps.local.shape[-1])
        components = [*states, *(~p for p in range(len(A)))]
        own = [c for c in components if c not in shared]
        lanes = own if carry else []
        nu, start = scan(steps, self.readout, [components.index(c) for c in lanes])
        places = {c: k for k, c in enumerate(components)}
        for synapses, x in inputs:
            synapses.add(nu[0].flatten(0, 1).T @ x.flatten(0, 1))
            for c, trace in synapses.per_input.items():
                synapses.add(start[0, places[c]].T @ trace)
            if synapses.per_synapse or lanes:
                self._per_synapse(synapses, x, nu, start, places, own, carry)
            if carry:
                synapses.per_input = _per_input(synapses.per_input, x, shared)

    def _share(self, local: Tensor, states: Sequence[int]) -> dict[int, dict[int, float]]:
        """States with the same decay for all neurons, samples and steps so far, that only such states feed."""
        found: dict[int, dict[int, float]] = {}
        if self.shared is None or self.shared:
            for k, state in enumerate(states):
                row = local[:, 1 + k].transpose(0, 1).flatten(1)  # (1 + d, everything)
                if bool((row == row[:, :1]).all()):
                    numbers = dict(zip([None, *states], row[:, 0].tolist(), strict=True))
                    found[state] = {c: n for c, n in numbers.items() if n != 0}  # type: ignore[misc]
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
        size = x.shape[1] if x.is_cuda else 1
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


def _per_input(
    traces: dict[int, Tensor], x: Tensor, shared: dict[int, dict[int, float]]
) -> dict[int, Tensor]:
    """``trace = D trace + e x_t`` over the steps of x, with numbers D and e."""
    names = list(shared)
    if not names:
        return {}
    D = torch.tensor([[shared[s].get(c, 0.0) for c in names] for s in names], dtype=x.dtype, device=x.device)
    e = torch.tensor(
        [shared[s].get(None, 0.0) for s in names],  # type: ignore[call-overload]
        dtype=x.dtype,
        device=x.device,
    )
    weights, power = [], e
    for _ in range(len(x)):
        weights.append(power)
        power = D @ power
    after = torch.einsum("ks,kbm->sbm", torch.stack(weights[::-1]), x)
    if traces:
        whole = torch.linalg.matrix_power(D, len(x))
        after = after + torch.einsum("sc,cbm->sbm", whole, torch.stack([traces[c] for c in names]))
    return dict(zip(names, after.unbind(), strict=True))


def scan(steps: Steps, readout: Filter, lanes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Back over the steps: what the current of each step, and the state before the first, does to each target.

    Target 0 is the loss; target ``1 + k`` is component ``lanes[k]`` of the state after the last step.

    Returns:
        nu (targets, K, B, N) and start (targets, components, B, N), components being h and then r.
    """
    if _on_triton(steps.local):
        return _scan_on_triton(steps, readout, lanes)
    A, b, out = readout
    K, d = steps.local.shape[0], steps.local.shape[1] - 1
    B, N = steps.local.shape[-2:]
    m = len(b)
    adjoint = steps.local.new_zeros(1 + len(lanes), d + m, B, N)
    for k, component in enumerate(lanes):
        adjoint[1 + k, component] = 1
    nu = steps.local.new_empty(1 + len(lanes), K, B, N)
    for t in range(K - 1, -1, -1):
        local = steps.local[t]
        h, r = adjoint[:, :d], adjoint[:, d:]
        if m:
            r[0, out] += steps.filtered[t]
            z = torch.einsum("p,lpbn->lbn", b, r)
            z[0] += steps.direct[t]
        else:
            z = steps.local.new_zeros(1 + len(lanes), B, N)
            z[0] = steps.direct[t] + steps.filtered[t]
        # rows of local times (z, h): columns x and h_{t-1}
        back = torch.einsum("rcbn,lrbn->lcbn", local, torch.cat([z.unsqueeze(1), h], 1))
        nu[:, t] = back[:, 0]
        adjoint = torch.cat([back[:, 1:], torch.einsum("pq,lpbn->lqbn", A, r)], 1)
    return nu, adjoint


def _on_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float32, torch.float64) and find_spec("triton") is not None


def _scan_on_triton(steps: Steps, readout: Filter, lanes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same in one launch; states and the readout's memory are one system there, current and spikes its last."""
    A, b, out = readout
    K, d = steps.local.shape[0], steps.local.shape[1] - 1
    m, shape = len(b), steps.local.shape[-2:]
    n = d + m
    system = steps.local.new_zeros(K, n + 1, n + 1, *shape)
    order = [*range(1, d + 1), 0]  # states, then spikes or current
    places = [*range(d), n]
    for row, k in zip(order, places, strict=True):
        for column, c in zip(order, places, strict=True):
            system[:, k, c] = steps.local[:, row, column]
            if k == n:
                for p in range(m):
                    system[:, d + p, c] = b[p] * steps.local[:, row, column]
    system[:, d:n, d:n] += A[..., None, None]
    first = steps.local.new_zeros(1 + len(lanes), n)
    for k, component in enumerate(lanes):
        first[1 + k, component] = 1
    kernels: Any = import_module("snn_sparse_plugin.triton_kernels.eprop")
    direct = steps.direct if m else steps.direct + steps.filtered
    return kernels.scan(system, steps.filtered, direct, first, d + out if m else -1)  # type: ignore[no-any-return]


RULES: dict[str, type[ChunkRule] | type[TextbookRule]] = {
    "chunk": ChunkRule,
    "offline": ChunkRule,
    "step": TextbookRule,
}
