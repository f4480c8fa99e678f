"""Norse's neurons, threshold functions and states."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..config import active_config, use_config
from ..dynamics import NeuronParams, NeuronSpec, NeuronState
from ..errors import ConfigError
from ..surrogates import Surrogate
from . import Adapter, Neuron, _lock, config_of, hook, installed_version, runner, running, spike


class NorseAdapter(Adapter):
    """Norse >= 1.1."""

    name = "norse"
    package = "norse.torch"

    def available(self) -> tuple[bool, str]:
        return installed_version("norse")

    def install(self) -> None:
        norse, snn = import_module("norse.torch"), import_module("norse.torch.module.snn")
        functions = _functions()
        with _lock:
            for function, method in functions.items():
                if function not in _apply:
                    _apply[function] = function.apply
                    function.apply = staticmethod(_masked_apply(function.apply, method))
        sequences = snn.SNN, snn.SNNRecurrent
        for cls in sequences:
            hook(cls, "forward", _fused_sequence)
        for cls in {*_neurons(), *filter(_is_neuron, vars(norse).values())}.difference(sequences):
            if "forward" in vars(cls):  # else the hook on its base class serves it
                hook(cls, "forward", _in_own_mode)
        hook(norse.SequentialState, "forward", _fused_container)

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
        plain = type(module).forward is lift.forward and not module.is_stateful
        return module.lifted_module if plain else None

    def takes_sequence(self, module: Any) -> bool:
        snn = import_module("norse.torch.module.snn")
        return isinstance(module, snn.SNN | snn.SNNRecurrent | import_module("norse.torch").Lift)

    def neuron(self, module: Any) -> Neuron | str:
        norse = import_module("norse.torch")
        if not _upstream_forward(module):
            return "it overrides forward()"
        if isinstance(module, norse.LILinearCell):
            readout = _readout(module)
            return Neuron(readout.spec, readout.params, input_weight=module.input_weights)
        if getattr(module, "record_states", False):
            return "record_states=True wants the state of every step"
        build = _activations().get(getattr(module, "activation", None))
        if build is None:
            activation = getattr(module, "activation", type(module))
            return f"{getattr(activation, '__name__', activation)} is not in the fused family"
        return build(module)

    def initial_state(self, module: Any, template: Tensor, state: Any) -> tuple[NeuronState, Any]:
        if state is None:
            state = _fallback_state(module, template)
        fields = state._asdict()
        return NeuronState(fields["v"], fields.get("i"), fields.get("z")), state

    def final_state(self, module: Any, state: NeuronState, initial: Any) -> Any:
        values = {"v": state.v, "i": state.i, "z": state.spikes}
        return type(initial)(**{name: values[name] for name in initial._fields})

    def step(self, module: Any, x: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        out, state = module(x, state)
        return out, membrane(state), state


def membrane(state: Any) -> Tensor | None:
    """The membrane in one of Norse's states, which may be nested (refractory neurons)."""
    for name in ("v", "lif", "lif_adex"):
        if hasattr(state, name):
            found = getattr(state, name)
            return found if isinstance(found, Tensor) else membrane(found)
    return None


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
    # LILinearCell makes its state inside forward
    norse = import_module("norse.torch")
    v = module.p.v_leak.detach()
    v.requires_grad = True
    i = template.new_zeros(template.shape[0], module.hidden_size)
    return norse.LIState(v=v, i=i)


# --- neurons: upstream's activation function -> the canonical family ---


def _lif(module: Any, *, recurrent: bool) -> Neuron | str:
    p = module.p
    surrogate = surrogate_of(p.method, p.alpha)
    if isinstance(surrogate, str):
        return surrogate
    weights = {}
    if recurrent:
        weights = {"input_weight": module.input_weights, "recurrent_weight": module.recurrent_weights}
    return Neuron(
        NeuronSpec("euler", True, "value", "immediate", attached=not recurrent),
        NeuronParams(module.dt * p.tau_mem_inv, module.dt * p.tau_syn_inv, p.v_th, p.v_leak, p.v_reset),
        surrogate,
        **weights,
    )


def _box(module: Any) -> Neuron | str:
    p = module.p
    norse = import_module("norse.torch")
    resets: dict[Any, Any] = {norse.reset_value: "value", norse.reset_subtract: "subtract"}
    surrogate = surrogate_of(p.method, p.alpha)
    if p.reset_method not in resets:
        return f"reset_method {getattr(p.reset_method, '__name__', p.reset_method)}"
    if isinstance(surrogate, str):
        return surrogate
    return Neuron(
        NeuronSpec("box", False, resets[p.reset_method], "immediate", attached=True),
        NeuronParams(module.dt * p.tau_mem_inv, 0.0, p.v_th, p.v_leak, p.v_reset),
        surrogate,
    )


