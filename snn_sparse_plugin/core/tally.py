"""How often neurons ran in sparse mode, and in which way: counted per module and per class.

A count is two dict increments under a lock; that of steps which take hardly longer is made up when somebody asks for
counts, as is what only a device knows, such as whether the guard stepped in. What runs inside a compiled graph is not
counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .scopes import Scoped

WAYS = {
    "fused": "calls of the fused op, each over all steps",
    "masked": "single steps of upstream's own forward with the gradient masked",
    "exact": "single steps with the exact gradient: exact mode, a surrogate without a window, or the guard",
    "guard": "calls that min_active made exact, counted as fused or exact as well",
    "no_grad": "single steps that wanted no gradient",
    "backward": "backward passes of fused calls and of masked steps",
}
"""The ways of running that are counted."""

STEPPED = {"masked", "exact", "no_grad"}
"""The ways that are single steps of upstream's own forward."""


@dataclass(eq=False)
class Record:
    """What one module did: ``calls["fused"]`` and so on, absent where it never did.

    ``reason``: why it does not run fused when it does not, as :meth:`look` last saw it.
    """

    kind: str
    reason: str = ""
    counted: dict[str, int] = field(default_factory=dict)
    module: bool = True  # False: stands for calls outside any module
    refused: str = ""  # what the last call had that kept it from running fused
    origin: Record | None = None  # that of the module of which this one is a copy
    copies: dict[str, int] = field(default_factory=dict)  # what the copies did
    soon: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0), repr=False)

    @property
    def calls(self) -> dict[str, int]:
        """How often it ran in each way, up to now."""
        catch_up()
        return self.counted

    def count(self, way: str, n: int = 1) -> None:
        if _here.aside:
            return
        with _lock:
            _count(_classes, self, self.counted, way, n)
            if self.origin is not None:
                self.origin.copies[way] = self.origin.copies.get(way, 0) + n
            for account in _accounts:
                _count(account.classes, self, account.calls.setdefault(self, {}), way, n)

    def count_soon(self, way: str) -> None:
        """:meth:`count` for what hardly takes longer itself: made up by :func:`catch_up`."""
        if not _here.aside:
            self.soon[way] += 1  # no lock: no other thread comes in between
            uncounted.add(self)

    def count_later(self, happened: Tensor, name: str, tell: Callable[[int], None]) -> None:
        """Count on its device whether a 0-dim tensor is true; ``tell`` gets the number when counts are read.

        One number for each ``name``, on memory that stays: a CUDA graph that was captured after a first call adds
        to it as well.
        """
        with _lock:
            key = self, name, happened.device
            if key not in _later:
                with torch.inference_mode(False):
                    _later[key] = torch.zeros((), dtype=torch.int64, device=happened.device), tell
            _later[key][0].add_(happened)

    def look(self, reason: str) -> None:
        """The reason as it is now: options of a module may have been set since it first ran."""
        with _lock:
            if reason != self.reason:
                _look(_classes, self, self.counted, reason)
                for account in _accounts:
                    _look(account.classes, self, account.calls.get(self, {}), reason)
            self.reason = reason


@dataclass
class ClassRuns:
    """All modules of one class name together, those that are gone included.

    ``calls`` and ``modules`` (how many different ones) are by way of running; ``reasons`` counts the modules
    that ran step by step by why they did.
    """

    calls: dict[str, int] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, other: ClassRuns) -> None:
        """Add what another process counted."""
        for name, counts in vars(self).items():
            for key, n in getattr(other, name).items():
                counts[key] = counts.get(key, 0) + n


@dataclass(eq=False)
class Account:
    """What ran inside an :func:`account` block: the counts of :func:`by_class`, of that time alone."""

    classes: dict[str, ClassRuns] = field(default_factory=dict)
    calls: dict[Record, dict[str, int]] = field(default_factory=dict)


def _count(classes: dict[str, ClassRuns], record: Record, calls: dict[str, int], way: str, n: int) -> None:
    of_class = classes.get(record.kind) or classes.setdefault(record.kind, ClassRuns())
    if way not in calls and record.module:
        of_class.modules[way] = of_class.modules.get(way, 0) + 1
        if way in STEPPED and not STEPPED & calls.keys():
            of_class.reasons[record.reason] = of_class.reasons.get(record.reason, 0) + 1
    calls[way] = calls.get(way, 0) + n
    of_class.calls[way] = of_class.calls.get(way, 0) + n


def _look(classes: dict[str, ClassRuns], record: Record, calls: dict[str, int], reason: str) -> None:
    of_class = classes.get(record.kind)
    if of_class is not None and STEPPED & calls.keys():
        of_class.reasons[record.reason] -= 1
        if not of_class.reasons[record.reason]:
            del of_class.reasons[record.reason]
        of_class.reasons[reason] = of_class.reasons.get(reason, 0) + 1


