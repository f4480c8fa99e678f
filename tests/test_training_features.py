"""What training scripts do beside the plain step: precision, accumulation, freezing, checkpointing, processes.

Each feature runs on a snnTorch network through ``unroll``, on Norse's sequence modules, and on a step loop
under ``sparse_mode``, and is compared with what upstream makes of it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

from helpers import on_grid, relative, spikes  # noqa: E402
from snntorch import surrogate  # noqa: E402

from snn_sparse_plugin import registry, sparse_mode, unroll  # noqa: E402

T, B, M, H, N = 12, 4, 10, 8, 5
EXACT: dict[str, Any] = {"backprop_threshold": None}


class Way(NamedTuple):
    """A network and how it is run over all steps: sparse, and by upstream alone. Both return (spikes, state)."""

    build: Callable[[], nn.Module]
    sparse: Callable[..., tuple[Tensor, Any]]
    upstream: Callable[..., tuple[Tensor, Any]]


def _snntorch() -> nn.Module:
    options = {"beta": 0.875, "threshold": 0.5, "spike_grad": surrogate.fast_sigmoid(5), "init_hidden": True}
    layers = (
        nn.Linear(M, H),
        snntorch.Leaky(**options),
        nn.Linear(H, N),
        snntorch.Leaky(output=True, **options),
    )
    return nn.Sequential(*layers)


def _norse() -> nn.Module:
    layers = nn.Linear(M, H), norse.LIF(_lif()), nn.Linear(H, N), norse.LIF(_lif())
    return norse.SequentialState(*layers)


def _lif() -> Any:
    tensors = {"tau_syn_inv": 500.0, "tau_mem_inv": 500.0, "v_th": 0.25}
    return norse.LIFParameters(**{k: torch.tensor(v) for k, v in tensors.items()}, alpha=torch.tensor(5.0))


def _steps(net: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """snnTorch's step loop; the state is a list of membranes."""
    neurons = [m for m in net.modules() if isinstance(m, snntorch.Leaky)]
    for k, neuron in enumerate(neurons):
        neuron.mem = torch.zeros(0) if state is None else state[k]
    out = torch.stack([net(h)[0] for h in x.unbind(0)])
    return out, [neuron.mem for neuron in neurons]


