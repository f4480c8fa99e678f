"""snnTorch's neurons, spike functions and hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..config import SparseConfig
from ..dynamics import NeuronParams, NeuronSpec, NeuronState
from ..equations import Equations
from ..errors import ConfigError
from ..surrogates import Surrogate
from . import (
    Adapter,
    Example,
    Neuron,
    config_of,
    has_hooks,
    hook,
    installed_version,
    patched,
    runner,
    running,
    spike,
    spike_in_graph,
)
from .snntorch_neurons import WHY_NOT, Classes, Parts, builders, examples

SpikeFunction = Callable[[Tensor], Tensor]


class SnnTorchAdapter(Adapter):
    """snnTorch 0.9.4 to 1.0."""

    name = package = "snntorch"
    tested = ("0.9.4", "1.0")

    def available(self) -> tuple[bool, str]:
        return installed_version("snntorch")

    def install(self) -> None:
        snn = Classes()
        for method in ("fire", "fire_inhibition"):
            hook(snn.SpikingNeuron, method, _masked_method)
        for name in _STEPPED:
            hook(getattr(snn, name), "forward", self._recorded_forward)
        for cls in (snn.DeltaLeaky, snn.LeakyParallel):  # these call spike_grad without fire
            if not isinstance(vars(cls).get("spike_grad"), _MaskedAttribute):
                cls.spike_grad = _MaskedAttribute()

    def examples(self) -> dict[str, Example]:
        return examples()

    def owns(self, module: Any) -> bool:
        snn = Classes()
        return isinstance(module, snn.SpikingNeuron | snn.LeakyParallel)

    def masks(self, module: Any) -> str | None:
        function = vars(module).get("spike_grad") or module.spike_grad
        surrogate = recognise(function)
        return "its spike function has no gradient" if surrogate.kind == "zero" else None

    def takes_sequence(self, module: Any) -> bool:
        snn = Classes()
        return isinstance(module, snn.StateLeaky | snn.AssociativeLeaky | snn.LeakyParallel)

    def takes_shape(self, module: Any, shape: Sequence[int]) -> bool:
        return len(shape) == 3 or not self.takes_sequence(module)

    def neuron(self, module: Any) -> Neuron | str:
        snn = Classes()
        family = (*builders(), snn.Leaky, snn.Synaptic, snn.RLeaky, snn.RSynaptic)
        cls = next((c for c in family if isinstance(module, c)), None)
        if cls is None:
            kind = type(module).__name__
            return WHY_NOT.get(kind, f"{kind} is in no fused family")
        for method in ("forward", "fire", "mem_reset", "_base_state_function"):
            changed = getattr(type(module), method, None) is not getattr(cls, method, None)
            if method in vars(module) or changed:
                return f"it overrides {method}()"
            foreign = patched(cls, method, import_module("snntorch"))
            if foreign is not None:
                return foreign
        steps = cls is not snn.DeltaLeaky  # whose forward ignores both options
        if steps and getattr(module, "state_quant", False):
            return "state_quant"
        if steps and getattr(module, "inhibition", False):
            return "inhibition"
        function = vars(module).get("spike_grad") or module.spike_grad  # a hooked class masks the attribute
        surrogate = recognise(function)
        if surrogate.kind == "custom" and not _is_heaviside(function):
            return "its spike function is not a step function"
        parts = _parts(module, cls, snn)
        if isinstance(parts, str):
            return parts
        factor = module.graded_spikes_factor
        graded = factor.requires_grad or factor.numel() != 1 or float(factor) != 1
        scale = factor if graded and cls is not snn.DeltaLeaky else None
        if scale is not None and issubclass(cls, snn.StateLeaky):
            scale = scale * scale  # upstream multiplies in fire, and again after it
        if scale is not None and ("recurrent_weight" in parts or "recurrent_diagonal" in parts):
            return "graded spikes with recurrence"
        return Neuron(surrogate=surrogate, scale=scale, **parts)

    # Hidden states are non-persistent buffers in every class: a state is a dict of them by name.

    def initial_state(self, module: Any, neuron: Neuron, template: Tensor, state: Any) -> tuple[Any, Any]:
        given = state is not None or isinstance(module, Classes().DeltaLeaky)
        hidden = self.read_state(module) if state is None else state

        def fits(name: str) -> Tensor | None:
            value = hidden.get(name)
            # upstream starts from zeros where the shape differs, e.g. before the first call
            return value if value is not None and (given or value.shape == template.shape) else None

        names = tuple(self.read_state(module))
        if isinstance(neuron.spec, Equations):
            return {name: fits(name) for name in neuron.spec.states}, names
        return NeuronState(fits("mem"), fits("syn"), fits("spk")), names

    def final_state(self, module: Any, state: Any, initial: Any) -> Any:
        values = state
        if isinstance(state, NeuronState):
            values = {"mem": state.v, "syn": state.i, "spk": state.spikes}
        return {name: _own(values[name]) for name in initial}

    def read_state(self, module: Any) -> Any:
        if isinstance(module, Classes().DeltaLeaky):
            return {"mem": module.mem, "mem_prev": module.mem_prev}
        names = module._non_persistent_buffers_set
        return {name: value for name, value in module._buffers.items() if name in names}

    def write_state(self, module: Any, state: Any) -> None:
        for name, value in state.items():
            setattr(module, name, value)

    def step(self, module: Any, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        out = module(x)
        spikes = out[0] if isinstance(out, tuple) else out
        return spikes, getattr(module, "mem", None), None

    # A call's state is given by position or name, or kept in buffers of the same names.

    zeros_for_other_shapes = True

    def _recorded_forward(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            config = None if torch.compiler.is_compiling() else config_of(module)
            if config is None or not config.fuse_time:
                return upstream(module, *args, **kwargs)
            return runner().step(self, module, upstream, args, kwargs, config)

        return forward

    def read_call(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], Any] | None:
        names = _state_names(module.__class__)
        if kwargs or not 0 < len(args) <= 1 + len(names):
            known = ("input_", *names)
            args = (*args, *(kwargs.get(name) for name in known[len(args) :]))
            if len(args) > len(known) or not set(kwargs) <= set(known):
                return None
        x, buffers, leaves = args[0], module._buffers, {}
        for index, name in enumerate(names, 1):
            given = args[index] if index < len(args) else None
            if name not in buffers or (given is not None and module.init_hidden):
                return None
            leaf = buffers[name] if given is None else given
            if not isinstance(leaf, Tensor):
                return None
            leaves[name] = leaf
        return x, leaves, None

    def next_state(self, module: Any, args: tuple[Any, ...]) -> Sequence[Any] | None:
        names = _state_names(module.__class__)
        if len(args) == 1:
            buffers = module._buffers
            return [buffers.get(name) for name in names]
        return None if module.init_hidden or len(args) != 1 + len(names) else args[1:]

    def write_call(self, module: Any, out: Tensor, leaves: Mapping[str, Tensor], like: Any) -> Any:
        module._buffers.update(leaves)
        if module.init_hidden and not module.output:
            return out
        if len(leaves) == 1:
            return out, leaves["mem"]
        return (out, *(leaf for name, leaf in leaves.items() if name != "spk"))

    def leaves(self, state: Any) -> dict[str, Any]:
        return dict(state)

    def state_of(self, leaves: dict[str, Any], like: Any) -> Any:
        return leaves

    def output_leaf(self, module: Any, neuron: Neuron) -> str | None:
        return "spk" if "spk" in module._buffers else None

    def membrane_leaf(self) -> str:
        return "mem"

    def hidden_names(self, module: Any) -> set[str]:
        return set(_state_names(module.__class__))

    def upstream_step(
        self, upstream: Callable[..., Any], module: Any, x: Tensor, leaves: dict[str, Any], like: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        buffers, attributes = module._buffers, vars(module)
        kept, reset = {name: buffers[name] for name in leaves}, attributes.get("reset", self)
        # an empty tensor has no input's shape, so that upstream starts from zeros
        buffers.update({name: x.new_zeros(0) if leaf is None else leaf for name, leaf in leaves.items()})
        try:
            out = upstream(module, x)
            return (out[0] if isinstance(out, tuple) else out), {name: buffers[name] for name in leaves}
        finally:
            buffers.update(kept)
            # the forward's own note of its last reset, which is no part of the neuron's description
            attributes.pop("reset", None)
            if reset is not self:
                attributes["reset"] = reset

    def check_in_sequence(self, module: Any, last: bool) -> str | None:
        if last or self.takes_sequence(module):
            return None
        if not module.init_hidden:
            return "keeps no hidden state: build it with init_hidden=True"
        if module.output:
            return "returns (spk, mem): output=True is for the last layer only"
        return None


# classes whose single steps time fusion records, with their states in the order of their forward's arguments
_STEPPED = {
    "Leaky": ("mem",),
    "Lapicque": ("mem",),
    "Synaptic": ("syn", "mem"),
    "Alpha": ("syn_exc", "syn_inh", "mem"),
    "RLeaky": ("spk", "mem"),
    "RSynaptic": ("spk", "syn", "mem"),
}


@cache
def _state_names(cls: Any) -> tuple[str, ...]:
    return next(_STEPPED[base.__name__] for base in cls.__mro__ if base.__name__ in _STEPPED)


def _own(x: Tensor | None) -> Tensor | None:
    # upstream detaches hidden states in place, which a view refuses
    return x.clone() if x is not None and x._is_view() else x


def _parts(module: Any, cls: Any, snn: Any) -> Parts | str:
    """Equations or spec, parameters and weights of a neuron."""
    build, by_reset = builders().get(cls, (None, True))
    if build is not None and not by_reset:
        return build(module)
    # state_function is chosen at construction; only reset_delay=False also looks at reset_mechanism_val
    functions: dict[Any, Any] = {cls._base_sub: "subtract", cls._base_zero: "zero", cls._base_int: "none"}
    reset = functions.get(getattr(module.state_function, "__func__", None))
    if reset is None:
        return "its state_function was replaced"
    if build is not None:
        return build(module, reset)
    synapse = cls in (snn.Synaptic, snn.RSynaptic)
    corrected = not module.reset_delay and reset != "none"
    if not module.reset_delay:
        if cls is snn.RSynaptic:
            return "RSynaptic with reset_delay=False raises in snnTorch"
        if ("subtract", "zero", "none")[int(module.reset_mechanism_val)] != reset:
            return "reset_mechanism was changed after construction, so that its two resets differ"
    spec = NeuronSpec(
        synapse=synapse,
        reset=reset,
        timing="corrected" if corrected else "delayed",
        scope="state" if cls is snn.Leaky else "sum",
        attached=corrected,
    )
    params = NeuronParams(
        mem=module.beta.clamp(0, 1),
        syn=module.alpha.clamp(0, 1) if synapse else 0.0,
        threshold=module.threshold,
    )
    recurrent = _recurrence(module.recurrent) if cls in (snn.RLeaky, snn.RSynaptic) else {}
    return recurrent if isinstance(recurrent, str) else {"spec": spec, "params": params, **recurrent}


def _recurrence(module: Any) -> dict[str, Tensor | None] | str:
    if has_hooks(module):
        return "its recurrent layer has hooks"
    if type(module).forward is nn.Linear.forward:
        return {"recurrent_weight": module.weight, "recurrent_bias": module.bias}
    if type(module).__name__ == "RecurrentOneToOne":
        return {"recurrent_diagonal": module.V}
    return f"its recurrence is a {type(module).__name__}"


# --- spike functions ---

# upstream's factory -> (our kind, the factory's parameters in the order of ours)
_FACTORIES = {
    "atan": ("atan", ("alpha",)),
    "fast_sigmoid": ("fast_sigmoid", ("slope",)),
    "sigmoid": ("sigmoid", ("slope",)),
    "straight_through_estimator": ("straight_through", ()),
    "triangular": ("triangular", ("threshold",)),
    "heaviside": ("heaviside", ()),
    "spike_rate_escape": ("spike_rate_escape", ("beta", "slope")),
    "SFS": ("sparse_fast_sigmoid", ("slope", "B")),
}

_recognised: WeakKeyDictionary[Any, Surrogate] = WeakKeyDictionary()


def recognise(function: SpikeFunction) -> Surrogate:
    """The surrogate behind a ``spike_grad``, by the code and closure of snnTorch's factories.

    Anything unknown becomes ``Surrogate("custom")``, which evaluates the function's own gradient.

    Example:
        >>> from snntorch import surrogate
        >>> recognise(surrogate.fast_sigmoid(slope=100))
        fast_sigmoid(slope=100)
    """
    if isinstance(function, Surrogate):
        return function
    try:
        return _recognised[function]
    except (KeyError, TypeError):
        pass
    found = _by_code(function)
    if found is None:
        return _by_class(function) or Surrogate("custom", function=function)
    if not any(isinstance(c.cell_contents, Tensor) for c in function.__closure__ or ()):
        _recognised[function] = found
    return found


def _by_code(function: Any) -> Surrogate | None:
    code: Any = getattr(function, "__code__", None)
    snn = import_module("snntorch")
    if code in (c._surrogate_bypass.__code__ for c in (snn.SpikingNeuron, snn.LeakyParallel)):
        return Surrogate("zero")
    if code not in _codes():
        return None
    kind, names = _codes()[code]
    closure = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    return _surrogate(kind, *(closure[name] for name in names))


def _by_class(function: SpikeFunction) -> Surrogate | None:
    # `Heaviside.apply`, or LeakyParallel's private ATan.apply with its default parameter
    cls = getattr(function, "__self__", None)
    if getattr(function, "__name__", "") != "apply" or not isinstance(cls, type):
        return None
    known = import_module("snntorch.surrogate")
    if cls is known.Heaviside:
        return Surrogate("heaviside")
    if cls is known.StraightThroughEstimator:
        return Surrogate("straight_through")
    if cls is import_module("snntorch").LeakyParallel.ATan:
        return _surrogate("atan", inspect.signature(cls.forward).parameters["alpha"].default)
    return None


def _surrogate(kind: str, *params: Any) -> Surrogate | None:
    try:
        return Surrogate(kind, tuple(float(p) for p in params))
    except (TypeError, ValueError, RuntimeError, ConfigError):  # e.g. one slope per neuron
        return None


@cache
def _codes() -> dict[Any, tuple[str, tuple[str, ...]]]:
    known = import_module("snntorch.surrogate")
    return {
        getattr(known, name)().__code__: entry for name, entry in _FACTORIES.items() if hasattr(known, name)
    }


def _is_heaviside(function: SpikeFunction) -> bool:
    probe = torch.tensor([[-2.0, -1e-3, 0.0, 1e-3, 0.5, 2.0]])
    try:
        with torch.no_grad():
            return bool((function(probe) == (probe > 0)).all())
    except Exception:  # a user's function may refuse the probe
        return False


# --- hooks ---


class _Masked:
    """A neuron seen with its spike function masked, so that upstream's own method runs on it."""

    def __init__(self, neuron: nn.Module, spike_grad: SpikeFunction) -> None:
        self._neuron, self.spike_grad = neuron, spike_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._neuron, name)


