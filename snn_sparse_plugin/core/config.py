"""What sparse mode does, and the context that carries it."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import Any, Literal

from . import registry
from .errors import ConfigError
from .scopes import Block, Scoped


@dataclass(frozen=True)
class SparseConfig:
    """Options of sparse mode, immutable.

    Args:
        backprop_threshold: distance B_th from the firing threshold outside which a neuron passes no gradient
            [Perez-Nieves & Goodman 2021, Def. 1], in units of the membrane. ``"auto"`` takes the distance
            outside which at most 5 % of the surrogate's area lies; ``None`` is exact mode: nothing is cut.
        backend: ``"auto"``, or the name of a registered backend (``snn-sparse plugins`` lists them).
        min_active: the guard that keeps a window from silencing what has to learn; 0 turns it off. A fused layer in
            which a smaller fraction of the neuron-steps is active runs with the exact surrogate, and so does the last
            layer, of a network given to ``unroll``, of a sequential container or of a fused loop, where a window would
            silence single classes. In a loop that is stepped a neuron that is active
            in a smaller fraction of the samples keeps its gradient at that step, so that gradients of a loop and of
            a fused network can differ where the guard acts. The default lies well below the activity of trained layers
            (0.5 to 3 % in the published experiments), which are to run sparse, and above that of layers which a
            window silences (none, or nearly none).
        fuse_time: run step loops, sequence modules and :func:`snn_sparse_plugin.unroll` as fused ops over all steps.
            The steps of a loop are recorded and run when somebody needs their numbers. ``False`` (or
            ``SNN_SPARSE_FUSE=0`` in the environment) steps through upstream's own code with the masked gradient.
        max_steps: run a recorded loop after this many steps of a neuron, which bounds the memory of the record;
            default: when its numbers are needed.
        check: also make checks that cost a pass over the data (finite inputs and weights on every path).

    Numbers may be numpy's or tensors without dimensions; they are kept as Python's.

    Raises:
        ConfigError: a value outside its range.
        UnsupportedError: no backend has that name.

    Example:
        >>> SparseConfig(backprop_threshold=0.2).backprop_threshold
        0.2
    """

    backprop_threshold: float | Literal["auto"] | None = "auto"
    backend: str = "auto"
    min_active: float = 0.001
    fuse_time: bool = field(default_factory=lambda: os.environ.get("SNN_SPARSE_FUSE", "1") != "0")
    check: bool = False
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if type(value) not in _PYTHON:
                object.__setattr__(self, option.name, _plain(value))
        threshold = self.backprop_threshold
        if isinstance(threshold, str):
            valid = threshold == "auto"
        else:
            valid = threshold is None or (
                isinstance(threshold, int | float)
                and not isinstance(threshold, bool)
                and math.isfinite(threshold)
                and threshold > 0
            )
        if not valid:
            raise ConfigError(
                f'backprop_threshold must be "auto", None (exact) or a finite number > 0, got {threshold!r}.'
            )
        if not isinstance(self.backend, str) or not self.backend:
            raise ConfigError(f'backend must be "auto" or the name of a backend, got {self.backend!r}.')
        if self.backend != "auto":
            registry.check_name("backends", self.backend)
        if (
            isinstance(self.min_active, bool)
            or not isinstance(self.min_active, int | float)
            or not 0 <= self.min_active <= 1
        ):
            raise ConfigError(f"min_active must be a fraction between 0 and 1, got {self.min_active!r}.")
        steps = self.max_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ConfigError(f"max_steps must be None or a number of steps >= 1, got {steps!r}.")
        for name in ("fuse_time", "check"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")

    @cached_property
    def text(self) -> str:
        """``repr(self)``, made once: asked whenever sparse mode is entered."""
        return repr(self)

    @cached_property
    def steps_whole(self) -> bool:
        """Whether loops are recorded, and steps of those for which that does not pay have upstream's gradient."""
        return self.fuse_time and self.backprop_threshold in (None, "auto")

    def updated(self, **overrides: Any) -> SparseConfig:
        """A copy with some options changed; an unknown option raises :class:`ConfigError`."""
        if not overrides:
            return self
        key = tuple(
            (name, type(value), value if type(value) in _PYTHON else _plain(value))
            for name, value in overrides.items()
        )
        try:  # asked several times at every call of a layer
            return _updated(self, key)
        except TypeError:  # a value that cannot be hashed
            return _updated.__wrapped__(self, key)


_PYTHON = frozenset({float, int, bool, str, type(None)})


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's; anything else as it is."""
    if isinstance(value, str):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        with suppress(Exception):  # a tensor without data: the option's own check has the words for it
            return value.item()
    return value


def refuse_positional(what: str, values: tuple[Any, ...]) -> None:
    """Raise :class:`ConfigError` for options without their names, with the call that was probably meant."""
    if not values:
        return
    value = values[0] if type(values[0]) in _PYTHON else _plain(values[0])
    if isinstance(value, SparseConfig):
        changed = [f.name for f in fields(value) if getattr(value, f.name) != getattr(SparseConfig(), f.name)]
        meant = ", ".join(f"{name}={getattr(value, name)!r}" for name in changed)
    elif isinstance(value, bool):
        meant = f"fuse_time={value}"
    elif value is None or value == "auto" or isinstance(value, int | float):
        meant = f"backprop_threshold={value!r}"
    elif isinstance(value, str):
        meant = f"backend={value!r}"
    else:
        meant = ""
    raise ConfigError(
        f"{what} takes its options by name, got {type(value).__name__} {value!r:.80} without one: "
        f"write {what[:-1]}{', ' if not what.endswith('()') and meant else ''}{meant})."
    )


@lru_cache(maxsize=256)
def _updated(config: SparseConfig, overrides: tuple[tuple[str, type, Any], ...]) -> SparseConfig:
    # the types are part of the key, as True == 1
    known = [f.name for f in fields(config)]
    for name, _, _ in overrides:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Options: {', '.join(known)}."
            raise ConfigError(f"sparse mode has no option {name!r}.{hint}")
    return replace(config, **{name: value for name, _, value in overrides})


_active: Scoped[SparseConfig | None] = Scoped("snn_sparse_plugin.core.config")
active_blocks = _active.blocks


def active_config() -> SparseConfig | None:
    """The config of the innermost enclosing sparse context of this thread or task, or None outside."""
    blocks = active_blocks.get()  # written out: it is asked several times a step
    return blocks[-1][0] if blocks else None


def current_config() -> SparseConfig:
    """The active config, or the defaults outside any sparse context."""
    return active_config() or _defaults(_environment.get(_FUSE))


# os.environ raises and catches two errors to find that a variable is not set, which takes as long as the rest of
# entering sparse mode; what it wraps is a dict
_environment = getattr(os.environ, "_data", os.environ)
_FUSE = os.environ.encodekey("SNN_SPARSE_FUSE") if _environment is not os.environ else "SNN_SPARSE_FUSE"


@lru_cache(maxsize=4)
def _defaults(_: Any) -> SparseConfig:
    # asked at every step of a neuron, and compared by identity
    return SparseConfig()


def use_config(config: SparseConfig | None) -> Block[SparseConfig | None]:
    """Make ``config`` the active one inside the block; the previous one comes back on any exit."""
    return Block(active_blocks, config)


def check_device(name: str) -> None:
    """Raise :class:`ConfigError` unless ``name`` is ``"cpu"`` or a CUDA device of this machine."""
    import torch  # a config is made before torch is needed

    here = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    if name not in ("cpu", *(["cuda", *here] if here else [])):
        raise ConfigError(f"device {name!r} is not available here.")
