"""The dtypes that upstream gives where half precision comes in: seen on two steps of zeros, and remembered.

They follow from which operators a library's step is made of: snnTorch's spikes are float32, its membranes are where
the reset promotes them, and Norse differs from cell to cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..adapters import Adapter, entered
from ..core import tally
from ..core.config import current_config
from ..core.precision import HALF, any_autocast, autocast_now, cast
from ..core.spikes import SpikeTrain
from .context import paused
from .stepping import Flow, Layer, apply, loop


class Dtypes(NamedTuple):
    """Of a neuron's output, its membranes (None: it has none) and the tensors of its state, by name."""

    out: torch.dtype
    mem: torch.dtype | None
    state: dict[str, torch.dtype]

    @property
    def widest(self) -> torch.dtype:
        return self.out if self.mem is None else torch.promote_types(self.out, self.mem)

    def of_output(self, x: Flow) -> Flow:
        if x.dtype == self.out:
            return x
        return x._replace(dtype=self.out) if isinstance(x, SpikeTrain) else x.to(self.out)

    def of_state(self, adapter: Adapter, state: Any) -> Any:
        """The library's form of a state, in these dtypes."""
        if state is None:
            return None
        leaves = adapter.leaves(state)
        found = {
            n: cast(x, self.state[n]) if isinstance(x, Tensor) and n in self.state else x
            for n, x in leaves.items()
        }
        return adapter.state_of(found, state)


_seen: WeakKeyDictionary[nn.Module, dict[Any, Dtypes]] = WeakKeyDictionary()


def matters(dtype: torch.dtype, multiplies: bool) -> bool:
    """Whether half precision plays a part in a call: its input is half, or products under autocast are."""
    return dtype in HALF or (multiplies and any_autocast())


def factor(weight: Tensor | None) -> Tensor | None:
    """A recurrent matrix or bias as the product of a step takes it, in float32 again."""
    if weight is None or not any_autocast() or weight.dtype == torch.float64:
        return weight
    half = torch.get_autocast_dtype(weight.device.type)
    return weight.to(half).float()


def of_layer(layer: Layer, flow: Flow, state: Any, values: list[Any], per_step: bool) -> Dtypes:
    """Of a neuron that is called with ``flow`` (T, B, ...) as it is here and now."""
    adapter, module = layer.adapter, layer.module
    assert adapter is not None
    start = adapter.read_state(module) if state is None else state
    leaves = {} if start is None else adapter.leaves(start)
    key = (per_step, flow.dtype, *_key(leaves, values))
    known = _seen.setdefault(module, {})
    if key not in known:
        out: Flow
        zeros = torch.zeros(2, *flow.shape[1:], dtype=flow.dtype, device=flow.device)
        with _left_alone(module):
            if per_step:
                out, mem, (end,) = loop([layer], zeros, [state])
            else:
                out, mem, end = apply(layer, zeros, state, per_step=False, want_mem=True)
        known[key] = _dtypes(out, mem, adapter, end)
    return known[key]


def of_step(
    adapter: Adapter,
    upstream: Callable[..., Any],
    module: nn.Module,
    x: Tensor,
    leaves: dict[str, Any],
    like: Any,
    values: list[Any],
) -> Dtypes:
    """Of single steps on inputs like ``x``, from a state of tensors like ``leaves``."""
    key = ("step", x.dtype, *_key(leaves, values))
    known = _seen.setdefault(module, {})
    if key not in known:
        zeros = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        with _left_alone(module):
            for _ in range(2):
                out, leaves = adapter.upstream_step(upstream, module, zeros, leaves, like)
        state = {name: leaf.dtype for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        known[key] = Dtypes(out.dtype, state.get(adapter.membrane_leaf()), state)
    return known[key]


def _key(leaves: dict[str, Any], values: list[Any]) -> tuple[Any, ...]:
    # a state of another shape may count as none
    states = tuple((n, x.dtype, x.shape) for n, x in leaves.items() if isinstance(x, Tensor))
    return autocast_now(), states, tuple((x.dtype, x.dim()) for x in values if isinstance(x, Tensor))


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    """Upstream's own forward inside the block, after which the module is what it was."""
    attributes, buffers = dict(vars(module)), dict(module._buffers)
    config = current_config().updated(fuse_time=False)
    try:
        with torch.no_grad(), paused(), tally.aside(), entered(config, {"fuse_time": False}):
            yield
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)


def _dtypes(out: Flow, mem: Tensor | None, adapter: Adapter, state: Any) -> Dtypes:
    leaves = {} if state is None else adapter.leaves(state)
    found = {name: x.dtype for name, x in leaves.items() if isinstance(x, Tensor)}
    return Dtypes(out.dtype, None if mem is None else mem.dtype, found)
