"""snnTorch's neurons, spike functions and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import active_config
from ..core.dynamics import NeuronParams, NeuronSpec, NeuronState
from ..core.equations import Equations
from ..core.host import number, waits
from . import active
from .active import config_of
from .base import Adapter, Example, Neuron, runner
from .hooks import has_hooks, hook, placed
from .loading import installed_version
from .snntorch_above import without_graph
from .snntorch_examples import examples
from .snntorch_hooks import MaskedAttribute, masked_method
from .snntorch_kinds import Kind, kind_of, spike_function
from .snntorch_neurons import STATES, Classes, Parts, takes_sequence
from .snntorch_reset import LEFT, LastReset, resets
from .snntorch_surrogates import recognise


class SnnTorchAdapter(Adapter):
    """snnTorch 0.9.4 to 1.0."""

    name = package = "snntorch"
    tested = ("0.9.4", "1.0")
    functions = ("snntorch.surrogate",)
    noted = True

    def available(self) -> tuple[bool, str]:
        return installed_version("snntorch")

    def install(self) -> None:
        snn = Classes()
        for method in ("fire", "fire_inhibition"):
            hook(snn.SpikingNeuron, method, masked_method)
        hook(snn.SpikingNeuron, "mem_reset", without_graph)
        placed.note(snn.SpikingNeuron, "fire", "fire_inhibition", "mem_reset")
        for name in STATES:
            cls = getattr(snn, name)
            hook(cls, "forward", self._recorded_forward)
            if "reset" not in vars(cls):
                cls.reset = LastReset()
            placed.note(cls, "forward", "reset")
        for cls in (snn.DeltaLeaky, snn.LeakyParallel):  # these call spike_grad without fire
            if not isinstance(vars(cls).get("spike_grad"), MaskedAttribute):
                cls.spike_grad = MaskedAttribute()
            placed.note(cls, "spike_grad")

    def repair(self) -> None:
        self.install()

    def examples(self) -> dict[str, Example]:
        return examples()

    def owns(self, module: Any) -> bool:
        return isinstance(module, _neurons())

    def masks(self, module: Any) -> str | None:
        surrogate = recognise(spike_function(module))
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
        kind = kind_of(module)
        parts = kind if isinstance(kind, str) else _parts(module, kind)
        if isinstance(parts, str):
            return parts
        factor = _held(module, "graded_spikes_factor")
        graded = factor.requires_grad or factor.numel() != 1 or number(factor) != 1
        if graded and kind.scales:  # type: ignore[union-attr]
            if "recurrent_weight" in parts or "recurrent_diagonal" in parts:
                return "graded spikes with recurrence"
            # upstream multiplies in fire, and in StateLeaky again after it
            scale = factor * factor if isinstance(module, Classes().StateLeaky) else factor
            parts = {**parts, "output": _scaled(scale, parts.get("output"))}
        return Neuron(surrogate=kind.surrogate, **parts)  # type: ignore[union-attr]

    def kind(self, module: Any) -> Any:
        return kind_of(module)

    # Hidden states are non-persistent buffers in every class: a state is a dict of them by name.

    def initial_state(self, module: Any, neuron: Neuron, template: Tensor, state: Any) -> tuple[Any, Any]:
        given = state is not None or isinstance(module, _delta())
        own = self.read_state(module)
        hidden = own if state is None else state

        def fits(name: str) -> Tensor | None:
            value = hidden.get(name)
            # upstream starts from zeros where the shape differs, e.g. before the first call
            return value if value is not None and (given or value.shape == template.shape) else None

        names = tuple(own)
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
        if not isinstance(module, _state()):
            return None, None
        return "spk" if module.output else None, "mem" if isinstance(module, Classes().LinearLeaky) else None

    def read_state(self, module: Any) -> Any:
        if isinstance(module, _delta()):
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
            if active.idle:
                return upstream(module, *args, **kwargs)
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
            reset = attributes.pop(LEFT, None)
            if active_config() is not None:  # else the step is only measured
                resets.note(module, reset)

    left = (LEFT,)

    def begin(self, module: Any) -> None:
        resets.forget(module)

    def wants_membrane(self, neuron: Neuron) -> bool:
        return isinstance(neuron.spec, NeuronSpec) and neuron.spec.timing == "corrected"

    def note_last(self, module: Any, fired: Callable[[], Tensor] | None, membrane: Tensor | None) -> None:
        # DeltaLeaky is a Leaky whose own forward has no reset
        if isinstance(module, _with_reset()) and not isinstance(module, _delta()):
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


Output = Callable[[Tensor, Any], Tensor]


def _scaled(factor: Tensor, output: Output | None) -> Output:
    """Graded spikes, and what is made of them."""
    return lambda spikes, x: spikes * factor if output is None else output(spikes * factor, x)


@cache
def _neurons() -> tuple[type, ...]:
    snn = Classes()
    return snn.SpikingNeuron, snn.LeakyParallel


@cache
def _delta() -> Any:
    return Classes().DeltaLeaky


@cache
def _state() -> Any:
    return Classes().StateLeaky


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


def _parts(module: Any, kind: Kind) -> Parts | str:
    """Equations or spec, parameters and weights of a neuron."""
    build, reset, synapse = kind.build, kind.reset, kind.synapse
    if build is not None:
        return build(module) if reset is None else build(module, reset)
    corrected = not module.reset_delay and reset != "none"
    if not module.reset_delay:
        if synapse and kind.recurrent:
            return "RSynaptic with reset_delay=False raises in snnTorch"
        if ("subtract", "zero", "none")[int(number(module.reset_mechanism_val))] != reset:
            return "reset_mechanism was changed after construction, so that its two resets differ"
    params = NeuronParams(
        mem=_clamped(_held(module, "beta")),
        syn=_clamped(_held(module, "alpha")) if synapse else 0.0,
        threshold=_held(module, "threshold"),
    )
    parts: Parts = {
        "spec": _spec(synapse, reset, corrected, "sum" if synapse or kind.recurrent else "state"),
        "params": params,
    }
    if not kind.recurrent:
        return parts
    found = _recurrence(module.recurrent)
    return found if isinstance(found, str) else parts | found


def _held(module: Any, name: str) -> Any:
    """An attribute that is mostly a buffer or a parameter, which modules are slow to find."""
    found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


def _clamped(decay: Tensor) -> Tensor:
    """``decay.clamp(0, 1)``; itself where that is the same number and has no gradient."""
    is_number = not decay.dim() and not decay.requires_grad and not waits(decay)
    return decay if is_number and 0 <= float(decay) <= 1 else decay.clamp(0, 1)


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
