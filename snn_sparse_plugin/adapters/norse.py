"""Norse's neurons, threshold functions and states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..core import tally
from ..core.config import active_config, use_config
from ..core.dynamics import NeuronState
from ..core.equations import Equations
from ..core.surrogates import Surrogate, plain_apply
from . import active
from .active import config_of, count_whole, here, spike, uncut
from .base import Adapter, Example, Neuron, runner
from .counting import running
from .hooks import as_hook, hook, is_hook, lock, patched, placed
from .loading import installed_version
from .norse_examples import examples
from .norse_neurons import WHY_NOT, builders
from .norse_products import with_products
from .norse_surrogates import replaced, surrogate_of, threshold_functions, upstream_apply


class NorseAdapter(Adapter):
    """Norse 1.1."""

    name = "norse"
    package = "norse.torch"
    tested = ("1.1", "1.1")
    functions = ("norse.torch.functional.threshold",)
    noted = True

    def available(self) -> tuple[bool, str]:
        return installed_version("norse")

    def install(self) -> None:
        norse, snn = import_module("norse.torch"), import_module("norse.torch.module.snn")
        functions = threshold_functions()
        with lock:
            for function, method in functions.items():
                if not is_hook(function.apply):
                    upstream_apply[function] = function.apply
                    function.apply = staticmethod(as_hook(_masked_apply(function, function.apply, method)))
                placed.note(function, "apply")
        sequences = dict.fromkeys((snn.SNN, snn.SNNRecurrent), _fused_sequence)
        steps = dict.fromkeys(_with_steps(), self._recorded_forward)
        for cls, wrap in {**sequences, **steps, norse.SequentialState: _fused_container}.items():
            hook(cls, "forward", wrap)
            placed.note(cls, "forward")

    def repair(self) -> None:
        self.install()

    def examples(self) -> dict[str, Example]:
        return examples()

    def owns(self, module: Any) -> bool:
        return isinstance(module, _neurons())

    def masks(self, module: Any) -> str | None:
        p = getattr(module, "p", None)
        if isinstance(module, _readouts()):
            return "a readout has no threshold"
        if getattr(p, "method", None) == "heaviside":
            return "its threshold has no gradient"
        return None

    def container(self, module: Any) -> bool:
        return isinstance(module, import_module("norse.torch").SequentialState)

    def stateful(self, container: Any, index: int) -> bool:
        return self.container(container) and container.stateful_layers[index]

    def unwrap(self, module: Any) -> nn.Module | None:
        lift = import_module("norse.torch").Lift
        plain = type(module).forward is lift.forward and "forward" not in vars(module)
        return module.lifted_module if plain and not module.is_stateful else None

    def takes_sequence(self, module: Any) -> bool:
        snn = import_module("norse.torch.module.snn")
        return isinstance(module, snn.SNN | snn.SNNRecurrent | import_module("norse.torch").Lift)

    def neuron(self, module: Any) -> Neuron | str:
        norse = import_module("norse.torch")
        if type(module).__name__ in WHY_NOT:
            return WHY_NOT[type(module).__name__]
        owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        foreign = patched(owner, "forward", norse) if owner.__module__.startswith("norse.") else None
        if foreign is not None:
            return foreign
        if not _upstream_forward(module):
            return "it overrides forward()"
        if getattr(module, "record_states", False):
            return "record_states=True wants the state of every step"
        activation: Any = getattr(module, "activation", owner)
        other = replaced()
        if other is not None and not isinstance(module, _readouts()):
            return other
        build = builders().get(activation)
        if build is None:
            named = getattr(activation, "__name__", str(activation))
            if "adjoint" in named:
                return "upstream's own adjoint replaces the gradient"
            return WHY_NOT.get(named, f"{named} is in no fused family")
        return build(module)

    def initial_state(self, module: Any, neuron: Neuron, template: Tensor, state: Any) -> tuple[Any, Any]:
        if state is None:
            state = _fallback_state(module, template)
        fields = _leaves(state)
        spikes = fields.pop("z", None)
        if isinstance(neuron.spec, Equations):
            return {**fields, **({} if spikes is None else {"spikes": spikes})}, state
        return NeuronState(fields["v"], fields.get("i"), spikes), state

    def final_state(self, module: Any, state: Any, initial: Any) -> Any:
        if isinstance(state, NeuronState):
            return _rebuilt(initial, {"v": state.v, "i": state.i, "z": state.spikes})
        return _rebuilt(initial, {**state, "z": state.get("spikes")})

    def first_state(self, module: Any, like: Any, B: int) -> Any:
        v = membrane(like)
        assert v is not None
        steps = (1,) if self.takes_sequence(module) else ()
        return _fallback_state(module, v.new_zeros(*steps, B, *v.shape[1:]))

    def bare(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        return upstream.__wrapped__  # type: ignore[attr-defined, no-any-return]

    def _recorded_forward(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        in_own_mode = _in_own_mode(upstream)

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            if active.idle:
                return upstream(module, *args, **kwargs)
            config = None if torch.compiler.is_compiling() else config_of(module)
            if config is None or not config.fuse_time:
                return in_own_mode(module, *args, **kwargs)
            return runner().step(self, module, in_own_mode, args, kwargs, config)

        return forward

    def read_call(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], Any] | None:
        if kwargs or len(args) != 2:
            names = ("input_tensor", "state")
            given = dict(zip(names, args, strict=False)) | kwargs
            if not set(given) <= set(names) or len(args) > 2 or "input_tensor" not in given:
                return None
            args = (given["input_tensor"], given.get("state"))
        x, state = args
        if state is None:
            if not isinstance(x, Tensor) or type(module).__name__ in WHY_NOT or self.takes_sequence(module):
                return None
            state = _fallback_state(module, x)
        if not hasattr(state, "_asdict"):
            return None
        return x, _leaves(state), state

    def next_state(self, module: Any, args: tuple[Any, ...]) -> Sequence[Any] | None:
        if len(args) != 2 or not isinstance(args[1], tuple):
            return None
        # a flat state is its own list of tensors
        return args[1] if all(isinstance(leaf, Tensor) for leaf in args[1]) else None

    def write_call(self, module: Any, out: Tensor, leaves: Mapping[str, Tensor], like: Any) -> Any:
        return out, _rebuilt(like, leaves)

    def leaves(self, state: Any) -> dict[str, Any]:
        return _leaves(state)

    def state_of(self, leaves: dict[str, Any], like: Any) -> Any:
        return _rebuilt(like, leaves)

    def output_leaf(self, module: Any, neuron: Neuron) -> str | None:
        return "z" if neuron.spec.spiking else "v"

    def membrane_leaf(self) -> str:
        return "v"

    def upstream_step(
        self, upstream: Callable[..., Any], module: Any, x: Tensor, leaves: dict[str, Any], like: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        out, state = upstream(module, x, _rebuilt(like, leaves))
        return out, _leaves(state)

    def step(self, module: Any, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        out, state = module(x, state)
        # a sequence module's state is that of the last step alone
        return out, None if self.takes_sequence(module) else membrane(state), state


def membrane(state: Any) -> Tensor | None:
    """The membrane in one of Norse's states, which may be nested (refractory neurons)."""
    for name in ("v", "lif", "lif_adex"):
        if hasattr(state, name):
            found = getattr(state, name)
            return found if isinstance(found, Tensor) else membrane(found)
    return None


