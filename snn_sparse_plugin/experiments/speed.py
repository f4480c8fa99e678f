"""Times: one hidden layer, the second by the published protocol, and whole epochs, each against snnTorch's loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.measure import Spread, Steps, Timing, saved_bytes, time_alternating
from ..core.spikes import SpikeTrain, coordinates
from ..data import SpikeDataset, loader
from .losses import loss
from .network import Network
from .upstream import IndexedLoop, LayerLoop, StepLoop

LOOPS: dict[str, type[nn.Module]] = {"snntorch": LayerLoop, "published": IndexedLoop}


def layer_alone(net: Network, x: SpikeTrain, y: Tensor, provider: str, k: int = 2) -> Steps:
    """Forward and backward of hidden layer ``k`` alone, on real spikes and the real gradient of its output.

    Its backward makes the gradients of weights and of input spikes, the sparse one the latter where the layer below is
    active [Perez-Nieves & Goodman 2021]; layer 1 has data for input, which takes none. ``provider``: ``"sparse"``, or
    a key of :data:`LOOPS`.
    """
    before = _spikes_before(net, x, k)
    weight: Tensor = net.hidden[k - 1].weight  # type: ignore[assignment]
    grad = _output_gradient(net, before, y, k)
    if provider == "sparse":

        def forward() -> Any:
            return net.layer(before, k).spikes

        active = forward().active  # does not change from run to run
        if active is not None:
            rows, columns = coordinates(*active)
            grad = grad.flatten(2)[rows % before.T, rows // before.T, columns]
        kept = [*before.tensors(), *(before.active or ())]
        leaves = [weight] if before.carrier is None else [weight, before.carrier]

        def backward(out: Any) -> Any:
            return torch.autograd.grad(out.carrier, leaves, grad)

    else:
        loop = LOOPS[provider](partial(net.current, k=k), net.settings.beta)
        spikes = before.to_dense().detach()
        leaves = [weight] if before.carrier is None else [weight, spikes.requires_grad_()]
        kept = [spikes]

        def forward() -> Any:
            return loop(spikes)

        def backward(out: Any) -> Any:
            return torch.autograd.grad(out, leaves, grad)

    return Steps(forward, backward, [weight], [weight, *kept])


def _spikes_before(net: Network, x: SpikeTrain, k: int) -> SpikeTrain:
    """The spikes of layer ``k`` - 1 as a leaf: they pass a gradient where it is active, and no further."""
    for below in range(1, k):
        x = net.layer(x.detach(), below).spikes
    if x.carrier is None:
        return x
    return x._replace(carrier=x.carrier.detach().clone().requires_grad_())


def _output_gradient(net: Network, before: SpikeTrain, y: Tensor, k: int) -> Tensor:
    """Gradient of the whole loss to the spikes of layer ``k``, dense (T, B, N...)."""
    with torch.no_grad():
        spikes = net.layer(before.detach(), k).spikes.to_dense()
    spikes.requires_grad_()
    out = net(spikes, sparse=False, first=k)
    counts = [spikes.sum(0), *(s.counts() for s in out.spikes)]
    _, total = loss(out.mem, y, counts, net.settings)
    return torch.autograd.grad(total, spikes)[0]


def time_layer(
    net: Network,
    x: SpikeTrain,
    y: Tensor,
    *,
    k: int = 2,
    rounds: int,
    published: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Times in ms and bytes saved for backward of :func:`layer_alone`, sparse and dense in alternating rounds.

    ``published``: also the loop as published, once: its backward takes seconds.
    """
    device = str(x.device)
    cases = {name: layer_alone(net, x, y, name, k) for name in ("sparse", "snntorch")}
    times = time_alternating(cases, rounds, device, advance)
    if published:
        cases["published"] = layer_alone(net, x, y, "published", k)
        times["published"] = time_alternating({"published": cases["published"]}, 1, device)["published"]
    whole = net(x)
    row: dict[str, Any] = {
        "hidden": net.settings.hidden,
        "layers": net.settings.layers,
        "threshold": net.settings.threshold,
        "shape": [x.T, x.B, x.features],
        "active": [float(a) for a in whole.active],
        "rate": [s.density for s in whole.spikes],
    }
    for name, steps in cases.items():
        row[name] = _as_dict(times[name]) | {"saved_bytes": _saved(steps)}
    return row


