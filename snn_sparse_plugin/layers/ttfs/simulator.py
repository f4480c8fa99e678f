"""Layers of single spikes, and their two simulators."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, InputError
from ...ops.ttfs import SILENT, ttfs
from ...ops.ttfs import reference as coding
from .checks import check_order, check_stage
from .events import simulate
from .neuron import check_intensities
from .stages import Stage, integrate

SIMULATORS = ("event", "clock")


class TTFSRun(NamedTuple):
    """What a simulation gives.

    ``output``: (B, classes), the readout's membrane, or the decoded spikes of the last layer where there is no
    readout. ``times``: spike times (B, …) by layer, uint8, 255 where silent, after a max pooling that follows
    the neurons; the input is layer ``"input"``. ``membranes``: (B, …) after the last input, by layer. Both are
    empty unless asked for. ``spikes``, ``synops``: (B,) by layer, int64; ``synops`` is empty on the clock.
    ``latency``: steps from the first input to the output.
    """

    output: Tensor
    times: dict[str, Tensor]
    membranes: dict[str, Tensor]
    spikes: dict[str, Tensor]
    synops: dict[str, Tensor]
    latency: int


class Simulator:
    """The part of a :class:`TTFSNetwork` that runs spikes: encoding, and the simulation of its stages."""

    def __init__(
        self,
        encoder: Tensor,
        stages: list[Stage],
        input_shape: tuple[int, ...],
        source: nn.Module | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.encoder, self.stages, self.input_shape = encoder, stages, tuple(input_shape)
        self.source, self.exact = source, exact

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def windows(self) -> list[int]:
        """Steps in the window of the input and of every spiking layer."""
        return [self.encoder.shape[1], *(s.window for s in self.stages if s.table is not None)]

    @property
    def input_neurons(self) -> int:
        return math.prod(self.input_shape)

    def encode(self, x: Tensor) -> Tensor:
        """Spike times of intensities (B, …): uint8 of x's shape.

        Raises:
            InputError: another shape, NaN, or values outside [0, 1].
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or tuple(x.shape[1:]) != self.input_shape:
            what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"the network takes floating intensities (B, {', '.join(map(str, self.input_shape))}), got {what}."
            )
        check_intensities(x, always=True)
        unused = self.encoder.new_ones(())  # a forward alone needs no parameters
        return ttfs(x.detach().to(self.encoder), self.encoder, unused, unused)[1]

    def latency(self, early_firing: int | None = None) -> int:
        """Steps until the readout is complete: one window for the input and one for every spiking layer.

        With ``early_firing`` a layer's window begins that many steps after the one before it.
        """
        windows = self.windows
        if early_firing is None:
            return sum(windows)
        return sum(min(early_firing, w) for w in windows[:-1]) + windows[-1]

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x).output

    @torch.no_grad()
    def run(
        self,
        x: Tensor | None = None,
        *,
        simulator: str | None = None,
        early_firing: int | None = None,
        record: bool = False,
        times: Tensor | None = None,
    ) -> TTFSRun:
        """Simulate a batch.

        Args:
            x: intensities (B, …) in [0, 1].
            simulator: ``"event"``, the default: one spike at a time, compiled for CPU, in Triton on a GPU; ``"clock"``:
                step by step, any device. Both give the same spikes up to the order of floating sums.
            early_firing: a layer begins to fire this many steps after its inputs do, 1…window: windows overlap, the
                latency falls, and spikes that come later than their neuron's own are lost. None waits for all.
            record: also keep spike times and membranes.
            times: spike times of the input instead of ``x``.

        Raises:
            InputError: a batch of another shape, NaN, or intensities outside [0, 1]; layers that do not fit together.
            ConfigError: an unknown simulator, or early firing outside its range.
        """
        check_order(self.encoder, self.stages)
        simulator = simulator or "event"
        if simulator not in SIMULATORS:
            raise ConfigError(f"simulators are {', '.join(SIMULATORS)}; got {simulator!r}.")
        longest = max(self.windows)
        whole = isinstance(early_firing, int) and not isinstance(early_firing, bool)
        if early_firing is not None and not (whole and 1 <= early_firing <= longest):
            raise ConfigError(
                f"early_firing is a number of steps from 1 to the window, {longest}; got {early_firing!r}."
            )
        if (x is None) == (times is None):
            raise InputError("run takes intensities x, or their spike times, one of them.")
        arriving = self._checked(times) if x is None else self.encode(x)
        values = self.encoder[1]
        run = TTFSRun(values, {}, {}, {"input": _count(arriving)}, {}, self.latency(early_firing))
        if record:
            run.times["input"] = arriving
        u = values
        for stage in self.stages:
            window = values.numel()
            first_fire = window if early_firing is None else min(early_firing, window)
            if simulator == "event":
                u, fired, spikes, synops = simulate(stage, arriving, values, first_fire)
                run.synops[stage.name] = synops
            else:
                check_stage(stage, arriving.shape[1:], values)
                u, fired = integrate(stage, arriving, values, first_fire)
                spikes = _count(fired) if fired is not None else torch.zeros(len(u), dtype=torch.int64)
            if record:
                run.membranes[stage.name] = u
            if fired is not None:
                assert stage.table is not None
                run.spikes[stage.name] = spikes
                arriving, values = stage.passed_on(fired), stage.table[1]
                if record:
                    run.times[stage.name] = arriving
        last = self.stages[-1]
        return run._replace(output=u if last.table is None else coding.decode(arriving, last.table))

    def _checked(self, times: Any) -> Tensor:
        window = self.encoder.shape[1]
        if (
            not isinstance(times, Tensor)
            or times.dtype != torch.uint8
            or tuple(times.shape[1:]) != self.input_shape
        ):
            raise InputError(
                f"spike times of the input are uint8 (B, {', '.join(map(str, self.input_shape))}), "
                f"got {f'{times.dtype} {tuple(times.shape)}' if isinstance(times, Tensor) else type(times).__name__}."
            )
        if bool(((times >= window) & (times != SILENT)).any()):
            raise InputError(
                f"a spike time is 0…{window - 1}, or {SILENT} for none; got one of {int(times[times != SILENT].max())}."
            )
        return times


def _count(times: Tensor) -> Tensor:
    return (times != SILENT).flatten(1).sum(1)
