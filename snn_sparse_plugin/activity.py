"""How active each neuron layer is while a model trains: ``record_activity``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from .adapters import adapter_of, loaded_adapters, record_of
from .core import tally
from .core.errors import InputError
from .core.host import waits
from .core.spikes import SpikeTrain
from .fusion.flush import flush

__all__ = ["Activity", "ActivityLog", "record_activity"]


class Activity(NamedTuple):
    """One call of a layer: its number within the layer's calls, from 0, and what it did over its ``steps``.

    ``rate``: the share of neuron-steps that spike. ``active``: the share that pass a gradient, which are those
    near threshold, or all of them (1.0) where the call was exact; NaN where no gradient was asked for.
    """

    call: int
    rate: float
    active: float
    steps: int


class ActivityLog(Mapping[str, list[Activity]]):
    """The recorded calls of each neuron layer, by the layer's name in the model: what :func:`record_activity` yields.

    A mapping of names to lists of :class:`Activity`, in the order of the calls. On a GPU numbers are read when they are
    first asked for.

    Example:
        >>> import snntorch, torch
        >>> from snn_sparse_plugin import sparsify, unroll
        >>> neuron = snntorch.Leaky(beta=0.9, init_hidden=True)
        >>> report = sparsify(neuron)
        >>> with record_activity(neuron) as log:
        ...     out = unroll(neuron, torch.full((4, 2, 3), 2.0))
        >>> log[""][0].rate, log.mean()[""][0]
        (1.0, 1.0)
    """

    def __init__(self, model: nn.Module) -> None:
        adapters = loaded_adapters()
        self._names = {
            record_of(module): name
            for name, module in model.named_modules()
            if adapter_of(module, adapters) is not None
        }
        self._entries: dict[str, list[Activity]] = {name: [] for name in self._names.values()}
        self._unread: dict[str, list[int]] = {}  # entries whose numbers a device has

    def __getitem__(self, name: str) -> list[Activity]:
        calls = self._entries[name]
        for k in self._unread.pop(name, ()):
            call, rate, active, steps = calls[k]
            calls[k] = Activity(call, float(rate), float(active), steps)
        return calls

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"ActivityLog({', '.join(f'{name!r}: {len(self[name])} calls' for name in self)})"

    def mean(self) -> dict[str, tuple[float, float]]:
        """``(rate, active)`` of each layer that was called, over all recorded steps; NaN where not known."""
        return {
            name: (_mean(calls, lambda c: c.rate), _mean(calls, lambda c: c.active))
            for name, calls in self.items()
            if calls
        }

    def scalars(self) -> dict[str, float]:
        """:meth:`mean` as flat names and numbers, for any logger; what is not known is left out.

        Example:
            >>> import snntorch, torch
            >>> from snn_sparse_plugin import sparsify
            >>> net = nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
            >>> report = sparsify(net)
            >>> with record_activity(net) as log:
            ...     spikes = net(torch.zeros(2, 4))
            >>> sorted(log.scalars())
            ['active/1', 'spike rate/1']
        """
        return {
            f"{what}/{name or 'neuron'}": share
            for name, shares in self.mean().items()
            for what, share in zip(("spike rate", "active"), shares, strict=True)
            if not math.isnan(share)
        }

    def clear(self) -> None:
        """Forget what was recorded, for example at the end of an epoch; calls are numbered from 0 again."""
        self._unread.clear()
        for calls in self._entries.values():
            calls.clear()

    def _see(
        self, record: tally.Record, spikes: Tensor | SpikeTrain, active: Tensor | float, steps: int
    ) -> None:
        name = self._names.get(record)
        if name is not None:
            share, rate = (
                _share(active),
                _share(spikes._share() if isinstance(spikes, SpikeTrain) else spikes),
            )
            calls = self._entries[name]
            if isinstance(share, Tensor) or isinstance(rate, Tensor):
                self._unread.setdefault(name, []).append(len(calls))
            calls.append(Activity(len(calls), rate, share, steps))  # type: ignore[arg-type]  # until it is read


def _share(x: Tensor | float) -> float | Tensor:
    """The share of a mask, or the number that a 0-dim tensor of floats is; on a device not read yet."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    share = x if not x.dim() and x.is_floating_point() else x.count_nonzero().double() / max(1, x.numel())
    return share if waits(x) else float(share)


def _mean(calls: list[Activity], value: Callable[[Activity], float]) -> float:
    known = [c for c in calls if not math.isnan(value(c))]
    steps = sum(c.steps for c in known)
    return sum(value(c) * c.steps for c in known) / steps if steps else math.nan


@contextmanager
def record_activity(model: nn.Module) -> Iterator[ActivityLog]:
    """Record spike rate and active share of every neuron of ``model`` that runs sparse inside the block.

    A layer that runs fused adds one entry a call, over all steps, also where it is called in a step loop; one that
    runs step by step (``fuse_time=False``) adds one a step.
    Neurons that are not sparse, and compiled graphs, record nothing. Holds for the thread (or asyncio task)
    that entered; blocks nest, and each records. Activation checkpointing runs a forward twice, and both are
    recorded. No hooks are registered, so that what runs fused stays fused.

    Args:
        model: any module that contains snnTorch or Norse neurons.

    Yields:
        ActivityLog: layer name -> list of :class:`Activity`; stays readable after the block.

    Raises:
        InputError: ``model`` is not a module, or has no neuron of a supported library.

    Example:
        >>> import snntorch, torch
        >>> from snn_sparse_plugin import sparsify, unroll
        >>> net = nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
        >>> report = sparsify(net)
        >>> with record_activity(net) as log:
        ...     out = unroll(net, torch.zeros(5, 2, 4))
        >>> log
        ActivityLog('1': 1 calls)
        >>> log["1"][0].steps
        5
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"record_activity takes a torch module, got {type(model).__name__}.")
    log = ActivityLog(model)
    if not log:
        raise InputError(
            f"record_activity: {type(model).__name__} has no spiking neurons of a supported library."
        )
    flush(reason="record_activity()")
    with tally.watchers.block(log._see):
        yield log
        flush(reason="record_activity()")
