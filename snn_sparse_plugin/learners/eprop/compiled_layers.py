"""The layers of :class:`LSNNNetwork` as the kernels of ``backends/cpu/eprop.py`` see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...backends.cpu.bits import LANES
from ...backends.cpu.eprop import gradient_chunk
from ...backends.cpu.eprop_forward import forward_chunk
from ...backends.cpu.threads import parallel, split
from ...core.errors import InputError
from ...core.spikes import SpikeTrain
from .blocks import Window
from .compiled_readout import Common
from .layer import WatchedLayer
from .lsnn import LSNN, LSNNState

Events = tuple[
    np.ndarray, np.ndarray, np.ndarray, int, int
]  # ptr, columns, values, rows per sample, first row


def chunk_of(block: Tensor | Window, dtype: torch.dtype) -> Events:
    """The events of some steps as the kernels take them."""
    if isinstance(block, Window):
        train, start = block.train, block.start
    else:
        train, start = SpikeTrain.from_dense(block.to(dtype)), 0
    values = torch.empty(0, dtype=dtype) if train.values is None else train.values.to(dtype)
    return train.indptr.numpy(), train.indices.numpy(), values.numpy(), train.T, start


class CompiledLayer:
    def __init__(
        self,
        common: Common,
        watched: WatchedLayer,
        module: LSNN,
        B: int,
        state: LSNNState | None,
        spare: list[Traces],
    ) -> None:
        self.common, self.watched, self.module, self.B = common, watched, module, B
        N, M = module.hidden_size, module.input_size
        self.P = -(-N // LANES) * LANES
        self.low = (N - module.adaptive) // LANES * LANES if module.adaptive else self.P
        self.betas = self._padded(module.betas.to(common.dtype))
        zeros = torch.zeros(B, self.P, dtype=common.dtype)
        self.v, self.a, self.left, self.z = (zeros.clone() for _ in range(4))
        if state is not None:
            for own, given in zip((self.z, self.v, self.a, self.left), state, strict=True):
                own[:, :N] = given.detach()
        regular = common.rate_reg
        self.rate = zeros[:0] if regular is None else torch.full_like(zeros, regular.target)
        rows = [M, N if module.recurrent else 0]
        old: list[Any] = spare or [None, None]
        self.sources: list[Traces] = [
            Traces(B, m, self.P, self.low, common, e) for m, e in zip(rows, old, strict=True)
        ]
        self.K = 0
        self.versions: tuple[int, ...] = ()
        self.weights: list[np.ndarray] = []

    def _padded(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], self.P)
        out[..., : x.shape[-1]] = x.detach()
        return out

    def _transposed(self) -> list[np.ndarray]:
        both = (self.module.input_weights, self.module.recurrent_weights)
        now = tuple(0 if w is None else w._version for w in both)
        if now != self.versions or not self.weights:
            empty = torch.empty(0, self.P, dtype=self.common.dtype)
            self.weights = [(empty if w is None else self._padded(w.detach().T)).numpy() for w in both]
            self.versions = now
        return self.weights

    def _allocate(self, K: int) -> None:
        """Space for a chunk of K steps, used again by the next."""
        B, N, P, dtype = self.B, self.module.hidden_size, self.P, self.common.dtype
        self.K = K
        self.psi, self.filtered = torch.empty(B, K, P, dtype=dtype), torch.zeros(B, K, P, dtype=dtype)
        self.direct = torch.zeros(B if len(self.rate) else 0, K, P, dtype=dtype)
        self.own_ptr = np.empty(B * (K + 2), np.int64)
        self.own = np.empty((B, (K + 1) * N + 1), np.int32)
        self.spikes = torch.empty(K, B, N, dtype=dtype)

    def forward(self, events: Events, K: int) -> Tensor:
        """Run the steps -> spikes (K, B, N)."""
        m, B, dtype, regular = self.module, self.B, self.common.numpy_dtype, self.common.rate_reg
        scalars = [m.alpha, m.rho, m.v_th, m.gamma_pd, 0.0, 0.0, 0.0]
        if regular is not None:
            scalars[4:] = [regular.decay, regular.c, regular.target]
        if not bool(torch.isfinite(self.v).all()):
            raise InputError(f"EProp.run: the membrane of {self.watched.name} is NaN or infinite.")
        self.input = events
        if K != self.K:
            self._allocate(K)
        self.direct.zero_()
        spikes = self.spikes
        weights = self._transposed()
        numbers = np.array(scalars, dtype)
        states = [x.numpy() for x in (self.v, self.a, self.left, self.z, self.rate)]
        outs = [spikes.numpy(), self.psi.numpy(), self.direct.numpy()]
        ptr, indices, values, stride, offset = events

        def task(first: int, last: int) -> None:
            forward_chunk(
                *(
                    first,
                    last,
                    K,
                    ptr,
                    indices,
                    values,
                    stride,
                    offset,
                    *weights,
                    self.betas.numpy(),
                    numbers,
                ),
                *(m.refractory, m.hidden_size, *states, self.own_ptr, self.own, *outs),
            )

        parallel([lambda r=r: task(*r) for r in split(B)])  # type: ignore[misc]
        self.watched.count(spikes)
        return spikes

    def events(self) -> Events:
        """The layer's own spikes, as input of the next."""
        none = np.empty(0, self.common.numpy_dtype)
        return self.own_ptr, self.own.reshape(-1), none, self.K + 2, 1

    def gradient(self, signal: Tensor) -> None:
        """Add the gradient of the chunk; ``signal`` (K, B, N) came through the readout."""
        K, B, N, common = self.K, self.B, self.module.hidden_size, self.common
        self.filtered[..., :N] = signal.transpose(0, 1)
        scalars = np.array([self.module.alpha, self.module.rho, common.decay], common.numpy_dtype)
        ptr, indices, values, stride, offset = self.input
        shapes = [(x.rows, self.P) for x in self.sources]
        own = self.own.reshape(-1)
        arrays = [x.arrays() for x in self.sources]
        shared = [x.numpy() for x in (self.betas, self.psi, self.filtered, self.direct)]

        def task(first: int, last: int) -> list[Tensor]:
            outs = [torch.zeros(shape, dtype=common.dtype) for shape in shapes]
            gradient_chunk(
                *(first, last, K, scalars, self.low, common.carry, *shared),
                *(ptr, indices, values, stride, offset, *arrays[0], outs[0].numpy()),
                *(self.own_ptr, own, *arrays[1], outs[1].numpy()),
            )
            return outs

        parts = parallel([lambda r=r: task(*r) for r in split(B)])  # type: ignore[misc]
        parameters = [self.module.input_weights, self.module.recurrent_weights]
        masks = dict(self.module.masks())
        for weight, *grads in zip(parameters, *parts, strict=True):
            if weight is not None and weight.requires_grad:
                self.watched.add(weight, sum(grads).T[:N], masks.get(weight))  # type: ignore[union-attr]

    def state(self) -> LSNNState:
        N = self.module.hidden_size
        return LSNNState(*(x[:, :N].clone() for x in (self.z, self.v, self.a, self.left)))

    def tensors(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in ("v", "a", "left", "z", "rate")}
        for k, source in enumerate(self.sources):
            own |= {f"{name}{k}": getattr(source, name) for name in ("zeta", "eps", "ebar", "alive")}
        return own


class Traces:
    """Traces of one weight matrix: per input; per synapse of the adaptation and the output, in rows of P neurons."""

    def __init__(
        self, B: int, rows: int, P: int, low: int, common: Common, spare: Traces | None = None
    ) -> None:
        dtype, self.rows = common.dtype, rows
        carried = B if common.carry else 0
        self.zeta = torch.zeros(B, rows, dtype=dtype)
        self.alive = torch.zeros(B, rows, dtype=torch.bool)  # whether the input has spiked
        shapes = (carried, rows, P - low), (carried if common.decay else 0, rows, P)
        if spare is not None and (spare.eps.shape, spare.ebar.shape) == shapes and spare.eps.dtype == dtype:
            # a row is cleared when its input first spikes; new memory for every sequence would take longer
            self.eps: Tensor = spare.eps
            self.ebar: Tensor = spare.ebar
        else:
            # filled, so that all the memory that a sequence may need is taken at once
            self.eps, self.ebar = (torch.empty(shape, dtype=dtype).fill_(0) for shape in shapes)

    def arrays(self) -> list[np.ndarray]:
        return [x.numpy() for x in (self.zeta, self.eps, self.ebar, self.alive)]