def _leaves(state: Any) -> dict[str, Any]:
    """The tensors of a state by field name; those of refractory neurons are nested."""
    found: dict[str, Any] = {}
    for name, value in state._asdict().items():
        found.update(_leaves(value) if hasattr(value, "_asdict") else {name: value})
    return found


def _rebuilt(like: Any, values: Mapping[str, Any]) -> Any:
    """A state of the same type with other tensors."""
    fields = {
        name: _rebuilt(value, values) if hasattr(value, "_asdict") else values[name]
        for name, value in like._asdict().items()
    }
    return type(like)(**fields)


@cache
def _neurons() -> tuple[type, ...]:
    snn, norse = import_module("norse.torch.module.snn"), import_module("norse.torch")
    return (
        snn.SNNCell,
        snn.SNNRecurrentCell,
        snn.SNN,
        snn.SNNRecurrent,
        norse.LILinearCell,
        norse.CobaLIFCell,
        norse.LIFCorrelation,
    )


@cache
def _with_steps() -> tuple[type, ...]:
    """The classes whose forward takes a single step; that of the others is inherited, and so is its hook."""
    norse, snn = import_module("norse.torch"), import_module("norse.torch.module.snn")
    found = {*_neurons(), *filter(_is_neuron, vars(norse).values())}
    return tuple(cls for cls in found - {snn.SNN, snn.SNNRecurrent} if "forward" in vars(cls))


