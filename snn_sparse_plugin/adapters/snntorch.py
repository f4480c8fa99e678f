"""snnTorch's neurons, spike functions and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import active_config
from ..core.dynamics import NeuronParams, NeuronSpec, NeuronState
from ..core.equations import Equations
from ..core.host import number
from .active import config_of
from .base import Adapter, Example, Neuron, runner
from .hooks import has_hooks, hook, patched
from .loading import installed_version
from .snntorch_examples import examples
from .snntorch_hooks import MaskedAttribute, masked_method
from .snntorch_neurons import STATES, WHY_NOT, Classes, Parts, builders, takes_sequence
from .snntorch_reset import LastReset, resets
from .snntorch_surrogates import SpikeFunction, depends_on, is_made_by_factory, recognise


class SnnTorchAdapter(Adapter):
    """snnTorch 0.9.4 to 1.0."""

    name = package = "snntorch"
    tested = ("0.9.4", "1.0")

    def available(self) -> tuple[bool, str]:
        return installed_version("snntorch")

    def install(self) -> None:
        snn = Classes()
        for method in ("fire", "fire_inhibition"):
            hook(snn.SpikingNeuron, method, masked_method)
        for name in STATES:
            hook(getattr(snn, name), "forward", self._recorded_forward)
            if "reset" not in vars(getattr(snn, name)):
                getattr(snn, name).reset = LastReset()
        for cls in (snn.DeltaLeaky, snn.LeakyParallel):  # these call spike_grad without fire
            if not isinstance(vars(cls).get("spike_grad"), MaskedAttribute):
                cls.spike_grad = MaskedAttribute()

    repair = install

    def examples(self) -> dict[str, Example]:
        return examples()

    def owns(self, module: Any) -> bool:
        snn = Classes()
        return isinstance(module, snn.SpikingNeuron | snn.LeakyParallel)

    def masks(self, module: Any) -> str | None:
        surrogate = recognise(_spike_function(module))
        return "its spike function has no gradient" if surrogate.kind == "zero" else None

    def takes_sequence(self, module: Any) -> bool:
        return takes_sequence(type(module))

    def only_unroll(self, module: Any) -> str:
        if self.takes_sequence(module):
            return "a call runs upstream's own sums over the steps, which are rounded in another order"
        owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        return "" if owner.__name__ in STATES else "its single steps are not recorded"

    def takes_shape(self, module: Any, shape: Sequence[int]) -> bool:
        return len(shape) == 3 or not self.takes_sequence(module)

    def neuron(self, module: Any) -> Neuron | str:
        snn = Classes()
        cls = _fused_class(type(module))  # type: ignore[arg-type]
        if cls is None:
            kind = type(module).__name__
            return WHY_NOT.get(kind, f"{kind} is in no fused family")
        own = next((method for method in _METHODS if method in vars(module)), None)
        if own is not None:
            return f"it overrides {own}()"
        methods = [getattr(c, method, None) for c in (type(module), cls) for method in _METHODS]
        changed = _changed(cls, *methods)
        if changed is not None:
            return changed
        steps = cls is not snn.DeltaLeaky  # whose forward ignores both options
        if steps and getattr(module, "state_quant", False):
            return "state_quant is a Python function on the membrane of every step"
        if steps and getattr(module, "inhibition", False):
            return "inhibition lets only the neuron with the highest membrane fire"
        function = _spike_function(module)
        surrogate = recognise(function)
        if is_made_by_factory(function) and any(isinstance(x, Tensor) for x in depends_on(function)):
            return "a parameter of its spike function is a tensor, whose number may be another at every step"
        if not surrogate.pure:
            named = getattr(surrogate.function, "__qualname__", type(surrogate.function).__qualname__)
            return (
                f"its spike function {named} is none of snnTorch's, so that upstream calls it at every step"
            )
        parts = _parts(module, cls, snn)
        if isinstance(parts, str):
            return parts
        factor = module.graded_spikes_factor
        graded = factor.requires_grad or factor.numel() != 1 or number(factor) != 1
        if graded and cls is not snn.DeltaLeaky:
            if "recurrent_weight" in parts or "recurrent_diagonal" in parts:
                return "graded spikes with recurrence"
            # upstream multiplies in fire, and in StateLeaky again after it
            scale = factor * factor if issubclass(cls, snn.StateLeaky) else factor
            parts = {**parts, "output": _scaled(scale, parts.get("output"))}
        return Neuron(surrogate=surrogate, **parts)

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
            start = {name: fits(name) for name in neuron.spec.states}
            if isinstance(module, Classes().AssociativeLeaky):  # a product, before its first factor
                start["kept"] = template.new_ones(template.shape[1:])
            return start, names
        return NeuronState(fits("mem"), fits("syn"), fits("spk")), names

    def final_state(self, module: Any, state: Any, initial: Any) -> Any:
        values = state
        if isinstance(state, NeuronState):
            values = {"mem": state.v, "syn": state.i, "spk": state.spikes}
        return {name: _own(values[name]) for name in initial}

    def first_state(self, module: Any, like: Any, B: int) -> Any:
        return {name: x.new_zeros(B, *x.shape[1:]) for name, x in like.items()}

    def keeps(self, module: Any) -> tuple[str | None, str | None]:
        snn = Classes()
        if not isinstance(module, snn.StateLeaky):
            return None, None
        return "spk" if module.output else None, "mem" if isinstance(module, snn.LinearLeaky) else None

    def read_state(self, module: Any) -> Any:
        if isinstance(module, Classes().DeltaLeaky):
            return {"mem": module.mem, "mem_prev": module.mem_prev}
        names = module._non_persistent_buffers_set
        return {name: value for name, value in module._buffers.items() if name in names}

    def write_state(self, module: Any, state: Any) -> None:
        buffers = module._buffers  # modules are slow to set attributes
        for name, value in state.items():
            if name in buffers and isinstance(value, Tensor):
                buffers[name] = value
            else:
                setattr(module, name, value)

    def step(self, module: Any, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        out = module(x)
        spikes = out[0] if isinstance(out, tuple) else out
        if isinstance(module, Classes().StateLeaky):  # returns its membranes, alone where it does not spike
            return spikes, out[-1] if isinstance(out, tuple) else out, None
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
        if len(args) > 1:
            return None if module.__dict__["init_hidden"] else args[1:]
        buffers = module._buffers
        return [buffers.get(name) for name in _state_names(module.__class__)]

    def write_call(self, module: Any, out: Tensor, leaves: Mapping[str, Tensor], like: Any) -> Any:
        attributes = module.__dict__  # asked at every step, and modules are slow to look names up
        attributes["_buffers"].update(leaves)
        if attributes["init_hidden"] and not attributes["output"]:
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
        kept = {name: buffers[name] for name in leaves}
        # an empty tensor has no input's shape, so that upstream starts from zeros
        buffers.update({name: x.new_zeros(0) if leaf is None else leaf for name, leaf in leaves.items()})
        try:
            out = upstream(module, x)
            return (out[0] if isinstance(out, tuple) else out), {name: buffers[name] for name in leaves}
        finally:
            buffers.update(kept)
            # no part of the neuron's description
            reset = attributes.pop("reset", None)
            if active_config() is not None:  # else the step is only measured
                resets.note(module, reset)

    def begin(self, module: Any) -> None:
        vars(module).pop("reset", None)

    def wants_membrane(self, neuron: Neuron) -> bool:
        return isinstance(neuron.spec, NeuronSpec) and neuron.spec.timing == "corrected"

    def note_last(self, module: Any, fired: Tensor | None, membrane: Tensor | None) -> None:
        # DeltaLeaky is a Leaky whose own forward has no reset
        if isinstance(module, _with_reset()) and not isinstance(module, Classes().DeltaLeaky):
            resets.note_last(module, fired, membrane)

    def leave(self, module: Any) -> None:
        resets.leave(module)

    def check_in_sequence(self, module: Any, last: bool) -> str | None:
        if last or self.takes_sequence(module):
            return None
        if not module.init_hidden:
            return "keeps no hidden state: build it with init_hidden=True"
        if module.output:
            return "returns (spk, mem): output=True is for the last layer only"
        return None


def _spike_function(module: Any) -> SpikeFunction:
    """``spike_grad`` as the user set it: a hooked class masks the attribute."""
    function = vars(module).get("spike_grad")
    if function is None:  # a module
        function = vars(module)["_modules"].get("spike_grad")
    return module.spike_grad if function is None else function  # type: ignore[no-any-return]


_METHODS = ("forward", "fire", "mem_reset", "_base_state_function")


@lru_cache(maxsize=1024)
def _fused_class(kind: type) -> type | None:
    """The class of a fused family that this is or inherits from."""
    snn = Classes()
    family = (*builders(), snn.Leaky, snn.Synaptic, snn.RLeaky, snn.RSynaptic)
    return next((cls for cls in family if issubclass(kind, cls)), None)


@lru_cache(maxsize=1024)
def _changed(cls: type, *methods: Any) -> str | None:
    """Why a class whose methods are the first of these does not do what ``cls``, with the others, does upstream."""
    for method, its, upstream in zip(_METHODS, methods, methods[len(_METHODS) :], strict=False):
        if its is not upstream:
            return f"it overrides {method}()"
        foreign = patched(cls, method, import_module("snntorch"))
        if foreign is not None:
            return foreign
    return None


Output = Callable[[Tensor, Any], Tensor]


def _scaled(factor: Tensor, output: Output | None) -> Output:
    """Graded spikes, and what is made of them."""
    return lambda spikes, x: spikes * factor if output is None else output(spikes * factor, x)


@cache
def _with_reset() -> tuple[type, ...]:
    snn = Classes()
    return tuple(getattr(snn, name) for name in STATES)


@cache
def _state_names(cls: Any) -> tuple[str, ...]:
    return next(STATES[base.__name__] for base in cls.__mro__ if base.__name__ in STATES)


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
        if ("subtract", "zero", "none")[int(number(module.reset_mechanism_val))] != reset:
            return "reset_mechanism was changed after construction, so that its two resets differ"
    spec = _spec(synapse, reset, corrected, "state" if cls is snn.Leaky else "sum")
    params = NeuronParams(
        mem=module.beta.clamp(0, 1),
        syn=module.alpha.clamp(0, 1) if synapse else 0.0,
        threshold=module.threshold,
    )
    recurrent = _recurrence(module.recurrent) if cls in (snn.RLeaky, snn.RSynaptic) else {}
    return recurrent if isinstance(recurrent, str) else {"spec": spec, "params": params, **recurrent}


@cache
def _spec(synapse: bool, reset: Any, corrected: bool, scope: Any) -> NeuronSpec:
    timing: Any = "corrected" if corrected else "delayed"
    return NeuronSpec(synapse=synapse, reset=reset, timing=timing, scope=scope, attached=corrected)


def _recurrence(module: Any) -> dict[str, Tensor | None] | str:
    if has_hooks(module):
        return "its recurrent layer has hooks"
    if type(module).forward is nn.Linear.forward:
        return {"recurrent_weight": module.weight, "recurrent_bias": module.bias}
    if type(module).__name__ == "RecurrentOneToOne":
        return {"recurrent_diagonal": module.V}
    return f"its recurrence is a {type(module).__name__}"
