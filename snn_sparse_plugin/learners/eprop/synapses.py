"""The traces of one weight matrix, and its gradient so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def only_autapses(mask: Tensor) -> bool:
    """Whether all but the diagonal of a square matrix exists."""
    square = mask.shape[0] == mask.shape[1]
    return square and bool((mask | torch.eye(len(mask), dtype=torch.bool, device=mask.device)).all())


class Synapses:
    """One weight matrix (N, M), the traces of its synapses and its gradient so far.

    Traces of a state whose decay is one number for all neurons are kept per input, (B, M): they are the same for
    every neuron. The others are kept per synapse, (B, N, M), or (B, synapses) where a mask says which exist. (Where
    only autapses are missing, the few traces cost less than the indices.)
    """

    def __init__(self, shape: Sequence[int], mask: Tensor | None, trace_dtype: torch.dtype | None) -> None:
        self.shape, self.trace_dtype = tuple(shape), trace_dtype
        self.mask = None if mask is None or bool(mask.all()) else mask.bool()
        whole = self.mask is None or only_autapses(self.mask)
        self.exists = None if whole else self.mask.nonzero(as_tuple=True)  # type: ignore[union-attr]
        self.per_input: dict[int, Tensor] = {}
        self.per_synapse: dict[int, Tensor] = {}
        self.grad: Tensor | None = None
        self._block: Tensor | None = None
        self._views: list[Tensor] = []

    def add(self, grad: Tensor) -> None:
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def take(self) -> Tensor | None:
        """Return the gradient so far and start again from zero."""
        grad, self.grad = self.grad, None
        return grad if grad is None or self.mask is None else grad.masked_fill_(~self.mask, 0.0)

    def kept(self, traces: Tensor) -> Tensor:
        """A tensor (..., N, M) in the form in which traces are stored: where a mask exists, its synapses alone."""
        traces = traces if self.exists is None else traces[..., self.exists[0], self.exists[1]]
        return traces if self.trace_dtype is None else traces.to(self.trace_dtype)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in which one sample's traces per synapse are kept."""
        return self.shape if self.exists is None else (len(self.exists[0]),)

    def block(self, components: Sequence[int], B: int, like: Tensor) -> Tensor:
        """The traces per synapse of some components in one tensor (components, B, M, N), as kernels walk over them.

        From here on ``per_synapse`` holds views of it. A later sequence uses its memory again.
        """
        traces = [self.per_synapse.get(c) for c in components]
        block, shape = self._block, (len(components), B, *self.shape[::-1])
        same = block is not None and block.shape == shape and block.dtype == like.dtype
        if same and all(x is y for x, y in zip(traces, self._views, strict=True)):
            return block  # type: ignore[return-value]
        if same and not any(x is not None for x in traces):
            whole = block.zero_()  # type: ignore[union-attr]
        else:
            whole = like.new_zeros(shape)
            for part, trace in zip(whole, traces, strict=True):
                if trace is not None:
                    part.copy_(trace.transpose(1, 2))
        self._block, self._views = whole, [part.transpose(1, 2) for part in whole]
        self.per_synapse = dict(zip(components, self._views, strict=True))
        return whole

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
