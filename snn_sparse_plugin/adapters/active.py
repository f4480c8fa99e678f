"""Which neurons are sparse right now, and their spike functions with the masked gradient."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import tally
from ..core.config import SparseConfig, active_config, current_config, use_config
from ..core.scopes import Scoped
from ..core.surrogates import Surrogate, blocked_spike, masked_spike
from .loading import install_adapters

MARK = "_snn_sparse"


@dataclass
class Mark:
    """Says that a module, or all modules of a class, are sparse, with these options over the active ones."""

    overrides: dict[str, Any] = field(default_factory=dict)
    record: tally.Record | None = field(default=None, compare=False, repr=False)
    """Of the module that :func:`~snn_sparse_plugin.sparsify` marked: its copies have this mark, and count there too."""

    def __post_init__(self) -> None:
        _note_mark()

    def __getstate__(self) -> dict[str, Any]:
        return {"overrides": self.overrides}  # a record stays in its process

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return Mark(copy.deepcopy(self.overrides, memo), self.record)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a sparse model unpickled in a fresh process must find the hooks in place
        self.__dict__.update(record=None, **state)
        _note_mark()
        install_adapters()


class _Here(threading.local):
    settled = False
    whole: tuple[nn.Module, tally.Record] | None = None  # the neuron of run_whole, and where it is counted
    cut: Any = None  # what is known of the neuron that fires, a cut.Cut


here = _Here()


class settled:
    """Inside the block fusion has found that steps do not pay to be recorded: upstream's own code runs them, with its
    whole gradient where the window is ``"auto"``."""

    __slots__ = ("before",)

    def __enter__(self) -> None:
        self.before = here.settled, here.whole
        here.settled, here.whole = True, None

    def __exit__(self, *_: object) -> None:
        here.settled, here.whole = self.before


def run_whole(
    upstream: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], record: tally.Record
) -> Any:
    """:class:`settled`, where it is known that the step is cut nowhere (:func:`cuts_nothing`): nothing more is asked
    in it, and its spikes are counted later."""
    before, here.whole = here.whole, (module, record)
    try:
        return upstream(module, *args)
    finally:
        here.whole = before


def cuts_nothing(config: SparseConfig) -> bool:
    """Whether :class:`settled` steps under these options have upstream's gradient, and nobody watches them."""
    return (
        config.backprop_threshold in (None, "auto")
        and not tally.watchers.blocks.get()  # is_watched, written out
        and not torch._C._are_functorch_transforms_active()
    )


def count_whole(record: tally.Record, spikes: Tensor) -> Tensor:
    """Count a step of :func:`run_whole` by the spikes that it made."""
    # no lock: no other thread comes in between
    record.soon["exact" if spikes.requires_grad else "no_grad"] += 1
    tally.uncounted.add(record)
    return spikes


_explicit: Scoped[dict[str, Any] | None] = Scoped("snn_sparse_plugin.explicit")
_lock = threading.RLock()
_entered: list[str] = []
# What is in force in any thread, as one string: compiled graphs can guard on it, not on a ContextVar.
_in_force = ""
_marked = False

idle = True
"""Whether nothing is sparse in any thread: no block is open, and nothing has ever been marked. Hooks ask this first, so
that upstream's code outside takes hardly longer than without them; compiled graphs can guard on it."""


def _note_mark() -> None:
    global _marked, idle
    with _lock:
        _marked, idle = True, False


class entered:
    """Make ``config`` the active one inside the block; ``explicit`` options also win over a module's own mark."""

    __slots__ = ("blocks", "text")

    def __init__(self, config: SparseConfig, explicit: dict[str, Any] | None = None) -> None:
        self.text = f"{config.text}{explicit}" if explicit else config.text
        explicit = explicit or _explicit.get()
        config_block = use_config(config)
        self.blocks = (_explicit.block(explicit), config_block) if explicit else (config_block,)

    def __enter__(self) -> None:
        try:
            _announce(self.text, enter=True)
            for block in self.blocks:
                block.__enter__()
        except BaseException:  # an interrupt
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for block in self.blocks:
            block.__exit__()
        _announce(self.text, enter=False)


def _announce(text: str, *, enter: bool) -> None:
    global _in_force, idle
    with _lock:
        if enter:
            _entered.append(text)
        elif text in _entered:
            _entered.remove(text)
        _in_force = "|".join(sorted(set(_entered))) if len(_entered) > 1 else "".join(_entered)
        idle = not (_entered or _marked)


