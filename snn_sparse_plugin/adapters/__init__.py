"""What the package must know about an upstream library's neurons.

A library is described by one :class:`Adapter` in one file. Which of its neurons are sparse now is
decided per module and call by :func:`config_of`: a mark on the module (``sparsify``), on its class (the
import-swap faces), or the active sparse mode of this thread.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import registry, tally
from ..config import SparseConfig
from ..dynamics import NeuronParams, NeuronSpec
from ..equations import Equations
from ..surrogates import Surrogate
from .active import MARK, Mark, config_of, entered, spike, spike_in_graph

__all__ = [
    "MARK",
    "Adapter",
    "Example",
    "Mark",
    "Neuron",
    "adapter_of",
    "config_of",
    "entered",
    "has_hooks",
    "hook",
    "install_adapters",
    "installed_version",
    "loaded_adapters",
    "outside_tested",
    "patched",
    "record_of",
    "runner",
    "running",
    "spike",
    "spike_in_graph",
]

_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Neuron:
    """A neuron module as the fused op sees it now. Its tensors are live, so gradients reach their owners.

    Args:
        spec, params, surrogate: as :func:`snn_sparse_plugin.ops.spiking_layer` takes them.
        input_weight: (N, M), of a neuron that holds its own synapses (Norse's recurrent cells); ``input_bias`` (N,).
        recurrent_weight: (N, N); ``recurrent_bias``: (N,).
        recurrent_diagonal: broadcasts to the neurons: each neuron is fed with its own last spike.
        scale: factor on the emitted spikes (snnTorch's graded spikes), or None for 1.
    """

    spec: NeuronSpec | Equations
    params: NeuronParams | Mapping[str, Tensor | float]
    surrogate: Surrogate = field(default_factory=lambda: Surrogate("zero"))
    input_weight: Tensor | None = None
    input_bias: Tensor | None = None
    recurrent_weight: Tensor | None = None
    recurrent_bias: Tensor | None = None
    recurrent_diagonal: Tensor | None = None
    scale: Tensor | None = None

    @property
    def values(self) -> list[Tensor | float]:
        """All parameters."""
        return list(self.params.values()) if isinstance(self.params, Mapping) else list(self.params)

    @property
    def recurrent(self) -> bool:
        return self.recurrent_weight is not None or self.recurrent_diagonal is not None


class Example(NamedTuple):
    """How to build one neuron class.

    ``options``: keyword arguments that upstream offers, each asked for alone. ``exactness``: how close the fused path
    is to upstream's where that is not bit for bit.
    """

    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = MappingProxyType({})
    exactness: str = ""


class Adapter:
    """One upstream library. Register a subclass under ``snn_sparse_plugin.adapters``.

    The methods from :meth:`neuron` on describe one neuron module; the executor of
    :func:`snn_sparse_plugin.unroll` needs nothing else. A ``state`` is what the library's users know as one.
    """

    name = "unnamed"
    package = ""
    """The import name of the library; its adapter does nothing until that is imported."""
    tested: tuple[str, str] | None = None
    """Oldest and newest version of the library the adapter is tested with; an end ``"1.0"`` includes every 1.0.x."""

    def available(self) -> tuple[bool, str]:
        """Whether the library can be imported, and its version or the reason why not."""
        raise NotImplementedError

    def install(self) -> None:
        """Hook the library's classes, once; without an active config the hooks do nothing."""

    def examples(self) -> dict[str, Example]:
        """How to build each neuron class of the library, by name; the table of supported neurons is made from it."""
        return {}

    def owns(self, module: nn.Module) -> bool:
        """Whether this is a neuron of the library."""
        raise NotImplementedError

    def masks(self, module: nn.Module) -> str | None:
        """None if a single step of this neuron gets the masked gradient, else why not."""
        return None

    def prepare(self, module: nn.Module) -> None:
        """Hook whatever else this module needs before it is marked by ``sparsify``."""

    def container(self, module: nn.Module) -> bool:
        """Whether this is the library's own sequential container."""
        return False

    def stateful(self, container: nn.Module, index: int) -> bool:
        """Whether the container calls its ``index``-th module as ``module(x, state) -> (x, state)``."""
        return False

    def unwrap(self, module: nn.Module) -> nn.Module | None:
        """The module that a wrapper such as Norse's ``Lift`` applies at every step, else None."""
        return None

    def takes_shape(self, module: nn.Module, shape: Sequence[int]) -> bool:
        """Whether the neuron's own forward takes an input of shape (T, B, ...), for one step each or as a whole."""
        return True

    def takes_sequence(self, module: nn.Module) -> bool:
        """Whether the neuron's own forward takes all steps (T, B, N...) at once."""
        return False

    def neuron(self, module: nn.Module) -> Neuron | str:
        """The neuron as a member of the fusable family, or why it is none."""
        return "its adapter does not describe it"

    def initial_state(
        self, module: nn.Module, neuron: Neuron, template: Tensor, state: Any
    ) -> tuple[Any, Any]:
        """State before the first step, of ``neuron`` (:meth:`neuron`'s answer) for an input like ``template``:
        -> (the op's form, the library's).

        The op's form is a ``NeuronState``, or with equations a dict of their states and ``"spikes"``.
        """
        raise NotImplementedError

    def final_state(self, module: nn.Module, state: Any, initial: Any) -> Any:
        """The library's own form of the op's final state."""
        raise NotImplementedError

    def read_state(self, module: nn.Module) -> Any:
        """State kept inside the module, None if it keeps none."""
        return None

    def write_state(self, module: nn.Module, state: Any) -> None:
        """Put a state into a module that keeps one inside."""

    def step(self, module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        """One step of upstream's own forward: -> (spikes, membrane, state)."""
        raise NotImplementedError

    # The rest is what time fusion asks about the neurons whose single steps the library's hooks hand to it.

    zeros_for_other_shapes = False
    """Whether a state of another shape than the input counts as none."""

    def read_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any], Any] | None:
        """Input and state of a call of the neuron's forward: -> (x, tensors of the state by name, something of the
        state's form), a None for a tensor of zeros; None where upstream's own forward has to see the call."""
        return None

    def next_state(self, module: nn.Module, args: tuple[Any, ...]) -> Sequence[Any] | None:
        """The tensors of the state that :meth:`read_call` would find, or None to ask that instead."""
        return None

    def write_call(self, module: nn.Module, out: Tensor, leaves: Mapping[str, Tensor], like: Any) -> Any:
        """Keep the state as upstream's forward does, and return what it returns."""
        raise NotImplementedError

    def leaves(self, state: Any) -> dict[str, Any]:
        """The tensors of a state by name."""
        raise NotImplementedError

    def state_of(self, leaves: dict[str, Any], like: Any) -> Any:
        """The library's form of a state."""
        raise NotImplementedError

    def output_leaf(self, module: nn.Module, neuron: Neuron) -> str | None:
        """Which tensor of the new state is also the neuron's output."""
        return None

    def membrane_leaf(self) -> str:
        """Which tensor of a state is the membrane."""
        raise NotImplementedError

    def hidden_names(self, module: nn.Module) -> set[str]:
        """Buffers of the module that hold its state."""
        return set()

    def upstream_step(
        self, upstream: Callable[..., Any], module: nn.Module, x: Tensor, leaves: dict[str, Any], like: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of upstream's forward from this state; the module's own state stays as it is."""
        raise NotImplementedError

    def check_in_sequence(self, module: nn.Module, last: bool) -> str | None:
        """Why the module cannot stand in an ``nn.Sequential`` at that place, or None."""
        return None


# --- the layer above ---


class Runner(Protocol):
    """Runs sequence modules fused (:mod:`snn_sparse_plugin.fusion.sequence`); None: not possible here."""

    def neuron(self, module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any] | None: ...

    def container(self, module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any] | None: ...

    def step(
        self,
        adapter: Adapter,
        module: nn.Module,
        upstream: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: SparseConfig,
    ) -> Any: ...


@functools.cache
def runner() -> Runner:
    """The executor, which stands above the adapters: imported when a hook needs it."""
    return import_module("snn_sparse_plugin.fusion.sequence").hooked  # type: ignore[no-any-return]


# --- finding adapters ---


def loaded_adapters() -> list[Adapter]:
    """Adapters whose library has been imported, with their hooks in place."""
    found = [a for a in registry.load_all("adapters").values() if a.package in sys.modules]
    for adapter in found:
        if adapter not in _installed and adapter not in _refused:
            _install(adapter)
    return [adapter for adapter in found if adapter not in _refused]


_installed: list[Adapter] = []
_refused: list[Adapter] = []


def _install(adapter: Adapter) -> None:
    # before an adapter keeps upstream's functions: those have to see numbers
    import_module("snn_sparse_plugin.fusion.sources").install()
    outside = outside_tested(adapter)
    try:
        adapter.install()
    except Exception as error:
        if not outside:
            raise
        _refused.append(adapter)
        outside += f" Its neurons stay exact: hooking them failed with {type(error).__name__}: {error}"
    else:
        _installed.append(adapter)
    if outside:
        warnings.warn(outside, stacklevel=4)


def outside_tested(adapter: Adapter) -> str:
    """A sentence if the installed version of the library is outside the adapter's tested range, else ``""``."""
    there, version = adapter.available()
    numbers = _numbers(version)
    if not there or adapter.tested is None or not numbers:
        return ""
    oldest, newest = map(_numbers, adapter.tested)
    if oldest <= numbers and numbers[: len(newest)] <= newest:
        return ""
    return (
        f"{adapter.name} {version} is outside the range that snn-sparse-plugin is tested with, "
        f"{' to '.join(dict.fromkeys(adapter.tested))}: compare its results with upstream's before relying on them."
    )


def _numbers(version: str) -> tuple[int, ...]:
    """``"1.0.2rc1"`` as (1, 0, 2)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading.group().split("."))) if leading else ()


class _LateImports(MetaPathFinder):
    """Hooks a library that is imported only after sparse mode was entered."""

    def __init__(self) -> None:
        # asked at every import of the process: the names are found once, by install_adapters
        self.packages: frozenset[str] = frozenset()
        self._here = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name not in self.packages or getattr(self._here, "searching", False):
            return None
        self._here.searching = True
        try:
            return self._hooked(name, path, target)
        finally:
            self._here.searching = False

    def _hooked(self, name: str, path: Sequence[str] | None, target: Any) -> ModuleSpec | None:
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module: ModuleType) -> None:
                    execute(module)  # noqa: B023, the loop ends here
                    loaded_adapters()

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


_late_imports = _LateImports()


def install_adapters() -> None:
    """Hook every supported library, those that are not imported yet as soon as they are."""
    hooked = loaded_adapters()
    adapters = registry.load_all("adapters").values()
    _late_imports.packages = frozenset(adapter.package for adapter in adapters)
    if len(hooked) < len(adapters) and _late_imports not in sys.meta_path:
        sys.meta_path.insert(0, _late_imports)


def adapter_of(module: nn.Module, adapters: list[Adapter] | None = None) -> Adapter | None:
    """The adapter that owns a neuron module, or None."""
    for adapter in loaded_adapters() if adapters is None else adapters:
        if adapter.owns(module):
            return adapter
    return None


def record_of(module: nn.Module) -> tally.Record:
    """What the module did in sparse mode, live."""
    return tally.of(module, _why_not_fused)


def running(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, what runs is counted on this module; in a graph that is being compiled nothing is."""
    return nullcontext() if torch.compiler.is_compiling() else tally.running(record_of(module))


def _why_not_fused(module: nn.Module) -> str:
    if torch.jit.is_tracing():  # looking at its parameters would be traced as well
        return "traced"
    try:
        adapter = adapter_of(module)
        neuron = "no adapter describes it" if adapter is None else adapter.neuron(module)
        if isinstance(neuron, str):
            return neuron
        sequence = adapter is not None and adapter.takes_sequence(module)
        return "input that the fused op does not take" if sequence else "called step by step"
    except Exception as error:  # counting may not fail where upstream's own forward does not
        return f"its adapter failed with {type(error).__name__}"


def hook(cls: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of an upstream class by ``wrap(method)``, once."""
    upstream = vars(cls)[name]
    with _lock:
        if not getattr(upstream, "_snn_sparse_hook", False):
            replacement = functools.wraps(upstream)(wrap(upstream))
            replacement._snn_sparse_hook = True  # type: ignore[attr-defined]
            setattr(cls, name, replacement)


def patched(cls: type, method: str, package: ModuleType) -> str | None:
    """Why a method of an upstream class is not upstream's own: someone else has replaced it. None if it is."""
    return _patched(getattr(cls, method, None), method, os.path.dirname(str(package.__file__)))


@functools.lru_cache(maxsize=1024)
def _patched(function: Any, name: str, folder: str) -> str | None:
    while getattr(function, "_snn_sparse_hook", False):
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith(folder):
        return None
    return f"its {name}() was patched by {function.__globals__.get('__name__', code.co_filename)}"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks, which a fused path would skip."""
    every = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def installed_version(distribution: str) -> tuple[bool, str]:
    """Whether a library is installed: (True, version), or (False, what to do)."""
    try:
        return True, metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False, f"not installed: pip install snn-sparse-plugin[{distribution}]"
