"""Who computes it: the table of providers, and ``setup`` that makes the steps measured for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError, UnsupportedError
from ..core.spikes import SpikeTrain, coordinates
from ..ops.spiking_layer import spiking_layer
from .measure import Steps
from .models import (
    IndexedLayer,
    Model,
    TutorialNet,
    compiled_loop,
    fused_loop,
    norse_sequence,
    op,
    op_network,
    op_options,
    snntorch_loop,
    spikingjelly_modules,
    unrolled,
)
from .problem import Config, Problem, make_problem


@dataclass(frozen=True)
class Provider:
    """A row of the table. ``library`` is the distribution whose version the row carries."""

    build: Callable[[Config, Problem], Model]
    library: str
    about: str
    ops: tuple[str, ...] = ("network",)
    opt_in: bool = False


def setup(config: Config, provider: str) -> Steps:
    """The steps of a provider; the same ones are timed, counted in bytes and run for peak memory.

    Raises:
        MissingDependencyError: the provider's library is not installed.
        UnsupportedError: the provider does not do this op.
    """
    found = get(provider)
    if config.op not in found.ops:
        raise UnsupportedError(f"provider {provider!r} does {', '.join(found.ops)}, not {config.op}.")
    problem = make_problem(config)
    if config.op == "s3gd":
        return _second_layer(config, problem, provider)
    model = found.build(config, problem)

    def forward() -> Tensor:
        spikes = model.spikes(model.x)
        return F.cross_entropy(logits(config, spikes), problem.target) if config.op == "network" else spikes

    def backward(out: Tensor) -> None:
        out.backward(None if config.op == "network" else problem.grad)

    return Steps(forward, backward, model.parameters, [*model.parameters, *_tensors(model.x)])


def logits(config: Config, spikes: Tensor) -> Tensor:
    """What the loss of a network is of: spike counts, or the largest membrane of a readout."""
    return spikes.amax(0) if config.readout else spikes.sum(0)


def get(name: str) -> Provider:
    """The provider of that name."""
    if name not in PROVIDERS:
        raise ConfigError(f"no provider {name!r}; known: {', '.join(PROVIDERS)}.")
    return PROVIDERS[name]


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, SpikeTrain):
        return x.tensors()
    return [x]


def _second_layer(config: Config, problem: Problem, provider: str) -> Steps:
    """Backward of the second layer alone: weight, bias and, where layer 1 is active, input gradients.

    Both get the same random gradient of the output spikes, the sparse one where the output is active.
    """
    first, second = problem.weights
    options = op_options(config) | {"min_active": 0}  # the publication has no guard
    train = spiking_layer(problem.x, first.clone().requires_grad_(), events=True, **options).spikes
    weight = second.clone().requires_grad_()
    bias = torch.zeros(second.shape[0], device=second.device, requires_grad=True)

    if provider == "sparse":
        kept = [*train.tensors(), *(train.active or ())]

        def forward() -> Any:
            return spiking_layer(train, weight, bias, events=True, **options).spikes

        probe = forward()  # where the output is active does not change from run to run
        grad = problem.grad
        if probe.active is not None:
            rows, columns = coordinates(*probe.active)
            grad = grad[rows % config.steps, rows // config.steps, columns]

        def backward(out: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out.carrier, (weight, bias, train.carrier), grad)

    else:
        net: nn.Module
        if provider == "indexed":
            net = IndexedLayer(config, second)
            linear = net.fc
        else:
            alone = replace(config, inputs=first.shape[0], layers=config.layers[1:])
            net = TutorialNet(alone, problem._replace(weights=(second,))).to(config.device)
            linear = net.fc[0]  # type: ignore[assignment]
        weight, bias = linear.weight, linear.bias
        x = train.to_dense().detach().requires_grad_()
        kept = [x]

        def forward() -> Any:
            return net(x)  # type: ignore[no-any-return]

        def backward(out: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, (weight, bias, x), problem.grad)

    return Steps(forward, backward, [weight, bias], [weight, bias, *kept])


PROVIDERS: dict[str, Provider] = {
    "sparse": Provider(unrolled(), "snn-sparse-plugin", "unroll, dense input", ("network", "s3gd")),
    "sparse-events": Provider(unrolled(events=True), "snn-sparse-plugin", "unroll, SpikeTrain input"),
    "sparse-exact": Provider(unrolled(exact=True), "snn-sparse-plugin", "unroll, backprop_threshold=None"),
    "sparse-op": Provider(op_network, "snn-sparse-plugin", "the op layer by layer", opt_in=True),
    "sparse-loop": Provider(
        fused_loop, "snn-sparse-plugin", "snnTorch's tutorial loop in sparse_mode()", opt_in=True
    ),
    "events": Provider(op("events"), "snn-sparse-plugin", "the op over events", ("layer",)),
    "dense": Provider(op("dense"), "snn-sparse-plugin", "dense product, then the op", ("layer",)),
    "auto": Provider(op("auto"), "snn-sparse-plugin", "the op's own choice", ("layer",)),
    "snntorch": Provider(snntorch_loop, "snntorch", "tutorial loop", ("network", "layer", "s3gd")),
    "norse": Provider(norse_sequence, "norse", "sequence modules", ("network", "layer")),
    "spikingjelly": Provider(
        spikingjelly_modules, "spikingjelly", "multi-step modules", ("network", "layer")
    ),
    "compile": Provider(
        compiled_loop, "snntorch", "tutorial loop under torch.compile", ("network", "layer"), opt_in=True
    ),
    "indexed": Provider(
        snntorch_loop, "torch", "dense loop as published: h[:, t] at every step", ("s3gd",), opt_in=True
    ),
    "reference": Provider(
        unrolled(backend="reference"), "snn-sparse-plugin", "unroll, reference backend", opt_in=True
    ),
}