def _iaf(module: Any) -> Neuron | str:
    p = module.p
    surrogate = surrogate_of(p.method, p.alpha)
    if isinstance(surrogate, str):
        return surrogate
    spec = NeuronSpec("decay", False, "value", "immediate", attached=True)
    return Neuron(spec, NeuronParams(1.0, 0.0, p.v_th, 0.0, p.v_reset), surrogate)


def _readout(module: Any) -> Neuron:
    p = module.p
    return Neuron(
        NeuronSpec("euler", True, "none", spiking=False),
        NeuronParams(module.dt * p.tau_mem_inv, module.dt * p.tau_syn_inv, leak=p.v_leak),
    )


@cache
def _activations() -> dict[Any, Callable[[Any], Neuron | str]]:
    norse = import_module("norse.torch")
    return {
        norse.lif_feed_forward_step: lambda module: _lif(module, recurrent=False),
        norse.lif_step: lambda module: _lif(module, recurrent=True),
        norse.lif_box_feed_forward_step: _box,
        norse.iaf_feed_forward_step: _iaf,
        norse.li_feed_forward_step: _readout,
    }


# --- threshold functions ---

_METHODS = {"triangle": "triangle", "tanh": "tanh", "circ": "circ", "heavi_erfc": "erfc"}


def surrogate_of(method: str, alpha: Any) -> Surrogate | str:
    """The surrogate of Norse's ``threshold(x, method, alpha)``, or why there is none.

    Example:
        >>> surrogate_of("tanh", 2.0)
        tanh(alpha=2)
    """
    if method == "heaviside":
        return Surrogate("zero")
    try:
        value = float(alpha)
        if method == "super":
            return Surrogate("fast_sigmoid", (value if _super_uses_alpha() else 1.0,))
        if method in _METHODS:
            return Surrogate(_METHODS[method], (value,))
    except (TypeError, ValueError, RuntimeError, ConfigError):  # e.g. one alpha per neuron
        return f"alpha={alpha} of threshold method {method!r}"
    return f"threshold method {method!r}"


@cache
def _super_uses_alpha() -> bool:
    """Norse 1.1.0 ignores alpha, later versions do not: look at the gradient instead of the version."""
    with torch.enable_grad():
        x = torch.tensor(0.5, requires_grad=True)
        function = import_module("norse.torch.functional.superspike").SuperSpike
        upstream = _apply.get(function, function.apply)
        (grad,) = torch.autograd.grad(upstream(x, torch.tensor(100.0)), x)
    return bool(grad < 0.1)  # 1 / 1.5 ** 2 = 0.44 without alpha, 1 / 51 ** 2 with it


@cache
def _functions() -> dict[Any, str]:
    """The autograd Functions behind ``threshold``, and the method each serves."""
    known = import_module("norse.torch.functional.threshold")
    return {
        import_module("norse.torch.functional.superspike").SuperSpike: "super",
        known.Triangle: "triangle",
        known.HeaviTanh: "tanh",
        known.HeaviCirc: "circ",
        known.HeaviErfc: "heavi_erfc",
    }


# --- hooks ---

_apply: dict[Any, Callable[..., Tensor]] = {}  # upstream's own Function.apply


def _masked_apply(upstream: Callable[..., Tensor], method: str) -> Callable[..., Tensor]:
    # every threshold of every Norse neuron ends here; torch.compile reads the Function itself and stays exact
    def apply(x: Tensor, alpha: Any) -> Tensor:
        config = None if torch.compiler.is_compiling() else active_config()
        if config is None:
            return upstream(x, alpha)
        surrogate = surrogate_of(method, alpha)
        if isinstance(surrogate, str):
            surrogate = Surrogate("custom", function=lambda x: upstream(x, alpha))
        return spike(x, lambda x: upstream(x, alpha), surrogate, config)

    return apply


def _in_own_mode(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = None if torch.compiler.is_compiling() else config_of(self)
        if config is None:
            return upstream(self, *args, **kwargs)
        with use_config(config), running(self):
            return upstream(self, *args, **kwargs)

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
        with use_config(config):
            fused = runner().container(self, input_tensor, state)
            return upstream(self, input_tensor, state) if fused is None else fused

    return forward
