"""Sparse mode around a block, or bound to a model: ``sparse_mode``, ``sparsify``, ``restore``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator, suppress
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any, NoReturn
from weakref import ref

from torch import nn

from .adapters import (
    MARK,
    Adapter,
    Mark,
    adapter_of,
    entered,
    install_adapters,
    loaded_adapters,
    record_of,
)
from .core import tally
from .core.config import SparseConfig, current_config, refuse_positional
from .core.errors import ConfigError, InputError, SparsePluginError, UnsupportedError
from .core.legend import legend, next_step
from .core.lines import aligned, beside, terminal_width
from .fusion.flush import flush
from .fusion.sources import watched

__all__ = ["Entry", "SparsityReport", "restore", "sparse_mode", "sparsify"]


def sparse_mode(*misplaced: Any, **overrides: Any) -> SparseBlock:
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
        ConfigError: an unknown option, one without its name, or a value outside its range.
        UnsupportedError: no backend has that name.

    Example:
        >>> import torch, snntorch
        >>> lif, x = snntorch.Leaky(beta=0.9), torch.randn(4, 100, requires_grad=True)
        >>> with sparse_mode(backprop_threshold=0.1, min_active=0):
        ...     spikes, mem = lif(x, torch.zeros(4, 100))
        >>> spikes.sum().backward()
        >>> bool((x.grad == 0)[(mem - 1).abs() >= 0.1].all())
        True
    """
    if misplaced and isinstance(misplaced[0], nn.Module):
        raise InputError(
            f"sparse_mode() takes no model, got {type(misplaced[0]).__name__}: call it inside the block, "
            f"`with sparse_mode(): net(x)`, or bind sparse mode to it with sparsify(net)."
        )
    if misplaced and callable(misplaced[0]):
        raise ConfigError("sparse_mode is called where it decorates: write @sparse_mode().")
    if misplaced:
        refuse_positional("sparse_mode()", misplaced)
    return SparseBlock(overrides)


