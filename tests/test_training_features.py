"""What training scripts do beside the plain step: precision, accumulation, freezing, checkpointing.

Each feature runs on a snnTorch network through ``unroll``, on Norse's sequence modules, and on a step loop
under ``sparse_mode``, and is compared with what upstream makes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

from helpers import relative, spikes, torch_threads  # noqa: E402
from training_ways import (  # noqa: E402
    EXACT,
    WAYS,
    B,
    M,
    N,
    T,
    Way,
    batch,
    close,
    detached,
    gradients,
    gridded,
    linears,
    loss_of,
    snntorch_net,
    stepped,
    target,
    unrolled,
)

from snn_sparse_plugin.core import registry  # noqa: E402


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture
def net(way: Way) -> nn.Module:
    return gridded(way.build())


@pytest.fixture
def x() -> Tensor:
    return batch()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


# --- precision ---


HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALVES
def test_autocast_follows_upstream(way: Way, net: nn.Module, x: Tensor, half: torch.dtype) -> None:
    # with its cache of cast weights upstream adds the steps' gradients up in half precision: the less precise one
    with torch.autocast("cpu", half, cache_enabled=False):
        expected, _ = way.upstream(net, x)
        found, _ = way.sparse(net, x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    share = target(expected.float())
    grads = gradients(net, loss_of(found.float(), share))
    assert all(torch.isfinite(g).all() for g in grads)
    close(
        grads, gradients(net, loss_of(expected.float(), share)), torch.finfo(half).eps / 2
    )  # one rounding to it


@HALVES
def test_autocast_with_a_window_is_finite(way: Way, net: nn.Module, x: Tensor, half: torch.dtype) -> None:
    with torch.autocast("cpu", half):
        out, _ = way.sparse(net, x, backprop_threshold="auto")
    assert all(torch.isfinite(g).all() for g in gradients(net, loss_of(out)))


def test_float64(way: Way, net: nn.Module, x: Tensor) -> None:
    if way.build is snntorch_net:  # whose spikes are float32 whatever comes in: a second layer refuses them
        net = nn.Sequential(nn.Linear(M, N), net[-1])
    net, x = net.double(), x.double()
    expected, found = way.upstream(net, x)[0], way.sparse(net, x)[0]
    assert found.dtype == (torch.float64 if way.sparse is unrolled else expected.dtype)
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
    if way.sparse is stepped:
        return
    # the last layer comes first. Below a frozen first layer nothing learns, so that it has no backward at all, but
    # for Norse's initial membrane, which asks for a gradient
    assert len(seen) == (1 if frozen == 0 and way.build is snntorch_net else 2)
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
    whole = {"fuse_time": False} if way.sparse is stepped else {}
    for options in (EXACT, {"backprop_threshold": 0.2, "min_active": 0.0}):
        expected = gradients(net, loss_of(way.sparse(net, x, **options | whole)[0]))
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
