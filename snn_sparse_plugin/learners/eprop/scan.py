"""Back over a chunk of steps: what currents and the state before it do to the loss and to the state after it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.host import is_device

Jacobian = dict[tuple[int, int], Tensor | float]
"""Local derivatives; rows z, h_1, …, columns x, h_1, …; what is missing is zero, a number is that of all neurons."""


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

    local: Jacobian  # entries (K, B, N) or numbers
    states: int  # d, so that rows and columns are 0 … d
    filtered: Tensor  # (K, B, N): L, the learning signal that comes through the readout
    direct: Tensor  # (K, B, N): D, what acts on the spikes themselves

    def dense(self) -> Tensor:
        """The derivatives as one tensor (K, 1 + d, 1 + d, B, N)."""
        K, *shape = self.filtered.shape
        whole = self.filtered.new_zeros(K, 1 + self.states, 1 + self.states, *shape)
        for (row, column), value in self.local.items():
            whole[:, row, column] = value
        return whole


def scan(steps: Steps, readout: Filter, lanes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the current of each step, and the state before the first, does to each target.

    Target 0 is the loss; target ``1 + k`` is component ``lanes[k]`` of the state after the last step.

    Returns:
        nu (targets, K, B, N) and start (targets, components, B, N), components being h and then r.
    """
    if on_triton(steps.filtered):
        return _on_triton(steps, readout, lanes)
    if on_cpu(steps.filtered):
        kernels: Any = import_module("snn_sparse_plugin.backends.cpu.eprop_chunk")
        local, numbers, table = _packed(steps)
        return kernels.scan(  # type: ignore[no-any-return]
            local, numbers, table, readout.A, readout.b, readout.out, steps.filtered, steps.direct, lanes
        )
    return reference(steps, readout, lanes)


def reference(steps: Steps, readout: Filter, lanes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The specification, for any device and dtype."""
    A, b, out = readout
    whole = steps.dense()
    K, d, (B, N) = whole.shape[0], steps.states, whole.shape[-2:]
    m = len(b)
    adjoint = whole.new_zeros(1 + len(lanes), d + m, B, N)
    for k, component in enumerate(lanes):
        adjoint[1 + k, component] = 1
    nu = whole.new_empty(1 + len(lanes), K, B, N)
    for t in range(K - 1, -1, -1):
        h, r = adjoint[:, :d], adjoint[:, d:]
        if m:
            r[0, out] += steps.filtered[t]
            z = torch.einsum("p,lpbn->lbn", b, r)
            z[0] += steps.direct[t]
        else:
            z = whole.new_zeros(1 + len(lanes), B, N)
            z[0] = steps.direct[t] + steps.filtered[t]
        # rows of local times (z, h): columns x and h_{t-1}
        back = torch.einsum("rcbn,lrbn->lcbn", whole[t], torch.cat([z.unsqueeze(1), h], 1))
        nu[:, t] = back[:, 0]
        adjoint = torch.cat([back[:, 1:], torch.einsum("pq,lpbn->lqbn", A, r)], 1)
    return nu, adjoint


def on_cpu(x: Tensor) -> bool:
    """Whether kernels of the CPU take this tensor."""
    return not is_device(x.device) and x.dtype in (torch.float32, torch.float64)


def on_triton(x: Tensor) -> bool:
    """Whether Triton's do. In its interpreter the CPU may stand for a device."""
    device = is_device(x.device) and x.device.type in ("cuda", "cpu")
    return device and x.dtype in (torch.float32, torch.float64) and find_spec("triton") is not None


def _packed(steps: Steps) -> tuple[list[Tensor], Tensor, Tensor]:
    """Entries that vary, and for each place its number and the entry's index, -1 for a number."""
    wide = 1 + steps.states
    table, numbers = torch.full((wide, wide), -1), torch.zeros(wide, wide, dtype=steps.filtered.dtype)
    varying: list[Tensor] = []
    for place, value in steps.local.items():
        if isinstance(value, Tensor):
            table[place] = len(varying)
            varying.append(value)
        else:
            numbers[place] = value
    return varying, numbers, table


def _on_triton(steps: Steps, readout: Filter, lanes: Sequence[int]) -> tuple[Tensor, Tensor]:
    kernels: Any = import_module("snn_sparse_plugin.triton_kernels.eprop")
    return kernels.scan(steps.local, steps.states, *readout, steps.filtered, steps.direct, lanes)  # type: ignore[no-any-return]
