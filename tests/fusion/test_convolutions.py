"""Convolutional programs: upstream's numbers, whether events are added row by row or torch's product runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.backends.cpu import CPUBackend
from snn_sparse_plugin.core.backend import calls
from snn_sparse_plugin.ops.spiking_conv import Norm, pooling

snn = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")

T, B, SIZE = 6, 3, 10
Program = Callable[[Any, Tensor], list[Tensor]]


def leaky(**options: Any) -> nn.Module:
    return snn.Leaky(0.875, **options)


def modules(**made: nn.Module) -> nn.Module:
    net = nn.Module()
    for name, module in made.items():
        net.add_module(name, module)
    return net


def two(pool: Callable[[Any], Any], between: Callable[[Any], Any] = lambda x: x, **options: Any) -> Program:
    """conv - pool - neuron - conv - neuron - linear - neuron, as a loop with states."""

    def run(net: Any, x: Tensor) -> list[Tensor]:
        m1, m2, m3 = (lif.init_leaky() for lif in (net.l1, net.l2, net.l3))
        spikes, mems = [], []
        for step in x:
            s1, m1 = net.l1(pool(net.c1(step)), m1)
            s2, m2 = net.l2(net.c2(between(s1)), m2)
            _, m3 = net.l3(net.fc(s2.flatten(1)), m3)
            spikes.append(s2)
            mems.append(m3)
        return [torch.stack(mems), torch.stack(spikes)]

    return run


def layers(c1: nn.Module, c2: nn.Module, features: int, **more: nn.Module) -> nn.Module:
    return modules(c1=c1, l1=leaky(), c2=c2, l2=leaky(), fc=nn.Linear(features, 4), l3=leaky(), **more)


def residual(net: Any, x: Tensor) -> list[Tensor]:
    m1, m2, m3 = (lif.init_leaky() for lif in (net.l1, net.l2, net.l3))
    mems = []
    for step in x:
        s1, m1 = net.l1(net.c1(step), m1)
        s2, m2 = net.l2(net.c2(s1) + s1, m2)
        _, m3 = net.l3(net.fc(torch.cat([s1, s2], 1).view(B, -1)), m3)
        mems.append(m3)
    return [torch.stack(mems), s2]


def maps_kept(net: Any, x: Tensor) -> list[Tensor]:
    """The user holds what the convolution made, so that its pool cannot have it for itself."""
    m1, maps, mems = net.l1.init_leaky(), [], []
    for step in x:
        made = net.c1(step)
        maps.append(made)
        _, m1 = net.l1(F.max_pool2d(made, 2), m1)
        mems.append(m1)
    return [torch.stack(mems), torch.stack(maps)]


def normed(net: Any, x: Tensor) -> list[Tensor]:
    m1, mems = net.l1.init_leaky(), []
    for step in x:
        _, m1 = net.l1(net.pool(net.norm(net.c1(step))), m1)
        mems.append(m1)
    return [torch.stack(mems)]


def without_batch(net: Any, x: Tensor) -> list[Tensor]:
    m1, mems = net.l1.init_leaky(), []
    for step in x[:, 0]:
        _, m1 = net.l1(net.c1(step), m1)
        mems.append(m1)
    return [torch.stack(mems)]


def in_order(net: Any, x: Tensor) -> list[Tensor]:
    utils.reset(net)
    return [torch.stack([net(step)[1] for step in x])]


def sequence(*made: nn.Module) -> nn.Sequential:
    return nn.Sequential(*made, leaky(init_hidden=True, output=True))


HIDDEN = {"init_hidden": True}
PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Program]] = {
    "max_pool": (
        lambda: layers(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 6, 3, padding=1), 96),
        two(lambda x: F.max_pool2d(x, 2)),
    ),
    "max_pool_overlapping": (
        lambda: layers(nn.Conv2d(2, 6, 3, bias=False), nn.Conv2d(6, 4, 2, stride=2, groups=2), 16),
        two(lambda x: F.max_pool2d(x, 3, 2, 1)),
    ),
    "average_pool": (
        lambda: layers(nn.Conv2d(2, 5, 3, padding="same"), nn.Conv2d(5, 6, 3, dilation=2), 6),
        two(lambda x: F.avg_pool2d(x, 2)),
    ),
    "pool_of_spikes": (
        lambda: layers(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 6, 3, padding=1), 96),
        two(lambda x: x, lambda s: F.max_pool2d(s, 2)),
    ),
    "pool_of_spikes_overlapping": (
        lambda: layers(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 6, 3, padding=1), 96),
        two(lambda x: x, lambda s: F.max_pool2d(s, 3, 2, 1)),
    ),
    "average_of_spikes": (
        lambda: layers(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 6, 3, padding=1), 96),
        two(lambda x: x, lambda s: F.avg_pool2d(s, 2)),
    ),
    "depthwise": (
        lambda: layers(nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 8, 2, groups=4), 72),
        two(lambda x: x),
    ),
    "uneven_zeros": (
        lambda: layers(
            nn.Conv2d(2, 4, 2, padding="same"), nn.Conv2d(4, 3, 3, padding_mode="circular", padding=1), 300
        ),
        two(lambda x: x),
    ),
    "residual": (
        lambda: layers(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), 800),
        residual,
    ),
    "maps_kept": (lambda: modules(c1=nn.Conv2d(2, 4, 3), l1=leaky()), maps_kept),
    "batch_norm_in_training": (
        lambda: modules(c1=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4), pool=nn.MaxPool2d(2), l1=leaky()),
        normed,
    ),
    "batch_norm": (
        lambda: modules(
            c1=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4).eval(), pool=nn.MaxPool2d(2), l1=leaky()
        ),
        normed,
    ),
    "batch_norm_without_pool": (
        lambda: modules(c1=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4).eval(), pool=nn.Identity(), l1=leaky()),
        normed,
    ),
    "batch_norm_behind_the_pool": (
        lambda: modules(
            c1=nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2)),
            norm=nn.BatchNorm2d(4).eval(),
            pool=nn.Identity(),
            l1=leaky(),
        ),
        normed,
    ),
    "normed_sequence": (lambda: normed_sequence(), in_order),
    "without_batch": (lambda: modules(c1=nn.Conv2d(2, 4, 3), l1=leaky()), without_batch),
    "vgg": (lambda: vgg(), in_order),
    "sequential": (
        lambda: sequence(
            *(nn.Conv2d(2, 5, 3), nn.MaxPool2d(2), leaky(**HIDDEN), nn.Conv2d(5, 6, 3), leaky(**HIDDEN)),
            *(nn.Flatten(), nn.Linear(24, 4)),
        ),
        in_order,
    ),
}


def vgg(first: nn.Module | None = None, second: nn.Module | None = None) -> nn.Module:
    """Pools behind neurons, before a convolution and before a linear layer."""
    return sequence(
        *(nn.Conv2d(2, 6, 3, padding=1), leaky(**HIDDEN), first or nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), leaky(**HIDDEN), second or nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        *(nn.Flatten(), nn.Linear(72, 4)),
    )


def normed_sequence() -> nn.Module:
    """Batch norms in eval mode behind convolutions, one of them before a pool."""
    return sequence(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6).eval(), nn.MaxPool2d(2), leaky(**HIDDEN)),
        *(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False).eval(), leaky(**HIDDEN)),
        *(nn.Flatten(), nn.Linear(72, 4)),
    )


ONE_OR_THREE_DIMENSIONS = {
    1: lambda: sequence(
        *(nn.Conv1d(2, 5, 3), nn.MaxPool1d(2), leaky(**HIDDEN), nn.Flatten(), nn.Linear(20, 4)),
    ),
    3: lambda: sequence(
        *(nn.Conv3d(2, 5, 3), nn.AvgPool3d(2), leaky(**HIDDEN), nn.Flatten(), nn.Linear(40, 4)),
    ),
}


def gridded(net: nn.Module) -> nn.Module:
    """Weights on a binary grid, so that every order of summation gives the same float."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.numel() > 1:
                parameter.copy_((torch.randn(parameter.shape) * 64).round() / 128)
        for norm in (
            m for m in net.modules() if isinstance(m, nn.BatchNorm2d)
        ):  # on no grid: torch rounds it
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 2)
    return net