def _unrolled(net: nn.Module, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    for k, neuron in enumerate(m for m in net.modules() if isinstance(m, snntorch.Leaky)):
        neuron.mem = torch.zeros(0) if state is None else state[k]
    out = unroll(net, x, **EXACT | options)
    return out.spikes, [s["mem"] for s in out.state if s is not None]


def _stepped(net: nn.Module, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    with sparse_mode(**EXACT | options):
        return _steps(net, x, state)


def _sequence(net: nn.Module, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    with sparse_mode(**EXACT | options):
        return net(x, state)


WAYS = {
    "snntorch-unroll": Way(_snntorch, _unrolled, _steps),
    "snntorch-loop": Way(_snntorch, _stepped, _steps),
    "norse-sequence": Way(_norse, _sequence, lambda net, x, state=None: net(x, state)),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture
def net(way: Way) -> nn.Module:
    return gridded(way.build())


@pytest.fixture
def x() -> Tensor:
    return spikes(T, B, M, p=0.4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linears(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def gridded(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for layer in linears(net):
            for parameter in layer.parameters():
                parameter.copy_(on_grid(*parameter.shape, scale=0.5))
    return net


def target(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, B, N, generator=generator, dtype=torch.float64).to(x.dtype)


def loss_of(out: Tensor, share: Tensor | None = None) -> Tensor:
    return (out * (target(out) if share is None else share)).sum()


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.requires_grad]


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert any(e.any() for e in expected), "the problem has no gradient"
    worst = max(relative(a, e) for a, e in zip(actual, expected, strict=True))
    assert worst <= tolerance


def detached(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, list):
        return [detached(s) for s in state]
    return None if state is None else type(state)(*map(detached, state))


# --- precision ---


def test_autocast_follows_upstream(way: Way, net: nn.Module, x: Tensor) -> None:
    # with its cache of cast weights upstream adds the steps' gradients up in bfloat16, and is the less precise one
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected, _ = way.upstream(net, x)
        found, _ = way.sparse(net, x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    share = target(expected.float())
    grads = gradients(net, loss_of(found.float(), share))
    assert all(torch.isfinite(g).all() for g in grads)
    close(grads, gradients(net, loss_of(expected.float(), share)), 2.0**-8)  # one rounding to bfloat16


def test_autocast_with_a_window_is_finite(way: Way, net: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = way.sparse(net, x, backprop_threshold="auto")
    assert all(torch.isfinite(g).all() for g in gradients(net, loss_of(out)))


def test_float64(way: Way, net: nn.Module, x: Tensor) -> None:
    if way.build is _snntorch:  # whose spikes are float32 whatever comes in: a second layer refuses them
        net = nn.Sequential(nn.Linear(M, N), net[-1])
    net, x = net.double(), x.double()
    expected, found = way.upstream(net, x)[0], way.sparse(net, x)[0]
    assert found.dtype == (torch.float64 if way.sparse is _unrolled else expected.dtype)
    assert torch.equal(found, expected.to(found.dtype))
    share = target(x.float()).double()  # values that snnTorch's float32 spikes hand back unrounded
    close(gradients(net, loss_of(found, share)), gradients(net, loss_of(expected, share)), 1e-12)


# --- the optimizer's side ---


def test_parameter_groups(way: Way, net: nn.Module, x: Tensor) -> None:
    twins = {way.sparse: net, way.upstream: copy.deepcopy(net)}
    for run, twin in twins.items():
        first, second = linears(twin)
        groups = [
            {"params": first.parameters(), "lr": 1e-2},
            {"params": second.parameters(), "lr": 1e-3, "weight_decay": 0.1},
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(run(twin, x)[0]).backward()
            optimizer.step()
    sparse, upstream = ([p.detach() for p in twin.parameters()] for twin in twins.values())
    close(sparse, upstream)


def test_accumulated_halves_are_the_whole_batch(way: Way, net: nn.Module, x: Tensor) -> None:
    share = target(x)
    whole = gradients(net, loss_of(way.sparse(net, x)[0], share))
    net.zero_grad()
    for half in (slice(0, B // 2), slice(B // 2, B)):
        loss_of(way.sparse(net, x[:, half])[0], share[:, half]).backward()
    close([p.grad for p in net.parameters()], whole)


def test_truncated_backpropagation(way: Way, net: nn.Module, x: Tensor) -> None:
    found = {}
    for run in (way.sparse, way.upstream):
        net.zero_grad()
        state, outs = None, []
        for chunk in (slice(0, T // 2), slice(T // 2, T)):
            out, state = run(net, x[chunk], state)
            state = detached(state)
            loss_of(out, target(x)[chunk]).backward()
            outs.append(out.detach())
        found[run] = torch.cat(outs), [p.grad.clone() for p in net.parameters()]
    (spikes_sparse, sparse), (spikes_upstream, upstream) = found.values()
    assert torch.equal(spikes_sparse, spikes_upstream)
    close(sparse, upstream)
    whole = gradients(net, loss_of(way.sparse(net, x)[0]))
    assert max(relative(a, b) for a, b in zip(sparse, whole, strict=True)) > 1e-3, "nothing was cut"


# --- less work ---


@contextmanager
def needs_of_backward(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, ...]]]:
    """What each backward of the fused op is asked for, last layer first."""
    backend, seen = registry.load("backends", "cpu"), []
    upstream = backend.spiking_layer_backward

    def spying(call: Any, saved: Any, events: Any, grads: Any, needs: tuple[bool, ...]) -> Any:
        found = upstream(call, saved, events, grads, needs)
        seen.append((needs, found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(backend, "spiking_layer_backward", spying)
        yield seen


@pytest.mark.parametrize("frozen", [0, 1], ids=["first", "last"])
def test_a_frozen_layer_costs_no_weight_gradient(
    way: Way, net: nn.Module, x: Tensor, frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears(net)[frozen].requires_grad_(False)
    x = spikes(T, B, M, p=0.2)  # a denser input has its product outside the op
    expected = gradients(net, loss_of(way.upstream(net, x)[0]))
    with needs_of_backward(monkeypatch) as seen:
        found = gradients(net, loss_of(way.sparse(net, x)[0]))
    close(found, expected)
    assert linears(net)[frozen].weight.grad is None
    if way.sparse is _stepped:
        return
    # the last layer comes first. Below a frozen first layer nothing learns, so that it has no backward at all, but
    # for Norse's initial membrane, which asks for a gradient
    assert len(seen) == (1 if frozen == 0 and way.build is _snntorch else 2)
    for layer, (needs, grads) in zip((1, 0), seen, strict=False):
        learns = layer != frozen
        assert needs[1:3] == (learns, learns)
        assert (grads.weight is not None, grads.bias is not None) == (learns, learns)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(way: Way, net: nn.Module, x: Tensor, mode: Any) -> None:
    saved = []
    expected, _ = way.sparse(net, x)
    with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, _ = way.sparse(net, x)
    assert not saved
    assert out.grad_fn is None
    assert not out.requires_grad
    assert torch.equal(out, expected.detach())
    close(
        gradients(net, loss_of(way.sparse(net, x)[0])), gradients(net, loss_of(expected))
    )  # and training goes on


def test_activation_checkpointing(way: Way, net: nn.Module, x: Tensor) -> None:
    plain = gradients(net, loss_of(way.upstream(net, x)[0]))
    # a loop inside a checkpoint is not recorded, as its memory is the checkpoint's affair
    stepped = {"fuse_time": False} if way.sparse is _stepped else {}
    for options in (EXACT, {"backprop_threshold": 0.2, "min_active": 0.0}):
        expected = gradients(net, loss_of(way.sparse(net, x, **options | stepped)[0]))
        out = checkpoint(lambda x: way.sparse(net, x, **options)[0], x, use_reentrant=False)  # noqa: B023
        close(gradients(net, loss_of(out)), expected, 0)
        assert (max(map(relative, expected, plain)) < 1e-5) == (options is EXACT), (
            "a window that cuts nothing"
        )


def test_functional_call(way: Way, net: nn.Module, x: Tensor) -> None:
    class Whole(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return way.sparse(self.net, x)[0]

    other = gridded(way.build())
    replaced = {f"net.{k}": p.detach().clone().requires_grad_() for k, p in other.named_parameters()}
    out = torch.func.functional_call(Whole(net), replaced, (x,))
    expected, _ = way.upstream(other, x)
    assert torch.equal(out, expected)
    loss_of(out).backward()
    close([p.grad for p in replaced.values()], gradients(other, loss_of(expected)))
    assert all(p.grad is None for p in net.parameters())


# --- two processes ---

DDP = """
    import os
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import test_training_features as features

    class Whole(torch.nn.Module):
        def __init__(self, way):
            super().__init__()
            self.way, self.net = way, features.gridded(way.build())

        def forward(self, x):
            return self.way.sparse(self.net, x)[0]

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == 2
    mine = slice(rank * features.B // size, (rank + 1) * features.B // size)
    found = {}
    for name, way in features.WAYS.items():
        torch.manual_seed(rank)  # DDP gives every process the weights of the first
        model = DistributedDataParallel(Whole(way))
        x = torch.load(sys.argv[1])
        for _ in range(2):  # the second step meets the buckets that the first has built
            model.zero_grad()
            out = model(x[:, mine])
            features.loss_of(out, features.target(x)[:, mine]).backward()
        weights = model.module.net.state_dict()
        found[name] = weights, [p.grad * size for p in model.parameters()]
    if rank == 0:
        torch.save(found, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of the process group at times outlives the interpreter, and aborts the process
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, the backend of processes on CPU",
)
def test_two_processes_average_to_the_gradient_of_one(x: Tensor, tmp_path: Path) -> None:
    script, batch, out = tmp_path / "train.py", tmp_path / "x.pt", tmp_path / "gradients.pt"
    script.write_text(textwrap.dedent(DDP))
    torch.save(x, batch)
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, script, batch, out],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, (weights, found) in torch.load(out).items():
        way = WAYS[name]
        net = way.build()
        net.load_state_dict(weights)
        close(found, gradients(net, loss_of(way.sparse(net, x)[0])))
