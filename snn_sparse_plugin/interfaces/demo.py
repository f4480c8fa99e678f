"""``snn-sparse demo``: one network on real images, trained sparse and dense from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ..adapters import adapter_of
from ..bench.measure import saved_bytes
from ..bench.report import human_bytes
from ..core.demo_result import Activity, DemoOptions, DemoResult, Training
from ..core.errors import MissingDependencyError, UnsupportedError
from ..core.spikes import SpikeTrain, coordinates
from ..data import ImageData, latency_spikes, load_images
from ..fusion.sequence import unroll
from ..ops.spiking_layer import spiking_layer

Logits = Callable[[Any], Tensor]
BETA, SLOPE, LEARNING_RATE = 0.95, 50.0, 2e-3


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Train sparse, train dense, write the picture.

    Raises:
        MissingDependencyError: the library, scikit-learn or matplotlib is not installed.
    """
    from ..plot import demo_figure
    from ..plot.style import saved

    if options.threads:
        torch.set_num_threads(options.threads)
    data = load_images(options.data, options.root).limited(options.samples)
    sizes = (data.pixels, options.hidden, options.hidden, data.classes)
    make = NETWORKS[options.library]
    sparse_net, dense_net = make(sizes, options.seed, True), make(sizes, options.seed, False)
    console.print(
        f"{data.name}: {len(data.train_y)} training and {len(data.test_y)} test images, "
        f"latency-coded over T = {options.steps} steps; {options.library} network "
        f"{'–'.join(map(str, sizes))}, B = {options.batch}"
    )
    activity = Activity()
    coded = partial(latency_spikes, steps=options.steps, tau=0.4 * options.steps)

    def sparse(x: Any) -> Tensor:
        reset(sparse_net, options.library)
        mem = unroll(sparse_net, x).mem
        assert mem is not None  # the last layer has a membrane
        return mem.mean(0)

    def dense(x: Any) -> Tensor:
        reset(dense_net, options.library)
        return step_loop(dense_net, x, options.library).mean(0)

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        if not console.is_terminal:
            console.print("compiling kernels, once per machine")
        task = progress.add_task("compiling kernels", total=1, note="once per machine")
        _warm_up(sparse_net, sparse, coded(data.train_x[:2]))
        progress.update(task, completed=1)
        probe = coded(data.test_x[:256])

        def observe() -> None:
            layers = _layers(sparse_net, probe)
            activity.spikes.append([train.density for train, _ in layers])
            activity.active.append([active for _, active in layers])

        trained = _train("sparse", sparse_net, sparse, coded, data, options, progress, observe)
        compared = _train("dense", dense_net, dense, lambda x: coded(x).to_dense(), data, options, progress)
    sample = coded(data.test_x[:1])
    raster = _raster([sample, *(train for train, _ in _layers(sparse_net, sample))])
    result = DemoResult(options, trained, compared, activity, raster, int(data.test_y[0]))
    saved(demo_figure(result), options.out)
    return result


def _snntorch_net(sizes: tuple[int, ...], seed: int, sparse: bool) -> nn.Sequential:
    try:
        import snntorch
        from snntorch.surrogate import fast_sigmoid
    except ImportError as error:
        raise MissingDependencyError("snnTorch is not installed: pip install snntorch") from error
    Leaky = snntorch.Leaky
    if sparse:
        from ..snntorch import Leaky
    options: dict[str, Any] = {"beta": BETA, "spike_grad": fast_sigmoid(slope=SLOPE), "init_hidden": True}
    torch.manual_seed(seed)
    first, second, third = _linears(sizes)
    readout = Leaky(**options, reset_mechanism="none", output=True)
    return nn.Sequential(first, Leaky(**options), second, Leaky(**options), third, readout)


def _norse_net(sizes: tuple[int, ...], seed: int, sparse: bool) -> nn.Sequential:
    try:
        import norse.torch as norse
    except ImportError as error:
        raise MissingDependencyError("Norse is not installed: pip install norse") from error
    if sparse:
        from .. import norse  # type: ignore[no-redef]
    # a membrane of 20 steps and a synapse of 5; Norse 1.1 ignores alpha with "super", so "tanh" it is
    p = norse.LIFParameters(
        tau_mem_inv=torch.tensor(50.0),
        tau_syn_inv=torch.tensor(200.0),
        v_th=torch.tensor(0.2),
        method="tanh",
        alpha=torch.tensor(20.0),
    )
    torch.manual_seed(seed)
    first, second, third = _linears(sizes)
    return norse.SequentialState(first, norse.LIFCell(p), second, norse.LIFCell(p), third, norse.LICell())


NETWORKS: dict[str, Callable[[tuple[int, ...], int, bool], nn.Sequential]] = {
    "snntorch": _snntorch_net,
    "norse": _norse_net,
}


def _linears(sizes: tuple[int, ...]) -> list[nn.Linear]:
    """Weights large enough for every layer to fire from the start."""
    layers = [nn.Linear(m, n, bias=False) for m, n in pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=1.5 / layer.in_features**0.5)
    return layers