def outcome(net: nn.Module, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    net.zero_grad()
    made = run()
    made[0].square().mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
    return [x.detach() for x in made], grads


def check(found: Any, expected: Any, *, exact: bool = True) -> None:
    for got, want in zip(found[0], expected[0], strict=True):
        if exact:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for got, want in zip(found[1], expected[1], strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-7


@pytest.fixture(params=["events", "product"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(CPUBackend, "prefers_events", lambda *a, **k: request.param == "events")
    calls.clear()
    return str(request.param)


def ran(way: str) -> int:
    return calls["cpu" if way == "events" else "torch", "convolution"]


def spikes(*size: int, density: float = 0.25) -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(T, B, *size) < density).float()


@pytest.mark.parametrize("name", PROGRAMS)
def test_loops(name: str, way: str) -> None:
    build, run = PROGRAMS[name]
    torch.manual_seed(0)
    net, x = gridded(build()), spikes(2, SIZE, SIZE)
    expected = outcome(net, lambda: run(net, x))

    def fused() -> list[Tensor]:
        with ssp.sparse_mode(backprop_threshold=None):
            return [out + 0 for out in run(net, x)]  # their numbers are wanted inside the block

    exact = name != "batch_norm_in_training"
    for _ in range(2):  # which layers feed neurons is known after the first pass
        check(outcome(net, fused), expected, exact=exact)
    if name not in ("batch_norm_in_training", "without_batch"):
        assert ran(way) > 0


@pytest.mark.parametrize("dims", ONE_OR_THREE_DIMENSIONS)
def test_one_and_three_dimensions(dims: int, way: str) -> None:
    net, x = gridded(ONE_OR_THREE_DIMENSIONS[dims]()), spikes(2, *[10 if dims == 1 else 6] * dims)
    expected = outcome(net, lambda: in_order(net, x))
    utils.reset(net)
    found = outcome(net, lambda: [ssp.unroll(net, x, backprop_threshold=None).mem])
    check(found, expected)
    assert ran(way) == 1


def test_a_sequence_unrolled(way: str) -> None:
    net, x = gridded(PROGRAMS["sequential"][0]()), spikes(2, SIZE, SIZE)
    expected = outcome(net, lambda: in_order(net, x))
    for given in (x, ssp.SpikeTrain.from_dense(x)):
        utils.reset(net)
        check(outcome(net, lambda: [ssp.unroll(net, given, backprop_threshold=None).mem]), expected)  # noqa: B023
    assert ran(way) == 4


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("window", [None, 0.125])
def test_a_batch_norm_runs_within_its_convolution(
    looped: bool, window: float | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = gridded(normed_sequence()), spikes(2, SIZE, SIZE)
    options = {"backprop_threshold": window, "min_active": 0}

    def steps(fuse_time: bool) -> list[Tensor]:
        with ssp.sparse_mode(**options, fuse_time=fuse_time):
            return [out + 0 for out in in_order(net, x)]

    expected = outcome(net, lambda: steps(False))
    found, factors = 0, Norm.factors

    def counted(norm: Norm) -> Any:
        nonlocal found
        found += 1
        return factors(norm)

    monkeypatch.setattr(Norm, "factors", counted)
    for _ in range(2):
        utils.reset(net)
        found = 0
        check(outcome(net, lambda: steps(True) if looped else [ssp.unroll(net, x, **options).mem]), expected)
    assert found == 2


@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize("window", [None, 0.125])
@pytest.mark.parametrize("looped", [True, False])
def test_pools_of_spikes_pass_events(
    looped: bool, window: float | None, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "MOST_SPIKES", float("inf"))
    made = (nn.AvgPool2d(2), nn.AvgPool2d(2, ceil_mode=True)) if kind == "average" else ()
    net, x = gridded(vgg(*made)), spikes(2, SIZE, SIZE)
    options = {"backprop_threshold": window, "min_active": 0}

    def steps(fuse_time: bool) -> list[Tensor]:
        with ssp.sparse_mode(**options, fuse_time=fuse_time):
            return [out + 0 for out in in_order(net, x)]

    expected = outcome(net, lambda: steps(False))
    for _ in range(2):
        utils.reset(net)
        calls.clear()
        check(outcome(net, lambda: steps(True) if looped else [ssp.unroll(net, x, **options).mem]), expected)
    assert (ran(way), calls["cpu", "pool"]) == (2, 2)


def test_within_the_window_gradients_are_those_of_masked_steps(way: str) -> None:
    net, x = gridded(PROGRAMS["sequential"][0]()), spikes(2, SIZE, SIZE)
    window = {"backprop_threshold": 0.125, "min_active": 0}

    def masked() -> list[Tensor]:
        with ssp.sparse_mode(**window, fuse_time=False):
            return in_order(net, x)

    expected = outcome(net, masked)
    utils.reset(net)
    check(outcome(net, lambda: [ssp.unroll(net, x, **window).mem]), expected)
    assert ran(way) == 2


def test_without_gradients_and_in_inference_mode(way: str) -> None:
    net, x = gridded(PROGRAMS["sequential"][0]()), spikes(2, SIZE, SIZE)
    with torch.no_grad():
        expected = in_order(net, x)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        utils.reset(net)
        with mode():
            assert torch.equal(ssp.unroll(net, x).mem, expected)


def test_one_image_at_every_step_is_convolved_once() -> None:
    net, x = gridded(PROGRAMS["sequential"][0]()), spikes(2, SIZE, SIZE)[:1].expand(T, -1, -1, -1, -1)
    expected = outcome(net, lambda: in_order(net, x))
    utils.reset(net)
    check(outcome(net, lambda: [ssp.unroll(net, x, backprop_threshold=None).mem]), expected)


def test_under_autocast_the_product_is_torchs() -> None:
    net, x = gridded(PROGRAMS["sequential"][0]()), spikes(2, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        expected = in_order(net, x)[0]
        utils.reset(net)
        calls.clear()
        found = ssp.unroll(net, x).mem
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    assert not any(op == "convolution" for _, op in calls)


def test_norse_sequences(way: str) -> None:
    norse = pytest.importorskip("norse.torch")
    net = gridded(
        norse.SequentialState(
            norse.Lift(nn.Conv2d(2, 5, 3)),
            norse.Lift(nn.MaxPool2d(2)),
            norse.LIF(),
            norse.Lift(nn.Conv2d(5, 6, 3)),
            norse.LIF(),
            norse.Lift(nn.Flatten()),
            norse.Lift(nn.Linear(24, 4)),
            norse.LI(),
        )
    )
    x = spikes(2, SIZE, SIZE)
    expected = outcome(net, lambda: [net(x)[0]])

    def sparse() -> list[Tensor]:
        with ssp.sparse_mode(backprop_threshold=None):
            return [net(x)[0]]

    check(outcome(net, sparse), expected, exact=False)
    assert ran(way) == 2