def _as_dict(timing: Timing) -> dict[str, Any]:
    return {f"{phase}_ms": spread._asdict() for phase, spread in timing._asdict().items() if phase != "step"}


def _saved(steps: Steps) -> int:
    count, out = saved_bytes(steps.forward, steps.kept)
    steps.backward(out)
    return count


def time_epoch(
    make: Callable[[], Network],
    dataset: SpikeDataset,
    *,
    batches: int,
    rounds: int,
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Training loops of this package and of snnTorch on the same batches: gather, forward, backward, Adam.

    Each turn is ``batches`` batches and alternates with the other's; both start from equal networks, made by ``make``.
    An epoch's time is the median of the turns times the number of batches. The loop's input is made dense from
    the same events, which is a part of its time; ``dense_ms`` says how large a part.
    """
    nets = {"sparse": make().to(device), "snntorch": make().to(device)}
    settings = nets["sparse"].settings
    loop = StepLoop(nets["snntorch"])
    adams = {
        name: torch.optim.Adam(net.parameters(), lr=settings.learning_rate, fused=True)
        for name, net in nets.items()
    }
    order = torch.Generator().manual_seed(0)
    size = min(settings.batch, len(dataset))
    epoch = len(loader(dataset, size, drop_last=True))  # type: ignore[arg-type]
    chosen = [
        torch.randint(len(dataset), (size,), generator=order) for _ in range(max(1, min(batches, epoch)))
    ]
    densifying: list[float] = []

    def sparse_turn() -> float:
        start = perf_counter()
        for x, y in _gathered(dataset, chosen, device):
            out = nets["sparse"](x)
            _update(out.mem, y, [s.counts() for s in out.spikes], nets["sparse"], adams["sparse"])
        _wait(device)
        return perf_counter() - start

    def loop_turn() -> float:
        start = perf_counter()
        for x, y in _gathered(dataset, chosen, device):
            before = perf_counter()
            dense = x.to_dense()
            _wait(device)
            densifying.append(perf_counter() - before)
            out = loop(dense)
            _update(out.mem, y, out.counts, nets["snntorch"], adams["snntorch"])
        _wait(device)
        return perf_counter() - start

    turns = {"sparse": sparse_turn, "snntorch": loop_turn}
    for turn in turns.values():
        turn()  # compiles and warms up
    densifying.clear()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    gc.collect()
    for k in range(rounds):
        for name in list(turns)[:: 1 if k % 2 else -1]:
            seconds[name].append(turns[name]() / len(chosen))
            advance()
    found: dict[str, Any] = {
        "batches": epoch,
        "batch": size,
        "batches_per_turn": len(chosen),
        "rounds": rounds,
        "dense_ms": Spread.of(densifying).median,
    }
    for name, values in seconds.items():
        spread = Spread.of(values)
        found[name] = {"batch_ms": spread._asdict(), "epoch_s": spread.median * epoch / 1e3}
    found["ratio"] = found["snntorch"]["epoch_s"] / found["sparse"]["epoch_s"]
    return found


def _gathered(dataset: SpikeDataset, chosen: Iterable[Tensor], device: str) -> Iterable[Any]:
    for indices in chosen:
        x, y = dataset.batch(indices)
        yield x.to(device), y.to(device)


def _update(
    mem: Tensor, y: Tensor, counts: list[Tensor], net: Network, optimizer: torch.optim.Optimizer
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss(mem, y, counts, net.settings)[1].backward()
    optimizer.step()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def profile_update(net: Network, x: SpikeTrain, y: Tensor, rounds: int = 20) -> dict[str, float]:
    """Milliseconds of each part of one sparse update, medians: forward, loss, backward, Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=net.settings.learning_rate, fused=True)
    marks: list[list[float]] = []
    clock = partial(_now, str(x.device))
    for _ in range(rounds + 2):
        times = [clock()]
        out = net(x)
        times.append(clock())
        total = loss(out.mem, y, [s.counts() for s in out.spikes], net.settings)[1]
        times.append(clock())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        times.append(clock())
        optimizer.step()
        times.append(clock())
        marks.append([b - a for a, b in pairwise(times)])
    names = ("forward", "loss", "backward", "adam")
    return {
        name: Spread.of(list(part)).median
        for name, part in zip(names, zip(*marks[2:], strict=True), strict=True)
    }


def _now(device: str) -> float:
    _wait(device)
    return perf_counter()