_lock = threading.RLock()
_accounts: list[Account] = []
uncounted: set[Record] = set()


class _Here(threading.local):
    record: Record | None = None
    aside = False


_here = _Here()
# by id, as a look-up by weak reference would make one at every call; a module that dies takes its entry along
_records: dict[int, tuple[Record, ref[Any], Callable[[Any], str]]] = {}
_classes: dict[str, ClassRuns] = {}
_outside = Record("functional", module=False)
_later: dict[tuple[Record, str, torch.device], tuple[Tensor, Callable[[int], None]]] = {}


def of(module: Any, describe: Callable[[Any], str], origin: Record | None = None) -> Record:
    """The record of a module; ``describe`` gives its reason, when the record is made and when counts are read.

    ``origin``: the record of the module of which it is a copy, or its own.
    """
    found = _records.get(id(module))
    if found is None:
        catch_up()  # so that no more records wait than there were modules, which may be gone
        record = Record(type(module).__name__, describe(module))
        # the callback takes no lock: it may run while this thread holds it
        entry = record, ref(module, partial(_forget, id(module))), describe
        found = _records.setdefault(id(module), entry)
        if origin is not found[0]:
            found[0].origin = origin
    return found[0]


def refused(module: Any) -> str:
    """Why the last call of a module that could run fused did not; empty if none was refused."""
    found = _records.get(id(module))
    return found[0].refused if found else ""


def _forget(key: int, _: Any, forget: Callable[..., Any] = _records.pop) -> None:
    forget(key, None)


class running:
    """Inside the block, what runs in this thread is counted on this record."""

    __slots__ = ("before", "record")

    def __init__(self, record: Record) -> None:
        self.record = record

    def __enter__(self) -> None:
        self.before = _here.record
        _here.record = self.record

    def __exit__(self, *_: object) -> None:
        _here.record = self.before


def current() -> Record:
    """The record of the innermost :class:`running` block, or that of calls outside any module."""
    return _here.record or _outside


@contextmanager
def aside() -> Iterator[None]:
    """Inside the block nothing is counted: a neuron is only tried out."""
    before, _here.aside = _here.aside, True
    try:
        yield
    finally:
        _here.aside = before


def is_aside() -> bool:
    return _here.aside


Watcher = Callable[[Record, Any, Any, int], None]
"""Is told of a call: whose it is, its spikes, its active share (a number, on a device maybe a 0-dim tensor, or a mask),
and its number of steps."""

watchers: Scoped[Watcher] = Scoped("snn_sparse_plugin.watchers")


def show(spikes: Any, active: Any, steps: int = 1) -> None:
    """Tell the watchers, if there are any, of a call of the current module; measuring it is left to them."""
    for watcher in watchers.all():
        watcher(current(), spikes, active, steps)


settle: list[Callable[[], None]] = []
"""Called before counts are read: what runs recorded steps that nobody has asked for yet."""


def by_class() -> dict[str, ClassRuns]:
    """A copy of the counts of every class that ran, by name; ``"functional"`` is what ran outside any module.

    The reasons are those of now, of modules that are gone the last known ones.
    """
    _settle()
    with _lock:
        return {
            kind: ClassRuns(dict(runs.calls), dict(runs.modules), dict(runs.reasons))
            for kind, runs in sorted(_classes.items())
        }


@contextmanager
def account() -> Iterator[Account]:
    """Keep an account of what runs inside the block, in any thread, complete when the block ends."""
    _settle()
    found = Account()
    with _lock:
        _accounts.append(found)
    try:
        yield found
    finally:
        try:
            _settle()
        finally:
            with _lock:
                _accounts.remove(found)
            found.calls.clear()


def catch_up() -> None:
    """Count what ``soon`` holds of the records in :data:`uncounted`."""
    if not uncounted or _here.aside:
        return
    with _lock:
        while uncounted:
            record = uncounted.pop()
            for way, n in record.soon.items():
                if n:
                    record.soon[way] -= n
                    record.count(way, n)


def fold() -> None:
    """Read what devices have counted, after :func:`catch_up`; this waits for them."""
    catch_up()
    with _lock:
        alive = {_outside, *(entry[0] for entry in list(_records.values()))}
        for key, (number, tell) in list(_later.items()):
            if n := int(number):
                number.zero_()
                tell(n)
            if key[0] not in alive:
                del _later[key]


def _settle() -> None:
    for run in settle:
        run()
    fold()
    for record, reference, describe in list(_records.values()):
        module = reference()
        if module is not None and STEPPED & record.counted.keys():
            record.look(describe(module))


def clear() -> None:
    """Start again from zero."""
    for run in settle:
        run()
    fold()
    with _lock:
        _classes.clear()
        for record in [_outside, *(entry[0] for entry in list(_records.values()))]:
            record.counted.clear()
            record.refused = ""
            record.copies.clear()