def step_loop(net: nn.Module, x: Tensor, library: str) -> Tensor:
    """The membrane of the output layer (T, B, N), as upstream's tutorials compute it: step by step."""
    if library == "norse":
        state, membranes = None, []
        for step in x.unbind(0):
            membrane, state = net(step, state)
            membranes.append(membrane)
        return torch.stack(membranes)
    return torch.stack([net(step)[1] for step in x.unbind(0)])


def reset(net: nn.Module, library: str) -> None:
    """Forget the state of the last batch."""
    if library == "snntorch":  # whose neurons keep their state between calls
        from snntorch import utils

        utils.reset(net)


def _warm_up(net: nn.Module, logits: Logits, x: SpikeTrain) -> None:
    logits(x).sum().backward()
    net.zero_grad()


def _train(
    name: str,
    net: nn.Module,
    logits: Logits,
    encode: Callable[[Tensor], Any],
    data: ImageData,
    options: DemoOptions,
    progress: Progress,
    after_epoch: Callable[[], None] = lambda: None,
) -> Training:
    """Adam on the cross entropy of the mean output membrane. A step is forward, loss and backward."""
    found = Training()
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(options.seed)
    batches = -(-len(data.train_y) // options.batch)
    task = progress.add_task(f"training {name}", total=options.epochs * batches, note="")
    seconds: list[float] = []
    after_epoch()
    for _ in range(options.epochs):
        for index in torch.randperm(len(data.train_y), generator=generator).split(options.batch):
            x, y = encode(data.train_x[index]), data.train_y[index]
            if not seconds:
                inputs = x.tensors() if isinstance(x, SpikeTrain) else [x]
                found.saved_bytes, _ = saved_bytes(partial(logits, x), [*inputs, *net.parameters()])
            start = perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(x), y)
            loss.backward()
            seconds.append(perf_counter() - start)
            optimizer.step()
            progress.advance(task)
        found.accuracy.append(_accuracy(logits, encode, data))
        note = f"test accuracy {100 * found.accuracy[-1]:.1f} %"
        progress.update(task, note=note)
        if not progress.console.is_terminal:  # a log has no bar: a line for each epoch
            epoch = f"{len(found.accuracy)} of {options.epochs}"
            progress.console.print(f"{name}, epoch {epoch}: {note}", highlight=False, soft_wrap=True)
        after_epoch()
    found.step_ms = 1e3 * median(seconds)
    return found


@torch.no_grad()
def _accuracy(logits: Logits, encode: Callable[[Tensor], Any], data: ImageData) -> float:
    correct = 0
    for x, y in zip(data.test_x.split(256), data.test_y.split(256), strict=True):
        correct += int((logits(encode(x)).argmax(1) == y).sum())
    return correct / len(data.test_y)


def _layers(net: nn.Sequential, x: SpikeTrain) -> list[tuple[SpikeTrain, float]]:
    """Of every spiking layer: its spikes, and the share of neuron-steps that pass a gradient."""
    modules, found = list(net), []
    for linear, module in zip(modules[:-2:2], modules[1:-2:2], strict=True):
        adapter = adapter_of(module)
        neuron = adapter.neuron(module) if adapter is not None else "it has no adapter"
        if isinstance(neuron, str):
            raise UnsupportedError(f"{type(module).__name__} cannot be observed: {neuron}.")
        out = spiking_layer(
            x,
            linear.weight,  # type: ignore[arg-type]
            spec=neuron.spec,
            params=neuron.params,
            surrogate=neuron.surrogate,
            events=True,
        )
        x = out.spikes.detach()
        found.append((x, float(out.active_fraction)))
    return found


def _raster(trains: list[SpikeTrain]) -> list[tuple[list[int], list[int], int]]:
    """Times, neurons and number of neurons of each train, for a batch of one."""
    rows = [coordinates(train.indptr, train.indices)[0].tolist() for train in trains]
    return [(row, train.indices.tolist(), train.features) for row, train in zip(rows, trains, strict=True)]


def show(result: DemoResult, console: Console) -> None:
    """The comparison as a table."""
    sparse, dense = result.sparse, result.dense
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("sparse", "dense", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(
        "test accuracy", f"{100 * sparse.accuracy[-1]:.1f} %", f"{100 * dense.accuracy[-1]:.1f} %", ""
    )
    table.add_row(
        "step, forward and backward",
        f"{sparse.step_ms:.1f} ms",
        f"{dense.step_ms:.1f} ms",
        f"[bold]{dense.step_ms / sparse.step_ms:.1f}×[/]",
    )
    table.add_row(
        "saved for backward",
        human_bytes(sparse.saved_bytes),
        human_bytes(dense.saved_bytes),
        f"[bold]{dense.saved_bytes / max(1, sparse.saved_bytes):.1f}×[/]",
    )
    for k, (spikes, active) in enumerate(
        zip(result.activity.spikes[-1], result.activity.active[-1], strict=True), start=1
    ):
        table.add_row(
            f"hidden layer {k}", f"{100 * spikes:.1f} % spikes", "", f"{100 * active:.1f} % pass a gradient"
        )
    console.print(table)
    console.print(f"picture: {result.options.out}", soft_wrap=True)
