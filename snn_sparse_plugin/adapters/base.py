"""What an adapter is: one upstream library's neurons in the terms of the fused op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..core import registry
from ..core.config import SparseConfig
from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.equations import Equations
from ..core.errors import UnsupportedError
from ..core.spikes import SpikeTrain
from ..core.surrogates import Surrogate


@dataclass(frozen=True, eq=False)
class Neuron:
    """A neuron module as the fused op sees it now. Its tensors are live, so gradients reach their owners.

    Args:
        spec, params, surrogate: as :func:`snn_sparse_plugin.ops.spiking_layer` takes them.
        input_weight: (N, M), of a neuron that holds its own synapses (Norse's recurrent cells); ``input_bias`` (N,).
            With C inputs every first N here is C·N.
        recurrent_weight: (N, N); ``recurrent_bias``: (N,).
        recurrent_diagonal: broadcasts to the neurons: each neuron is fed with its own last spike.
        output: what the layer returns for its spikes and its input, both over all steps; None for the spikes.
    """

    spec: NeuronSpec | Equations
    params: NeuronParams | Mapping[str, Tensor | float]
    surrogate: Surrogate = field(default_factory=lambda: Surrogate("zero"))
    input_weight: Tensor | None = None
    input_bias: Tensor | None = None
    recurrent_weight: Tensor | None = None
    recurrent_bias: Tensor | None = None
    recurrent_diagonal: Tensor | None = None
    output: Callable[[Tensor, Tensor | SpikeTrain], Tensor] | None = None

    @property
    def values(self) -> list[Tensor | float]:
        """All parameters."""
        return list(self.params.values()) if isinstance(self.params, Mapping) else list(self.params)

    @property
    def inputs(self) -> int:
        """C: how many input currents each neuron has."""
        return len(self.spec.inputs) if isinstance(self.spec, Equations) else 1

    @property
    def recurrent(self) -> bool:
        return self.recurrent_weight is not None or self.recurrent_diagonal is not None

    @property
    def multiplies(self) -> bool:
        """Whether its step has products with matrices."""
        return self.input_weight is not None or self.recurrent_weight is not None


class Example(NamedTuple):
    """How to build one neuron class.

    ``options``: what upstream offers, each asked for alone: a keyword argument and its value. Where one has several
    values a label is ``"name=value"``. ``exactness``: how close the fused path is to upstream's where that is not bit
    for bit.
    """

    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = MappingProxyType({})
    exactness: str = ""

    def with_option(self, label: str, **more: Any) -> nn.Module:
        """The neuron with one of its options."""
        return self.build(**{label.partition("=")[0]: self.options[label]}, **more)


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

    noted = False
    """Whether all its hooks are noted in ``hooks.placed``: :meth:`repair` is asked only where one has changed."""

    functions: tuple[str, ...] = ()
    """Modules of the library whose autograd functions, such as spikes, take tensors alone: no neuron runs in them."""

    def available(self) -> tuple[bool, str]:
        """Whether the library can be imported, and its version or the reason why not."""
        raise NotImplementedError

    def install(self) -> None:
        """Hook the library's classes, once; without an active config the hooks do nothing."""

    def repair(self) -> None:
        """Put back the hooks that are gone, because a patch that was there before them has ended since.

        Asked before every use, unless :attr:`noted`; :meth:`install`, where that does nothing to what is hooked,
        will do.
        """

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

    def only_unroll(self, module: nn.Module) -> str:
        """Why nothing but :func:`~snn_sparse_plugin.unroll` runs this neuron fused; empty where a step loop, or a call
        with all steps, does too."""
        return ""

    def neuron(self, module: nn.Module) -> Neuron | str:
        """The neuron as a member of the fusable family, or why it is none."""
        return "its adapter does not describe it"

    def kind(self, module: nn.Module) -> Any:
        """What its class and its functions make of a neuron: the very same object as long as they and the module's
        attributes are the same. None: nobody knows but :meth:`neuron`, which is asked at every call."""
        return None

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

    def first_state(self, module: nn.Module, like: Any, B: int) -> Any:
        """The state of B samples before their first step, in the form and with the features of ``like``, which is the
        library's state of some samples. Asked for samples without a step."""
        raise UnsupportedError(f"the adapter {self.name} does not say what state a sample of length 0 has.")

    def keeps(self, module: nn.Module) -> tuple[str | None, str | None]:
        """The attributes in which the module's own forward leaves its output and its membranes of all steps."""
        return None, None

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

    def bare(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """What ``upstream``, as given to the runner's ``step``, does for a step whose gradient is cut nowhere."""
        return upstream

    # What upstream's forward leaves in the module besides its state, where it leaves something.

    left: tuple[str, ...] = ()
    """The attributes that it leaves."""

    def begin(self, module: nn.Module) -> None:
        """Steps of the module are recorded from now on: what the last forward left is out of date."""

    def note_last(
        self, module: nn.Module, fired: Callable[[], Tensor] | None, membrane: Tensor | None
    ) -> None:
        """A fused call has run: what its last step began with, the spikes of the step before, made when somebody asks
        for them, or where there is none, or :meth:`wants_membrane`, the membrane; None for zeros."""

    def wants_membrane(self, neuron: Neuron) -> bool:
        """Whether :meth:`note_last` needs membranes."""
        return False

    def leave(self, module: nn.Module) -> None:
        """All steps have run: leave what upstream's forward leaves."""

    def check_in_sequence(self, module: nn.Module, last: bool) -> str | None:
        """Why the module cannot stand in an ``nn.Sequential`` at that place, or None."""
        return None


class Runner(Protocol):
    """What hooks ask to run fused, None where that is not possible; it stands above the adapters."""

    def install(self) -> None:
        """Before the first neuron is hooked."""

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

    def settle(self, module: nn.Module) -> None: ...


@cache
def runner() -> Runner:
    """What runs neurons fused, imported when a hook needs it."""
    return registry.executor()  # type: ignore[no-any-return]