@functools.lru_cache(maxsize=1024)
def _mark_of(cls: type) -> Mark | None:
    return getattr(cls, MARK, None)


def config_of(module: nn.Module) -> SparseConfig | None:
    """The options under which this module runs now, or None if it is not sparse."""
    # asked at every step: looking up a name that a module or its class lacks takes longer than the rest
    mark = module.__dict__.get(MARK) or _mark_of(type(module))  # type: ignore[arg-type]
    if mark is None:
        return active_config() if _in_force else None
    overrides = mark.overrides | (_explicit.get() or {})
    config = current_config()
    return config.updated(**overrides) if overrides else config


def is_unmarked(module: nn.Module) -> bool:
    """Whether the active options are all that :func:`config_of` looks at, as long as the module gets no mark."""
    return not (module.__dict__.get(MARK) or _mark_of(type(module)))  # type: ignore[arg-type]


def uncut(config: SparseConfig, *made_of: Any) -> str | None:
    """The way under which a step counts that upstream's own spike function makes, as none of its gradient is cut; None
    where some may be, or where somebody watches. ``made_of``: the tensors behind its membrane."""
    if is_watched():
        return None
    if torch.is_grad_enabled():
        for x in made_of:
            # a recorded step may not be asked
            if x.requires_grad if type(x) in (Tensor, nn.Parameter) else isinstance(x, Tensor):
                return "exact" if _threshold(config) is None else None
    return "no_grad"


def is_watched() -> bool:
    """Whether more is to be known of a step than that it ran, or a transform of torch.func sees it."""
    return tally.watchers.get() is not None or torch._C._are_functorch_transforms_active()


def _threshold(config: SparseConfig) -> float | str | None:
    threshold = config.backprop_threshold
    return None if threshold == "auto" and (here.settled or here.whole is not None) else threshold


def window(surrogate: Surrogate, config: SparseConfig) -> float | None:
    """Outside which distance from the threshold a step passes no gradient; None where it passes all."""
    find = _window if surrogate.pure else Surrogate.resolve  # a user's object may have no hash
    return find(surrogate, _threshold(config))


def spike(
    x: Tensor,
    function: Callable[[Tensor], Tensor],
    surrogate: Surrogate,
    config: SparseConfig,
    sequence: bool = False,
) -> Tensor:
    """``function(x)`` as upstream makes it, its gradient masked as ``config`` says.

    ``sequence``: x holds all steps, which are its first dimension.
    """
    threshold = window(surrogate, config)
    if torch._C._are_functorch_transforms_active():
        tally.current().count("exact" if threshold is None else "masked")
        return blocked_spike(x, function, threshold, config.min_active, sequence)
    return masked_spike(x, function, surrogate, threshold, config.min_active, sequence)


def spike_in_graph(
    x: Tensor,
    module: nn.Module,
    function: Callable[[Tensor], Tensor],
    recognise: Callable[[Any], Surrogate],
    sequence: bool = False,
) -> Tensor:
    """:func:`spike` for ``torch.compile``: its options become constants of the graph.

    They are taken when the graph is traced; it is traced again when what is in force changes.
    """
    mark = getattr(module, MARK, None)
    if (mark is None and not _in_force) or not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    overrides = None if mark is None else tuple(mark.overrides.items())
    threshold, min_active = _traced_window(function, recognise, overrides)
    return blocked_spike(x, function, threshold, min_active, sequence)


def _traced_window(
    function: Callable[[Tensor], Tensor],
    recognise: Callable[[Any], Surrogate],
    overrides: tuple[tuple[str, Any], ...] | None,
) -> tuple[float | None, float]:
    config = active_config() if overrides is None else current_config().updated(**dict(overrides))
    if config is None:  # another thread's mode is what is in force
        return None, 0.0
    surrogate = recognise(function)
    # without a gradient there is nothing to mask, and an exported graph stays upstream's
    window = None if surrogate.kind == "zero" else surrogate.resolve(config.backprop_threshold)
    return window, config.min_active


# what torch.compiler.assume_constant_result does, but without importing the compiler (and Triton)
_traced_window._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _window(surrogate: Surrogate, threshold: float | str | None) -> float | None:
    return surrogate.resolve(threshold)
