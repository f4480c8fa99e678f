"""What each provider computes with: the network of a problem in this package, snnTorch, Norse and SpikingJelly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.errors import MissingDependencyError
from ..core.spikes import SpikeTrain
from ..core.surrogates import Surrogate
from ..ops.spiking_layer import spiking_layer
from .problem import Config, Problem


class Model(NamedTuple):
    """A network: ``spikes(x)`` -> (T, B, N) of the last layer, from the input form the provider takes.

    With a readout they are its membrane.
    """

    spikes: Callable[[Any], Tensor]
    parameters: list[Tensor]
    x: Any


def _require(module: str, install: str) -> Any:
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a broken installation fails in its own way
        raise MissingDependencyError(
            f"{module} cannot be imported: pip install {install} ({error})"
        ) from error


def _linears(problem: Problem, factors: Sequence[float] | None = None) -> list[nn.Linear]:
    layers = []
    for weight, factor in zip(problem.weights, factors or [1.0] * len(problem.weights), strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            layer.weight.copy_(weight * factor)
            layer.bias.zero_()
        layers.append(layer)
    return layers


def _resets(config: Config, problem: Problem) -> list[Literal["none", "subtract", "zero"]]:
    """Of Leaky, per layer; one that is never reset is the readout."""
    spiking = len(problem.weights) - config.readout
    return [config.reset] * spiking + ["none"] * config.readout


def _interleave(layers: list[nn.Linear], neurons: list[Any]) -> list[nn.Module]:
    return [module for pair in zip(layers, neurons, strict=True) for module in pair]


# --- this package ---


def unrolled(*, events: bool = False, exact: bool = False, backend: str = "auto") -> Callable:
    """A swapped-import snnTorch network run by ``unroll``."""

    def build(config: Config, problem: Problem) -> Model:
        _require("snntorch", "snntorch")
        from .. import snntorch as snn
        from ..fusion.sequence import unroll

        reset = import_module("snntorch.utils").reset
        spike_grad = _spike_grad(config)
        neurons = [
            snn.Leaky(beta=config.beta, spike_grad=spike_grad, init_hidden=True, reset_mechanism=mechanism)
            for mechanism in _resets(config, problem)
        ]
        neurons[-1].output = config.readout
        net = nn.Sequential(*_interleave(_linears(problem), neurons)).to(config.device)
        options: dict[str, Any] = {"backprop_threshold": None if exact else config.window, "backend": backend}
        x = SpikeTrain.from_dense(problem.x) if events else problem.x

        def spikes(x: Any) -> Tensor:
            reset(net)
            out = unroll(net, x, **options)
            if not config.readout:
                return out.spikes
            assert out.mem is not None
            return (1 - config.beta) * out.mem

        return Model(spikes, list(net.parameters()), x)

    return build


def op_network(config: Config, problem: Problem) -> Model:
    """The network as calls of the op: what ``unroll`` does, for where no neuron library is installed."""
    layers = _linears(problem)
    options: dict[str, Any] = op_options(config)
    specs = [NeuronSpec(reset=reset, spiking=reset != "none") for reset in _resets(config, problem)]

    def spikes(x: Any) -> Tensor:
        for k, (layer, spec) in enumerate(zip(layers, specs, strict=True), 1):
            events = k < len(layers)
            x = spiking_layer(x, layer.weight, layer.bias, spec=spec, events=events, **options).spikes
        return (1 - config.beta) * x if config.readout else x

    return Model(spikes, [p for layer in layers for p in layer.parameters()], problem.x)


def op(path: str) -> Callable:
    """The op alone, one layer: over events, over the dense product, or left to choose."""

    def build(config: Config, problem: Problem) -> Model:
        (weight,) = problem.weights
        weight = weight.clone().requires_grad_()
        bias = torch.zeros(weight.shape[0], device=weight.device, requires_grad=True)
        options: dict[str, Any] = op_options(config)

        def spikes(x: Tensor) -> Tensor:
            if path == "events":
                return spiking_layer(SpikeTrain.from_dense(x), weight, bias, **options).spikes
            if path == "dense":
                return spiking_layer(F.linear(x, weight, bias), **options).spikes
            return spiking_layer(x, weight, bias, **options).spikes

        return Model(spikes, [weight, bias], problem.x)

    return build


def _spike_grad(config: Config) -> Any:
    """snnTorch's surrogate."""
    return getattr(import_module("snntorch.surrogate"), config.surrogate)(config.slope)


def op_options(config: Config) -> dict[str, Any]:
    return {
        "params": NeuronParams(mem=config.beta),
        "surrogate": Surrogate(config.surrogate, (config.slope,)),
        "backprop_threshold": config.window,
    }


# --- the others ---


