"""Rows made of the providers of ``snn-sparse bench``: networks, the published protocol, one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from snn_sparse_plugin.bench.problem import Config
from snn_sparse_plugin.bench.providers import setup

from .compare import Comparison
from .sizes import Sizes

JELLY = "spikingjelly"


def _compare(
    row: str, config: Config, ours: tuple[str, ...], peers: tuple[str, ...], **more: Any
) -> Comparison:
    shape = {
        "T": config.steps,
        "B": config.batch,
        "inputs": config.inputs,
        "layers": list(config.layers),
        "density": config.density,
        "rate": config.rate,
        "window": config.window,
    }
    own, others = ({name: partial(setup, config, name) for name in names} for names in (ours, peers))
    return Comparison(row, shape, own, others, neuron_steps=config.neuron_steps, **more)


def _size(config: Config) -> str:
    return "–".join(map(str, (config.inputs, *config.layers)))


def _net(sizes: Sizes, device: str, T: int) -> tuple[str, Config]:
    config = replace(sizes.net, steps=T, device=device)
    return f"net {_size(config)}, T={T}, B={config.batch}", config


def training(sizes: Sizes, device: str) -> Iterator[Comparison]:
    """Training steps without the optimizer; against the fastest of the other libraries."""
    for T in sizes.net_steps:
        row, config = _net(sizes, device, T)
        ours = ("sparse", "sparse-events")
        fast = (*ours, JELLY)
        figures = ("wall", "device", "graph", "host")
        peers = (JELLY, "snntorch", "norse")
        yield _compare(row, config, ours, peers, figures=figures, device=fast, graph=fast)


def unmodified_loop(sizes: Sizes, device: str) -> Comparison:
    """snnTorch's loop as it is written, in ``sparse_mode()``, at the most steps."""
    row, config = _net(sizes, device, max(sizes.net_steps))
    own = ("sparse-loop",)
    figures = ("wall", "device", "graph", "host")
    return _compare(f"loop, {row}", config, own, ("snntorch",), figures=figures, device=own, graph=own)


def published(sizes: Sizes, device: str) -> Iterator[Comparison]:
    """Backward of the second layer alone, against the dense loop [Perez-Nieves & Goodman 2021]."""
    rates = [(n, sizes.published.rate) for n in sizes.widths] + [(sizes.widths[0], 0.03)]
    for n, rate in rates:
        config = replace(sizes.published, layers=(n, n), rate=rate, device=device)
        row = f"backward of layer 2, N={n}, T={config.steps}, B={config.batch}, {100 * rate:g} % spikes"
        own = ("sparse",)
        yield _compare(
            row, config, own, ("snntorch",), phase="backward", figures=("wall", "device"), device=own
        )


def one_call(sizes: Sizes, device: str) -> Comparison:
    """One call of the op, forward and backward: what Python takes before it returns."""
    config = replace(sizes.layer, device=device)
    row = f"one op call, {_size(config)}, T={config.steps}, B={config.batch}"
    own = ("auto", "events")
    return _compare(row, config, own, (JELLY,), figures=("host", "wall"), device=own, graph=own)


def density(sizes: Sizes, device: str) -> Iterator[Comparison]:
    """One layer over input density: where the dense product wins."""
    for share in sizes.densities:
        config = replace(sizes.layer, density=share, device=device)
        row = f"layer {_size(config)}, T={config.steps}, B={config.batch}, input {100 * share:g} %"
        own = ("auto", "events", "dense")
        yield _compare(row, config, own, (JELLY,), figures=("wall", "device"), device=(*own, JELLY))


def compiled(sizes: Sizes, device: str) -> Iterator[Comparison]:
    """Training steps against ``torch.compile`` of snnTorch's loop, whose compilation takes long: few steps first."""
    for T in sizes.compiled:
        row, config = _net(sizes, device, T)
        yield _compare(f"compile, {row}", config, ("sparse",), ("compile", "snntorch"))


def weighed(sizes: Sizes, device: str) -> Comparison:
    """The network at the most steps, masked and exact, for its memory."""
    row, config = _net(sizes, device, max(sizes.net_steps))
    ours = ("sparse", "sparse-events", "sparse-exact", "sparse-loop")
    return _compare(row, config, ours, (JELLY, "snntorch", "norse"), figures=("peak", "kept"))
