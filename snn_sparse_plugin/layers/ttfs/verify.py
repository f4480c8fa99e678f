"""Spike for spike: the spiking network against the trained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import InputError
from ...ops.ttfs import SILENT
from ...ops.ttfs import reference as coding
from .neuron import TTFS, TTFSEncoder
from .simulator import Simulator
from .stages import Stage


@dataclass(frozen=True)
class VerifyReport:
    """What :meth:`TTFSNetwork.verify` found.

    ``equal``: fraction of spike times of hidden neurons exactly equal, silence included; ``compared`` how many.
    ``worst_membrane``: largest difference of a pre-activation or of the readout. ``same_class``: fraction of samples
    with the same largest output. ``first``: the first neuron that differs and why, or None.
    """

    equal: float
    differing: int
    compared: int
    samples: int
    worst_membrane: float
    same_class: float
    exact_grid: bool
    first: str | None

    def __str__(self) -> str:
        grid = "on the exact grid, " if self.exact_grid else ""
        end = f"; first: {self.first}" if self.first else ""
        return (
            f"{100 * self.equal:.5f} % of {self.compared} spike times equal ({self.differing} differ) {grid}over "
            f"{self.samples} samples, worst membrane difference {self.worst_membrane:.2g}, "
            f"same class {100 * self.same_class:.2f} %{end}"
        )


def _trained(net: Simulator, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Pre-activations and spike times by layer, and the output, of the network as it was trained."""
    if net.source is None:
        return _analogue(net, x)
    found: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: TTFS, inputs: tuple[Tensor, ...]) -> None:
            uses = 1 + sum(known.split("#")[0] == name for known in found)
            use = name if uses == 1 else f"{name}#{uses}"
            found[use] = inputs[0].detach()
            times[use] = coding.encode(found[use], module.table(found[use].dtype))

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in net.source.named_modules()
        if isinstance(module, TTFS) and not isinstance(module, TTFSEncoder)
    ]
    try:
        out = net.source(x)
    finally:
        for handle in handles:
            handle.remove()
    return found, times, out


def _analogue(net: Simulator, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The same of the stages' weights, all inputs of a layer summed at once."""
    membranes: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    value, _ = coding.forward(x.to(net.encoder), net.encoder)
    for stage in net.stages:
        value = value.reshape(len(value), *stage.in_shape)
        for pool in stage.before:
            if pool.kind == "max":
                value = F.max_pool2d(value, pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil)
        value = membranes[stage.name] = stage.synapses(value, bias=True)
        if stage.table is not None:
            value, fired = coding.forward(value, stage.table)
            times[stage.name] = stage.passed_on(fired)
            value = coding.decode(times[stage.name], stage.table)
    return membranes, times, value


@torch.no_grad()
def verify(
    net: Simulator,
    x: Tensor,
    simulator: str | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> VerifyReport:
    """See :meth:`TTFSNetwork.verify`."""
    if not len(x):
        raise InputError("verify needs at least one sample.")
    differing, compared, same, worst, first = 0, 0, 0, 0.0, None
    for begin in range(0, len(x), batch_size):
        batch = x[begin : begin + batch_size].to(net.encoder)
        run = net.run(batch, simulator=simulator, record=True)
        membranes, times, out = _trained(net, batch)
        for stage in net.stages:
            u: Tensor | None = run.membranes[stage.name]
            assert u is not None
            if stage.table is None:
                worst = max(worst, float((u - out).abs().max()))
                continue
            if stage.after or stage.flatten_after:  # the trained network pools before the neuron
                u = None
            else:
                worst = max(worst, float((u - membranes[stage.name]).abs().max()))
            expected = times[stage.name].reshape(run.times[stage.name].shape)
            unequal = run.times[stage.name] != expected
            wrong = int(unequal.sum())
            compared += unequal.numel()
            differing += wrong
            if wrong and first is None:
                index = unequal.nonzero()[0].tolist()
                first = _reason(
                    stage, index, begin, run.times[stage.name], expected, u, membranes[stage.name]
                )
        same += int((run.output.argmax(-1) == out.argmax(-1)).sum())
        if progress is not None:
            progress(min(begin + batch_size, len(x)), len(x))
    equal = 1 - differing / compared if compared else 1.0
    return VerifyReport(equal, differing, compared, len(x), worst, same / len(x), net.exact, first)


def _reason(
    stage: Stage,
    index: list[int],
    begin: int,
    spiking: Tensor,
    trained: Tensor,
    u: Tensor | None,
    pre: Tensor,
) -> str:
    a, b = (int(t[tuple(index)]) for t in (spiking, trained))
    said = " and ".join("silent" if t == SILENT else f"step {t}" for t in (a, b))
    where = f"{stage.name}, sample {begin + index[0]}, neuron {tuple(index[1:])}: {said}"
    if u is None:
        return f"{where} behind a pooling"
    assert stage.table is not None
    mine, theirs = float(u[tuple(index)]), float(pre.reshape(u.shape)[tuple(index)])
    # sums of n terms in two orders differ by at most about n roundings of their sizes
    rounding = torch.finfo(u.dtype).eps * stage.weight[0].numel() * max(1.0, float(u.abs().max()))
    if abs(mine - theirs) <= rounding:
        step = min(a, b)
        threshold = float(stage.table[0, step])
        return f"{where}; membranes {mine:.9g} and {theirs:.9g} are rounded to two sides of threshold {threshold:.9g}"
    return (
        f"{where}; membranes {mine:.6g} and {theirs:.6g} differ by more than rounding: "
        "an earlier layer differs, or the weights do"
    )
