"""Sparse mode around a block, or bound to a model: ``sparse_mode``, ``sparsify``, ``restore``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters import MARK, Adapter, Mark, entered, install_adapters, loaded_adapters
from .config import SparseConfig, current_config
from .errors import InputError

__all__ = ["Entry", "SparsityReport", "restore", "sparse_mode", "sparsify"]


@contextmanager
def sparse_mode(**overrides: Any) -> Iterator[SparseConfig]:
    """Inside the block, unmodified snnTorch and Norse neurons are sparse; outside, exactly as before.

    Holds for the thread (or asyncio task) that entered, nests (the inner block starts from the options of the
    outer one) and ends on any exit. A forward inside the block has a sparse backward, wherever that runs; activation
    checkpointing runs the forward again in backward, so keep its backward inside the block too, or use ``sparsify``.
    Also works as a decorator. ``torch.compile`` traces snnTorch's neurons sparse; Norse's keep the exact
    gradient in a compiled graph.

    Args:
        **overrides: options of :class:`~snn_sparse_plugin.SparseConfig`.

    Yields:
        SparseConfig: the options in force.

    Raises:
        ConfigError: an unknown option or a value outside its range.

    Example:
        >>> import torch, snntorch
        >>> lif, x = snntorch.Leaky(beta=0.9), torch.randn(4, 100, requires_grad=True)
        >>> with sparse_mode(backprop_threshold=0.1):
        ...     spikes, mem = lif(x, torch.zeros(4, 100))
        >>> spikes.sum().backward()
        >>> bool((x.grad == 0)[(mem - 1).abs() >= 0.1].all())
        True
    """
    config = current_config().updated(**overrides)
    install_adapters()
    with entered(config):
        yield config


@dataclass(frozen=True)
class Entry:
    """One neuron of a model: ``status`` is ``"fused"``, ``"masked"`` or ``"exact"``."""

    name: str
    kind: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class SparsityReport:
    """What :func:`sparsify` did with every neuron module of a model.

    ``fused``: a member of the fused family, also sparse step by step. ``masked``: its own forward runs, with
    the masked gradient. ``exact``: left alone, because it has no gradient to mask.
    """

    entries: tuple[Entry, ...]
    config: SparseConfig

    def names(self, status: str) -> list[str]:
        """The modules with this status."""
        return [e.name for e in self.entries if e.status == status]

    def __str__(self) -> str:
        if not self.entries:
            return "no spiking neurons of a supported library found"
        rows = [
            ("module", "neuron", "mode", "why"),
            *((e.name, e.kind, e.status, e.reason) for e in self.entries),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("module", "neuron", "mode", "why")
        for entry in self.entries:
            table.add_row(entry.name, entry.kind, entry.status, entry.reason)
        return table


def sparsify(model: nn.Module, **overrides: Any) -> SparsityReport:
    """Make the neurons of this model sparse wherever it is called, in place; :func:`restore` undoes it.

    Classes, parameters, buffers and ``state_dict`` stay as they are. Calling it again only changes the
    options, which stand over those of an enclosing :func:`sparse_mode`.

    Args:
        model: any module that contains snnTorch or Norse neurons.
        **overrides: options of :class:`~snn_sparse_plugin.SparseConfig`.

    Raises:
        InputError: ``model`` is not a module.
        ConfigError: an unknown option or a value outside its range. Nothing has been changed then.

    Example:
        >>> from torch import nn
        >>> import snntorch
        >>> net = nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
        >>> print(sparsify(net, backprop_threshold=0.2))
        module  neuron  mode   why
        ------  ------  -----  ---
        1       Leaky   fused
        >>> restore(net)
        ['1']
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"sparsify takes a torch module, got {type(model).__name__}.")
    config = current_config().updated(**overrides)
    adapters = loaded_adapters()
    plan: list[tuple[Adapter, nn.Module]] = []
    entries = []
    for name, module in model.named_modules():
        for adapter in adapters:
            if adapter.owns(module):
                entry = _describe(adapter, name, module)
                entries.append(entry)
                if entry.status != "exact":
                    plan.append((adapter, module))
            elif adapter.container(module):
                plan.append((adapter, module))
    for adapter, module in plan:
        adapter.prepare(module)
        setattr(module, MARK, Mark(dict(overrides)))
    return SparsityReport(tuple(entries), config)


def _describe(adapter: Adapter, name: str, module: nn.Module) -> Entry:
    neuron, kind = adapter.neuron(module), type(module).__name__
    if not isinstance(neuron, str):
        return Entry(name, kind, "fused")
    unmasked = adapter.masks(module)
    return Entry(name, kind, "masked", neuron) if unmasked is None else Entry(name, kind, "exact", unmasked)


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`sparsify`: -> the names of the neurons and containers restored, none if it was not applied.

    Models built from the import-swap faces stay sparse: their classes are.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"restore takes a torch module, got {type(model).__name__}.")
    restored = []
    for name, module in model.named_modules():
        if MARK in vars(module):
            delattr(module, MARK)
            restored.append(name)
    return restored
