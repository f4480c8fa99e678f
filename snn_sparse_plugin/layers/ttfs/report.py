"""What a spiking network costs: spikes, latency, operations, and energy relative to a reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError, InputError
from .simulator import Simulator

HARDWARE = {"TrueNorth": (0.4, 0.6), "SpiNNaker": (0.64, 0.36)}
"""Shares of dynamic and static energy (Park & Yoon, arXiv 2106.02568)."""


@dataclass(frozen=True)
class EnergyReference:
    """The network whose energy is 1: spikes per sample and steps."""

    spikes: float
    steps: float
    name: str = ""


# time-switch-coding networks, the reference of the published comparison
REFERENCES = {
    "tsc-cifar10": EnergyReference(0.193e6, 512, "TSC, VGG-16, CIFAR-10"),
    "tsc-cifar100": EnergyReference(0.170e6, 512, "TSC, VGG-16, CIFAR-100"),
}


def energy(spikes: float, steps: float, reference: EnergyReference) -> dict[str, float]:
    """Energy of a sample on each :data:`HARDWARE`, in units of the reference's.

    ``E = spikes / spikes_ref · E_dyn + steps / steps_ref · E_sta``.

    Raises:
        ConfigError: a reference without spikes or steps.

    Example:
        >>> {k: round(v, 3) for k, v in energy(67.4e3, 544, REFERENCES["tsc-cifar10"]).items()}
        {'TrueNorth': 0.777, 'SpiNNaker': 0.606}
    """
    if not (reference.spikes > 0 and reference.steps > 0):
        raise ConfigError(f"an energy reference has spikes and steps > 0, got {reference}.")
    return {
        name: spikes / reference.spikes * dynamic + steps / reference.steps * static
        for name, (dynamic, static) in HARDWARE.items()
    }


@dataclass(frozen=True)
class LayerReport:
    """One layer, per sample. ``rate``: spikes per neuron and step of its window; ``sparsity``: per neuron."""

    name: str
    neurons: int
    spikes: float
    rate: float
    sparsity: float
    synops: float
    macs: int
    silent: bool


@dataclass(frozen=True)
class TTFSReport:
    """What :meth:`TTFSNetwork.report` counts, means over the samples; ``str(report)`` is a table.

    ``spikes`` includes the input's, ``hidden_spikes`` does not. ``synops``: weights added, ``macs``: multiplications
    of the dense network. ``energy`` is relative to ``reference``. ``accuracy`` is None without labels.
    """

    samples: int
    layers: tuple[LayerReport, ...]
    spikes: float
    hidden_spikes: float
    latency: int
    synops: float
    macs: int
    energy: dict[str, float]
    reference: EnergyReference
    accuracy: float | None = None
    agreement: float | None = None  # same class as without early firing

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def silent(self) -> list[str]:
        """Layers in which no neuron fired for any sample."""
        return [layer.name for layer in self.layers if layer.silent]

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.layers))
        lines = [
            f"{'layer':<{width}}  {'neurons':>9} {'spikes':>10} {'rate':>8} {'sparsity':>8} {'synops':>12} {'MACs':>12}"
        ]
        for row in self.layers:
            fired = (
                f"{row.spikes:>10.1f} {100 * row.rate:>7.2f}% {100 * row.sparsity:>7.1f}%"
                if row.name != "readout"
                else " " * 28
            )
            synops = f"{row.synops:>12.0f} {row.macs:>12}" if row.macs else ""
            lines.append(f"{row.name:<{width}}  {row.neurons:>9} {fired} {synops}".rstrip())
        gain = f", {self.macs / self.synops:.1f} times fewer operations than MACs" if self.synops else ""
        lines.append(
            f"{self.samples} samples: {self.spikes:.1f} spikes ({self.hidden_spikes:.1f} hidden) and "
            f"{self.synops:.0f} synaptic operations each, {self.latency} steps{gain}"
        )
        against = self.reference.name or f"{self.reference.spikes:g} spikes in {self.reference.steps:g} steps"
        lines.append(
            "energy: " + ", ".join(f"{k} {v:.3g}" for k, v in self.energy.items()) + f" of {against}"
        )
        if self.accuracy is not None:
            lines.append(f"accuracy {100 * self.accuracy:.2f} %")
        if self.agreement is not None:
            lines.append(f"same class as without early firing: {100 * self.agreement:.2f} %")
        if self.silent:
            lines.append(f"silent for every sample: {', '.join(self.silent)}")
        return "\n".join(lines)


def report(
    net: Simulator,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    reference: EnergyReference | str = "tsc-cifar10",
    early_firing: int | None = None,
    batch_size: int = 256,
) -> TTFSReport:
    """See :meth:`TTFSNetwork.report`.

    Args:
        labels: (B,), for the accuracy.
        reference: the energy's unit, one of :data:`REFERENCES` or your own.
        early_firing: as in :meth:`TTFSNetwork.run`; its effect on the decisions is measured.
    """
    if not len(x):
        raise InputError("a report needs at least one sample.")
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.shape != x.shape[:1]:
            raise InputError(
                f"labels are (B,) = ({len(x)},), one for each sample, got {tuple(labels.shape)}."
            )
    if isinstance(reference, str):
        if reference not in REFERENCES:
            raise ConfigError(
                f"no energy reference {reference!r}; known: {', '.join(REFERENCES)}, or an EnergyReference."
            )
        reference = REFERENCES[reference]
    spikes: dict[str, float] = {}
    synops: dict[str, float] = {}
    right, same = 0, 0
    for begin in range(0, len(x), batch_size):
        batch = x[begin : begin + batch_size].to(net.encoder)
        run = net.run(batch, early_firing=early_firing)
        for sums, counted in ((spikes, run.spikes), (synops, run.synops)):
            for name, count in counted.items():
                sums[name] = sums.get(name, 0.0) + float(count.sum())
        decided = run.output.argmax(-1)
        if labels is not None:
            right += int((decided == labels[begin : begin + batch_size].to(decided.device)).sum())
        if early_firing is not None:
            same += int((decided == net.run(batch).output.argmax(-1)).sum())
    n, rows = len(x), []
    sizes = [("input", net.input_neurons, net.encoder.shape[1], 0)]
    sizes += [(s.name, s.neurons, s.window, s.macs) for s in net.stages]
    for name, neurons, window, macs in sizes:
        fired = spikes.get(name, 0.0) / n
        rows.append(
            LayerReport(
                name if window else "readout",
                neurons,
                fired,
                fired / (neurons * window) if window else 0.0,
                fired / neurons,
                synops.get(name, 0.0) / n,
                macs,
                bool(window) and fired == 0,
            )
        )
    total = sum(spikes.values()) / n
    return TTFSReport(
        n,
        tuple(rows),
        total,
        total - spikes["input"] / n,
        net.latency(early_firing),
        sum(synops.values()) / n,
        sum(s.macs for s in net.stages),
        energy(total, net.latency(early_firing), reference),
        reference,
        None if labels is None else right / n,
        None if early_firing is None else same / n,
    )