def _masked_method(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def masked(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        function = self.spike_grad
        if torch.compiler.is_compiling():
            in_graph = _Masked(self, lambda x: spike_in_graph(x, self, function, recognise))
            return upstream(in_graph, *args, **kwargs)
        config = config_of(self)
        if config is None:
            return upstream(self, *args, **kwargs)
        seen = _Masked(self, lambda x: spike(x, function, recognise(function), config))
        with running(self):
            return upstream(seen, *args, **kwargs)

    return masked


class _MaskedAttribute:
    """``spike_grad`` of a class that calls it directly: masked while the module is sparse."""

    def __get__(self, module: Any | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        attributes = vars(module)  # a spike function that is a module lives in _modules
        function = attributes.get("spike_grad") or attributes.get("_modules", {}).get("spike_grad")
        if function is None:
            raise AttributeError("spike_grad")
        if torch.compiler.is_compiling():
            return partial(spike_in_graph, module=module, function=function, recognise=recognise)
        config = config_of(module)
        if config is None:
            return function
        return partial(_counted_spike, module=module, function=function, config=config)

    def __set__(self, module: Any, function: SpikeFunction) -> None:
        vars(module)["spike_grad"] = function


def _counted_spike(x: Tensor, module: nn.Module, function: SpikeFunction, config: SparseConfig) -> Tensor:
    with running(module):
        return spike(x, function, recognise(function), config)


# --- pickling of the import-swap classes ---


def picklable_state(self: nn.Module) -> dict[str, Any]:
    """A module's state with its spike function as a :class:`Surrogate` where that is recognised.

    snnTorch's spike functions are closures, which do not pickle.
    """
    state = dict(vars(self))
    function = state.get("spike_grad")
    if inspect.isfunction(function) and "<locals>" in function.__qualname__:
        surrogate = recognise(function)
        if surrogate.kind != "custom":
            state["spike_grad"] = _Factory(surrogate)
    return state


def restored_state(self: nn.Module, state: dict[str, Any]) -> None:
    """Put back what :func:`picklable_state` made, with snnTorch's own spike function."""
    function = state.get("spike_grad")
    if isinstance(function, _Factory):
        state = {**state, "spike_grad": function.build()}
    nn.Module.__setstate__(self, state)


class _Factory:
    """Stands for a spike function in a pickle: which factory of snnTorch builds it again."""

    def __init__(self, surrogate: Surrogate) -> None:
        self.surrogate = surrogate

    def build(self) -> SpikeFunction:
        for name, (kind, parameters) in _FACTORIES.items():
            if kind == self.surrogate.kind:
                factory = getattr(import_module("snntorch.surrogate"), name)
                return factory(**dict(zip(parameters, self.surrogate.params, strict=True)))
        return self.surrogate