def _is_neuron(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, _neurons())


@cache
def _readouts() -> tuple[type, ...]:
    norse = import_module("norse.torch")
    return norse.LI, norse.LICell, norse.LILinearCell, norse.LIBoxCell


def _upstream_forward(module: Any) -> bool:
    forwards = [vars(cls)["forward"] for cls in _neurons() if "forward" in vars(cls)]
    return "forward" not in vars(module) and type(module).forward in forwards


def _fallback_state(module: Any, template: Tensor) -> Any:
    if hasattr(module, "state_fallback"):
        return module.state_fallback(template)
    # these make their state inside forward
    norse = import_module("norse.torch")
    if isinstance(module, norse.CobaLIFCell):
        z, v, g_e, g_i = template.new_zeros(4, template.shape[0], module.hidden_size).unbind(0)
        state = import_module("norse.torch.functional.coba_lif").CobaLIFState
        return state(z=z, v=v.clone().requires_grad_(), g_e=g_e, g_i=g_i)
    v = module.p.v_leak.detach()
    v.requires_grad = True
    i = template.new_zeros(template.shape[0], module.hidden_size)
    return norse.LIState(v=v, i=i)


# --- hooks ---

_NUMBERS = Tensor, nn.Parameter, float, int


def _masked_apply(function: Any, upstream: Callable[..., Tensor], method: str) -> Callable[..., Tensor]:
    torchs = getattr(upstream, "__func__", None) is torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
    direct = plain_apply(function) if torchs else upstream

    # every threshold of every Norse neuron ends here; torch.compile reads the Function itself and stays exact
    def apply(x: Tensor, alpha: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return upstream(x, alpha)
        whole = here.whole
        if whole is not None:
            plain = type(x) is Tensor and type(alpha) in _NUMBERS
            return count_whole(whole[1], direct(x, alpha) if plain else upstream(x, alpha))
        config = active_config()
        if config is None:
            return upstream(x, alpha)
        way = uncut(config, x)
        if way is not None:
            tally.current().count(way)
            return upstream(x, alpha)
        surrogate = surrogate_of(method, alpha)
        if isinstance(surrogate, str):
            surrogate = Surrogate("custom", function=lambda x: upstream(x, alpha), pure=False)
        return spike(x, lambda x: upstream(x, alpha), surrogate, config)

    return apply


def _in_own_mode(upstream: Callable[..., Any]) -> Callable[..., Any]:
    step = with_products(upstream)

    @wraps(step)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = None if torch.compiler.is_compiling() else config_of(self)
        if config is None:
            return upstream(self, *args, **kwargs)
        with running(self):
            if config is active_config():
                return step(self, *args, **kwargs)
            with use_config(config):
                return step(self, *args, **kwargs)

    return forward


def _fused_sequence(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input_tensor: Tensor, state: Any = None) -> Any:
        config = None if torch.compiler.is_compiling() else config_of(self)
        if config is None:
            return upstream(self, input_tensor, state)
        with use_config(config), running(self):
            fused = runner().neuron(self, input_tensor, state)
            return upstream(self, input_tensor, state) if fused is None else fused

    return forward


def _fused_container(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input_tensor: Tensor, state: Any = None) -> Any:
        config = None if torch.compiler.is_compiling() else config_of(self)
        if config is None or self.return_hidden:
            return upstream(self, input_tensor, state)
        with nullcontext() if config is active_config() else use_config(config):
            one_step = type(input_tensor) is Tensor and input_tensor.dim() < 3
            fused = None if one_step else runner().container(self, input_tensor, state)
            return upstream(self, input_tensor, state) if fused is None else fused

    return forward