class TutorialNet(nn.Module):
    """snnTorch as its tutorials write it: a loop over steps, every layer called once per step."""

    def __init__(self, config: Config, problem: Problem) -> None:
        super().__init__()
        snntorch = _require("snntorch", "snntorch")
        spike_grad = _spike_grad(config)
        self.fc = nn.ModuleList(_linears(problem))
        self.lif = nn.ModuleList(
            snntorch.Leaky(beta=config.beta, spike_grad=spike_grad, reset_mechanism=reset)
            for reset in _resets(config, problem)
        )
        self.readout, self.beta = config.readout, config.beta

    def forward(self, x: Tensor) -> Tensor:
        mems = [lif.reset_mem() for lif in self.lif]  # type: ignore[operator]
        record = []
        for spikes in x.unbind(0):
            for k, (fc, lif) in enumerate(zip(self.fc, self.lif, strict=True)):
                spikes, mems[k] = lif(fc(spikes), mems[k])
            record.append(mems[-1] if self.readout else spikes)
        return (1 - self.beta) * torch.stack(record) if self.readout else torch.stack(record)


def snntorch_loop(config: Config, problem: Problem) -> Model:
    net = TutorialNet(config, problem).to(config.device)
    return Model(net, list(net.parameters()), problem.x)


def fused_loop(config: Config, problem: Problem) -> Model:
    from ..mode import sparse_mode

    net = TutorialNet(config, problem).to(config.device)

    def spikes(x: Tensor) -> Tensor:
        with sparse_mode(backprop_threshold=config.window):
            return net(x)  # type: ignore[no-any-return]

    return Model(spikes, list(net.parameters()), problem.x)


def compiled_loop(config: Config, problem: Problem) -> Model:
    net = TutorialNet(config, problem).to(config.device)
    return Model(torch.compile(net), list(net.parameters()), problem.x)


def norse_sequence(config: Config, problem: Problem) -> Model:
    norse = _require("norse.torch", "norse")
    # dt tau_mem_inv = 1 - beta, a synapse that decays within a step, and weights larger by 1 / (1 - beta):
    # the membrane of Leaky, apart from the reset to zero
    times = {
        "tau_syn_inv": torch.tensor(1000.0),
        "tau_mem_inv": torch.tensor((1 - config.beta) * 1000),
    }
    p = norse.LIFParameters(**times, v_th=torch.tensor(1.0), alpha=torch.tensor(config.slope))
    factors = [1 / (1 - config.beta)] * len(problem.weights)
    neurons = [norse.LIF(p) for _ in factors]
    if config.readout:  # its current is scaled alike
        factors[-1], neurons[-1] = 1.0, norse.LI(norse.LIParameters(**times))
    net = norse.SequentialState(*_interleave(_linears(problem, factors), neurons)).to(config.device)
    return Model(lambda x: net(x)[0], list(net.parameters()), problem.x)


def spikingjelly_modules(config: Config, problem: Problem) -> Model:
    sj = _require("spikingjelly.activation_based", "'spikingjelly>=2.0.0'")
    neuron, surrogate, functional = (
        import_module(f"{sj.__name__}.{name}") for name in ("neuron", "surrogate", "functional")
    )
    spike = surrogate.ATan if config.surrogate == "atan" else surrogate.SoftSign
    neurons = [
        neuron.LIFNode(
            tau=1 / (1 - config.beta),
            decay_input=False,
            v_threshold=1.0,
            v_reset=0.0 if config.reset == "zero" else None,
            detach_reset=True,
            surrogate_function=spike(alpha=config.slope),
            step_mode="m",
        )
        for _ in problem.weights
    ]
    if config.readout:
        neurons[-1] = neuron.NonSpikingLIFNode(tau=1 / (1 - config.beta))
    net = nn.Sequential(*_interleave(_linears(problem), neurons)).to(config.device)

    def spikes(x: Tensor) -> Tensor:
        functional.reset_net(net)
        out = net(x)
        return torch.stack(out) if config.readout else out

    return Model(spikes, list(net.parameters()), problem.x)


class IndexedLayer(nn.Module):
    """The dense loop as published with [Perez-Nieves & Goodman 2021]: ``h[:, t]`` at every step.

    Under autograd each index makes a zero tensor of the size of ``h``, so its backward grows with T squared.
    """

    def __init__(self, config: Config, weight: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.zero_()
        self.beta, self.spike = config.beta, Surrogate(config.surrogate, (config.slope,))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x.transpose(0, 1))
        mem = torch.zeros_like(h[:, 0])
        record = []
        for t in range(h.shape[1]):
            reset = (mem.detach() > 1).to(mem.dtype)
            mem = self.beta * mem + h[:, t] - reset
            record.append(self.spike(mem - 1))
        return torch.stack(record)