class SparseBlock(ContextDecorator):
    """What :func:`sparse_mode` returns. A class, as entering a generator takes twice as long: a training loop enters at
    every batch."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        self._overrides = overrides
        self._open: tuple[entered, watched] | None = None

    def _recreate_cm(self) -> SparseBlock:
        return SparseBlock(self._overrides)

    def __enter__(self) -> SparseConfig:
        if self._open is not None:
            raise UnsupportedError(
                "this block of sparse_mode() is open: call sparse_mode() again for another."
            )
        config = current_config().updated(**self._overrides)
        install_adapters()
        blocks = entered(config), watched()
        blocks[0].__enter__()
        try:
            blocks[1].__enter__()
            self._open = blocks
        except BaseException:  # an interrupt
            blocks[0].__exit__()
            raise
        return config

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._open is not None
        (within, watching), self._open = self._open, None
        try:
            if kind is None:
                flush(reason=_END)
            else:
                with suppress(SparsePluginError):  # the first error is the one to see
                    flush(reason=_END)
        finally:
            watching.__exit__()
            within.__exit__()


_END = "end of sparse_mode()"


@dataclass(frozen=True)
class Entry:
    """One neuron of a model: ``status`` is ``"fused"``, ``"masked"`` or ``"exact"``."""

    name: str
    kind: str
    status: str
    reason: str = ""
    record: tally.Record | None = field(default=None, compare=False, repr=False)
    module: ref[nn.Module] | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "module": None}  # a reference stays in its process

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        """Of the copy of the module where that is copied as well, else of the same one."""
        module = None if self.module is None else self.module()
        twin = memo.get(id(module))
        return self if twin is None else replace(self, record=record_of(twin), module=ref(twin))

    def now(self) -> Entry:
        """The same neuron as it would be described now; as it was if the model is gone."""
        module = None if self.module is None else self.module()
        adapter = None if module is None else adapter_of(module)
        return self if module is None or adapter is None else _describe(adapter, self.name, module)

    @property
    def ran(self) -> str:
        """What the module did up to now, such as ``"fused 12, guard 3"``, and what its copies did."""
        if self.record is None:
            return ""
        tally.fold()
        own, copies = (
            ", ".join(f"{way} {calls[way]}" for way in tally.WAYS if way in calls)
            for calls in (self.record.calls, self.record.copies)
        )
        return f"{own}{'; ' if own else ''}its copies: {copies}" if copies else own


_IN_PLACE = "sparsify works in place and returns a report: write report = sparsify(net), and go on with net."


@dataclass(frozen=True)
class SparsityReport:
    """What :func:`sparsify` did with every neuron module of a model.

    ``fused``: a member of the fused family, also sparse step by step. ``masked``: its own forward runs, with
    the masked gradient. ``exact``: left alone, because it has no gradient to mask.

    ``entries`` is what :func:`sparsify` found. Printed, or as a dict, the report describes the model as it is then: an
    option set since, such as ``state_quant``, shows. After the model has run it also says how often each module ran in
    which way.

    Example:
        >>> import snntorch
        >>> report = sparsify(nn.Sequential(snntorch.Leaky(beta=0.9), snntorch.SLSTM(3, 4)))
        >>> report.names("fused"), report.names("masked")
        (['0'], ['1'])
        >>> report.entries[1].reason
        'an LSTM cell makes its membrane'
    """

    entries: tuple[Entry, ...]
    config: SparseConfig

    # after `net = sparsify(net)` the report stands where the model is looked for

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(f"a SparsityReport was called. {_IN_PLACE}")

    def __getattr__(self, name: str) -> Any:
        missing = f"'SparsityReport' object has no attribute {name!r}"
        raise AttributeError(missing if name.startswith("__") else f"{missing}. {_IN_PLACE}")

    def of(self, model: nn.Module) -> SparsityReport:
        """The report of another model that is sparse already, such as a copy of this one; its options stay.

        Example:
            >>> import copy, torch, snntorch
            >>> neuron = snntorch.Leaky(beta=0.9, init_hidden=True)
            >>> report = sparsify(neuron)
            >>> twin = copy.deepcopy(neuron)
            >>> twin(torch.ones(2, 3)).sum().item()
            0.0
            >>> report.runs(), report.of(twin).runs()
            ({'': {}}, {'': {'no_grad': 1}})
        """
        adapters = loaded_adapters()
        found = ((name, m, adapter_of(m, adapters)) for name, m in model.named_modules())
        return SparsityReport(tuple(_describe(a, n, m) for n, m, a in found if a is not None), self.config)

    def names(self, status: str) -> list[str]:
        """The modules with this status."""
        return [e.name for e in self._now() if e.status == status]

    def runs(self) -> dict[str, dict[str, int]]:
        """How often each module ran in sparse mode, up to now, by way of running.

        The ways are those of :data:`snn_sparse_plugin.core.tally.WAYS`; one that never occurred is absent.

        Example:
            >>> import torch, snntorch
            >>> neuron = snntorch.Leaky(beta=0.9, init_hidden=True)
            >>> report = sparsify(neuron, backprop_threshold=0.1, min_active=0)
            >>> neuron(torch.ones(2, 3, requires_grad=True)).sum().backward()
            >>> report.runs()
            {'': {'masked': 1, 'backward': 1}}
        """
        flush(reason="a report")
        tally.fold()
        return {e.name: dict(e.record.calls) for e in self.entries if e.record is not None}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the options, and a row for each neuron with how often it ran in which way.

        Example:
            >>> import snntorch
            >>> sparsify(snntorch.Leaky(beta=0.9)).as_dict()["rows"]
            [{'name': '', 'kind': 'Leaky', 'status': 'fused', 'reason': '', 'ran': {}}]
        """
        runs = self.runs()
        rows = [
            {
                "name": e.name,
                "kind": e.kind,
                "status": e.status,
                "reason": e.reason,
                "ran": runs.get(e.name, {}),
            }
            for e in self._now()
        ]
        return {"config": asdict(self.config), "rows": rows}

    def _now(self) -> list[Entry]:
        return [entry.now() for entry in self.entries]

    def _rows(self) -> list[tuple[str, ...]]:
        flush(reason="a report")
        tally.fold()
        entries = self._now()
        rows: list[tuple[str, ...]] = [
            ("module", "neuron", "mode", "why", "ran"),
            *((e.name, e.kind, e.status, e.reason, e.ran) for e in entries),
        ]
        return rows if any(e.ran for e in entries) else [row[:-1] for row in rows]

    def _notes(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """What stands below the table: what its words mean, and what to do for which module."""
        entries = self._now()
        ran = [{} if e.record is None else e.record.calls for e in entries]
        steps = []
        for entry, calls in zip(entries, ran, strict=True):
            why = entry.reason or (entry.record.reason if entry.record else "")
            todo = next_step(entry.status, why, calls, last=entry is entries[-1])
            steps += [(entry.name or "neuron", todo)] if todo else []
        words = legend({e.status for e in entries}, {way for calls in ran for way in calls})
        return [("legend", words), *([("next steps", steps)] if steps else [])]

    def _text(self, width: int | None) -> str:
        if not self.entries:
            return "no spiking neurons of a supported library found"
        lines = aligned(self._rows(), width)
        for title, notes in self._notes():
            lines += ["", f"{title}:", *beside(notes, width)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self._text(terminal_width())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield Text(self._text(options.max_width), no_wrap=True, overflow="ignore")

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        if not self.entries:
            return escape(str(self))
        head, *rows = self._rows()
        table = [_html_row(head, "th"), *(_html_row(row, "td") for row in rows)]
        notes = [
            f"<details{' open' if title != 'legend' else ''}><summary>{title}</summary><ul>"
            + "".join(f"<li><b>{escape(word)}</b>: {escape(text)}</li>" for word, text in found)
            + "</ul></details>"
            for title, found in self._notes()
        ]
        return f"<table>{''.join(table)}</table>{''.join(notes)}"


def _html_row(cells: tuple[str, ...], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def sparsify(model: nn.Module, *misplaced: Any, **overrides: Any) -> SparsityReport:
    """Make the neurons of this model sparse wherever it is called, in place; :func:`restore` undoes it.

    Classes, parameters, buffers and ``state_dict`` stay as they are. Calling it again only changes the
    options, which stand over those of an enclosing :func:`sparse_mode`. A ``deepcopy`` of the model is sparse as well
    and counts for itself: :meth:`SparsityReport.of` gives its report.

    Args:
        model: any module that contains snnTorch or Norse neurons.
        **overrides: options of :class:`~snn_sparse_plugin.SparseConfig`.

    Returns:
        SparsityReport: a row for each neuron; printed after the model has run, it says what ran how. Not the model.

    Raises:
        InputError: ``model`` is not a module. As after any error, nothing has been changed.
        ConfigError: an unknown option, one without its name, or a value outside its range.
        UnsupportedError: no backend has that name.

    Example:
        >>> from torch import nn
        >>> import snntorch
        >>> net = nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
        >>> print(sparsify(net, backprop_threshold=0.2))
        module  neuron  mode   why
        ------  ------  -----  ---
        1       Leaky   fused
        <BLANKLINE>
        legend:
          fused  its steps can run as one call over all of them, in a loop or by unroll
        >>> restore(net)
        ['1']
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"sparsify takes a torch module, got {type(model).__name__}.")
    refuse_positional("sparsify(net)", misplaced)
    config = current_config().updated(**overrides)
    install_adapters()
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
        record = record_of(module) if adapter.owns(module) else None
        if record is not None:
            record.origin = None  # a copy that has a report of its own now
        setattr(module, MARK, Mark({name: getattr(config, name) for name in overrides}, record))
    return SparsityReport(tuple(entries), config)


def _describe(adapter: Adapter, name: str, module: nn.Module) -> Entry:
    neuron, kind, record = adapter.neuron(module), type(module).__name__, record_of(module)
    if not isinstance(neuron, str):
        alone = adapter.only_unroll(module)
        return Entry(name, kind, "fused", f"by unroll alone: {alone}" if alone else "", record, ref(module))
    unmasked = adapter.masks(module)
    if unmasked is None:
        return Entry(name, kind, "masked", neuron, record, ref(module))
    return Entry(name, kind, "exact", unmasked, record, ref(module))


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`sparsify`, in place.

    Models built from the import-swap faces stay sparse: their classes are.

    Args:
        model: the module that was given to :func:`sparsify`, or a part of it.

    Returns:
        list[str]: the names of the neurons and containers restored, none if it was not applied.

    Raises:
        InputError: ``model`` is not a module.

    Example:
        >>> import snntorch
        >>> net = nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9))
        >>> report = sparsify(net)
        >>> restore(net), restore(net)
        (['1'], [])
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"restore takes a torch module, got {type(model).__name__}.")
    restored = []
    for name, module in model.named_modules():
        if MARK in vars(module):
            delattr(module, MARK)
            restored.append(name)
    return restored
