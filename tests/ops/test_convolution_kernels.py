"""Convolutions of events on a CPU against torch's: currents, maxima, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import on_grid, relative, torch_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snn_sparse_plugin.backends.cpu.conv import backward, forward, prefers_events
from snn_sparse_plugin.core.convolution import Convolution, Pool
from snn_sparse_plugin.core.csr import Active, at_active
from snn_sparse_plugin.core.spikes import SpikeTrain


def conv1(channels=(3, 5), size=9, kernel=3, stride=1, padding=0, dilation=1, groups=1, pool=None):
    return of(channels, (size,), (kernel,), (stride,), (padding,), (dilation,), groups, pool)


def conv2(channels=(3, 20), size=(9, 8), kernel=3, stride=1, padding=0, dilation=1, groups=1, pool=None):
    return of(channels, size, *(pair(x) for x in (kernel, stride, padding, dilation)), groups, pool)


def pair(x):
    return x if isinstance(x, tuple) else (x, x)


def of(channels, size, kernel, stride, padding, dilation, groups, pool):
    return Convolution(*channels, size, kernel, stride, padding, dilation, groups, pool)


def max2(kernel=2, stride=2, padding=0, dilation=1, ceil_mode=False):
    return Pool("max", *(pair(x) for x in (kernel, stride, padding, dilation)), ceil_mode)


def avg2(kernel=2, stride=2, padding=0, **options):
    return Pool("avg", *(pair(x) for x in (kernel, stride, padding)), **options)


CASES = {
    "plain": conv2(),
    "one channel": conv2((1, 1)),
    "1x1 kernel": conv2(kernel=1),
    "1x1 map": conv2(size=(3, 3)),
    "1x1 input": conv2(size=(1, 1), kernel=1),
    "padded 1x1 input": conv2(size=(1, 1), kernel=3, padding=1),
    "oblong": conv2(size=(7, 13), kernel=(5, 2), padding=(2, 1)),
    "padding beyond the kernel": conv2(padding=4, kernel=2),
    "stride": conv2(stride=(2, 3), padding=1),
    "stride beyond the kernel": conv2(kernel=2, stride=3),
    "dilation": conv2(dilation=(2, 3), padding=2),
    "dilation and stride": conv2(size=(13, 14), dilation=(2, 4), stride=(3, 2), padding=2),
    "dilation divides stride": conv2(size=(13, 14), dilation=2, stride=4, padding=1),
    "groups": conv2((4, 36), groups=2),
    "narrow groups": conv2((6, 12), groups=3),
    "depthwise": conv2((5, 5), groups=5, padding=1),
    "depthwise times two": conv2((5, 10), groups=5, stride=2),
    "wide": conv2((2, 130), kernel=5),
    "17 channels": conv2((2, 17)),
    "1-d": conv1(),
    "1-d stride": conv1((3, 33), 17, kernel=5, stride=2, padding=3, dilation=3),
    "1-d max": conv1(pool=Pool("max", (2,), (2,), (0,), (1,))),
    "1-d average": conv1(pool=Pool("avg", (3,), (2,), (1,), ceil_mode=True)),
    "3-d": of((2, 18), (4, 5, 6), (3, 2, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2), 2, None),
    "3-d max": of(
        (2, 6),
        (4, 5, 6),
        (2, 2, 3),
        *((1,) * 3, (0,) * 3, (1,) * 3),
        1,
        Pool("max", *((2,) * 3,) * 2, (1,) * 3, (1,) * 3, True),
    ),
    "3-d average": of(
        (2, 6),
        (4, 5, 6),
        (2, 2, 3),
        *((1,) * 3, (0,) * 3, (1,) * 3),
        1,
        Pool("avg", *((2,) * 3,) * 2, (1,) * 3, count_include_pad=False),
    ),
    "max": conv2(pool=max2()),
    "max of a wide map": conv2((2, 64), pool=max2()),
    "max, odd map, ceil": conv2(size=(9, 9), pool=max2(ceil_mode=True)),
    "max, overlapping": conv2(pool=max2(3, 1, 1)),
    "max, dilation": conv2(size=(12, 11), pool=max2(3, 2, 1, 2, True)),
    "max, gaps": conv2(size=(12, 11), pool=max2(2, 3)),
    "max of the whole map": conv2(pool=max2((7, 6), 1)),
    "max of groups": conv2((4, 40), groups=4, pool=max2()),
    "max of depthwise": conv2((5, 5), groups=5, pool=max2(3, 2, 1)),
    "average": conv2(pool=avg2()),
    "average, padded": conv2(pool=avg2(3, 2, 1)),
    "average, without padding": conv2(pool=avg2(3, 2, 1, count_include_pad=False)),
    "average, ceil": conv2(pool=avg2(3, 2, 1, ceil_mode=True)),
    "average, ceil without padding": conv2(
        pool=avg2((3, 2), 2, (1, 0), ceil_mode=True, count_include_pad=False)
    ),
    "average, divisor": conv2(pool=avg2(3, 2, 0, divisor_override=4)),
    "average of groups": conv2((4, 36), groups=2, pool=avg2()),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def conv(request):
    return request.param


def torch_forward(conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dims = len(conv.size)
    rows = x.reshape(x.shape[0] * x.shape[1], conv.in_channels, *conv.size)
    convolved = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    out = convolved(rows, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    pool = conv.pool
    if pool is not None and pool.kind == "max":
        pooled = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
        out = pooled(out, pool.kernel, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)
    elif pool is not None:
        divisor = {} if dims == 1 else {"divisor_override": pool.divisor_override}
        pooled = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
        out = pooled(
            *(out, pool.kernel, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad), **divisor
        )
    assert tuple(out.shape[1:]) == (conv.out_channels, *conv.out_size)
    return out.reshape(*x.shape[:2], conv.out_features)


def spikes(conv: Convolution, density=0.3, T=4, B=3, dtype=torch.float32, graded=False) -> Tensor:
    x = (torch.rand(T, B, conv.in_channels, *conv.size) < density).to(dtype)
    return x * torch.randn_like(x) if graded else x


def parameters(conv: Convolution, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    shape = conv.out_channels, conv.in_channels // conv.groups, *conv.kernel
    return torch.randn(shape, dtype=dtype), torch.randn(conv.out_channels, dtype=dtype)


def listed(conv: Convolution, x: Tensor, share=0.2) -> SpikeTrain:
    """The train of x, with neuron-steps that a layer below might have had near threshold."""
    train = SpikeTrain.from_dense(x)
    near = SpikeTrain.from_dense((torch.rand(*x.shape[:2], conv.in_features) < share).to(x.dtype))
    train.active = Active(near.indptr, near.indices)
    return train


def check(
    conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, tolerance: float, exact=False
) -> None:
    """Current and all gradients against torch's."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
    wanted = torch_forward(conv, leaves[0], leaves[1], leaves[2] if bias is not None else None)
    train = listed(conv, x)
    current, winners = forward(conv, train, weight, bias, True)
    assert current.shape == wanted.shape
    assert current.is_contiguous()
    assert (winners is not None) == (conv.pool is not None and conv.pool.kind == "max")
    if exact:
        assert torch.equal(current, wanted)
    assert relative(current, wanted) <= tolerance
    assert torch.equal(forward(conv, train, weight, bias, False)[0], current)

    nu = torch.randn_like(current)
    g_x, g_weight, *g_bias = torch.autograd.grad(wanted, leaves, nu)
    g_x = g_x.flatten(2)
    found = backward(
        *(conv, train, weight, nu, winners), weight_grad=True, bias_grad=bias is not None, input="active"
    )
    assert relative(found[0], g_weight) <= tolerance
    if bias is not None:
        assert relative(found[1], g_bias[0]) <= tolerance
    assert relative(found[2], at_active(g_x, train.active)) <= tolerance
    options = {"weight_grad": False, "bias_grad": False}
    *others, dense = backward(conv, train, weight, nu, winners, **options, input="dense")
    assert others == [None, None]
    assert relative(dense, g_x) <= tolerance
    assert backward(conv, train, weight, nu, winners, **options, input="none") == (None, None, None)


def test_double_precision(conv):
    torch.manual_seed(0)
    for graded in (False, True):
        check(conv, spikes(conv, dtype=torch.float64, graded=graded), *parameters(conv, torch.float64), 1e-12)


def test_single_precision_is_bit_equal_on_a_binary_grid(conv):
    torch.manual_seed(1)
    weight, bias = (on_grid(*t.shape) for t in parameters(conv))
    check(conv, spikes(conv), weight, bias, 1e-5, exact=True)
    check(conv, spikes(conv), weight, None, 1e-5, exact=True)


def test_windows_of_more_places_than_a_byte_counts():
    torch.manual_seed(6)
    conv = conv2(size=(19, 18), pool=max2((17, 16), 1))
    weight, bias = (on_grid(*t.shape) for t in parameters(conv))
    check(conv, spikes(conv), weight, bias, 1e-5, exact=True)


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["silent", "all spike"])
def test_densities_at_the_ends(conv, density):
    torch.manual_seed(2)
    # where all spike, all sums are equal but for rounding, and a maximum of them would be any
    weight, bias = (on_grid(*t.shape).double() for t in parameters(conv))
    check(conv, spikes(conv, density, dtype=torch.float64), weight, bias, 1e-12, exact=True)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("pool", [None, max2(), avg2()], ids=["none", "max", "average"])
def test_no_rows(shape, pool):
    conv = conv2(pool=pool)
    check(conv, torch.zeros(*shape, 3, 9, 8), *parameters(conv), 0.0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    conv = conv2((3, 20), pool=max2())
    with torch_threads(threads):
        for shape in ((1, 1), (7, 1), (1, 7)):
            x = spikes(conv, 0.3, *shape, dtype=torch.float64)
            check(conv, x, *parameters(conv, torch.float64), 1e-12)


def test_memory_that_is_not_contiguous():
    torch.manual_seed(3)
    conv = conv2((6, 20), pool=max2())
    weight, bias = parameters(conv, torch.float64)
    weight = weight.to(memory_format=torch.channels_last)
    bias = torch.stack([bias, bias], 1)[:, 0]
    x = spikes(conv, dtype=torch.float64)
    check(conv, x, weight, bias, 1e-12)

    train = SpikeTrain.from_dense(x)
    _, winners = forward(conv, train, weight, bias, True)
    nu = torch.randn(conv.out_features, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    for input in ("none", "dense"):
        options = {"weight_grad": True, "bias_grad": True, "input": input}
        found = backward(conv, train, weight, nu, winners, **options)
        wanted = backward(conv, train, weight, nu.contiguous(), winners, **options)
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("channels", [3, 20], ids=["narrow", "whole vectors"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_ties_and_what_is_not_finite(channels, kind):
    """The gradient goes where torch's goes: to the first of equal maxima, to the last NaN, and for windows of nothing
    but -inf to their first place."""
    torch.manual_seed(4)
    values = torch.tensor([-math.inf, -math.inf, -math.inf, -1.0, 0.0, 1.0, math.inf, math.nan], dtype=kind)
    conv = conv2((len(values), channels), size=(12, 12), kernel=1, pool=max2(3, 2, 1, ceil_mode=True))
    which = torch.randint(len(values), (30, 2, 1, 12, 12))
    spikes = torch.zeros(30, 2, len(values), 12, 12, dtype=kind).scatter_(2, which, 1)
    train = SpikeTrain.from_dense(spikes)
    weight = values.view(1, -1, 1, 1).expand(channels, -1, 1, 1)
    current, winners = forward(conv, train, weight, None, True)

    maps = values[which].expand(-1, -1, channels, -1, -1).clone().requires_grad_()
    wanted = F.max_pool2d(maps.flatten(0, 1), 3, 2, 1, ceil_mode=True).reshape(30, 2, -1)
    assert torch.equal(current.nan_to_num(7e7, 8e8, 9e9), wanted.nan_to_num(7e7, 8e8, 9e9))
    nu = torch.randint(1, 9, current.shape).to(kind)
    g_maps = torch.autograd.grad(wanted, maps, nu)[0]
    # channel k sends on its own: each of the input's channels is told of one of the map's
    apart = (torch.arange(channels)[:, None] == torch.arange(len(values))).to(kind).view_as(weight)
    _, _, found = backward(conv, train, apart, nu, winners, weight_grad=False, bias_grad=False, input="dense")
    told = min(channels, len(values))
    assert torch.equal(found.view_as(spikes)[:, :, :told], g_maps[:, :, :told])


def test_gradients_alone(conv):
    """Each gradient is the same whichever others are asked for."""
    torch.manual_seed(5)
    weight, bias = parameters(conv)
    train = listed(conv, spikes(conv))
    current, winners = forward(conv, train, weight, bias, True)
    nu = torch.randn_like(current)
    every = backward(conv, train, weight, nu, winners, weight_grad=True, bias_grad=True, input="active")
    for k in range(3):
        alone = backward(
            *(conv, train, weight, nu, winners),
            weight_grad=k == 0,
            bias_grad=k == 1,
            input="active" if k == 2 else "none",
        )
        assert torch.equal(alone[k], every[k])
        assert all(g is None for j, g in enumerate(alone) if j != k)


sides = st.integers(1, 3)


@st.composite
def convolutions(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    several = st.tuples(*[sides] * dims)
    kernel, dilation = draw(several), draw(several)
    padding = draw(st.tuples(*[st.integers(0, 2)] * dims))
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(max(1, s - 2 * p) + draw(st.integers(0, 6)) for s, p in zip(span, padding, strict=True))
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.sampled_from([1, 2, 7, 16, 19]))
    conv = Convolution(*channels, size, kernel, draw(several), padding, dilation, groups)
    kind = draw(st.sampled_from(["none", "max", "avg"]))
    if kind == "none":
        return conv
    window = tuple(draw(st.integers(1, min(3, n))) for n in conv.map_size)
    padding = tuple(draw(st.integers(0, n // 2)) for n in window)
    if kind == "max":
        pool = Pool("max", window, draw(several), padding, (1,) * dims, draw(st.booleans()))
    else:
        pool = Pool(
            *("avg", window, draw(several), padding, (), draw(st.booleans()), draw(st.booleans())),
            divisor_override=draw(st.sampled_from([None, 3])) if dims > 1 else None,
        )
    return Convolution(*channels, size, kernel, conv.stride, conv.padding, dilation, groups, pool)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(0, 2**16), st.sampled_from([0.05, 0.5]))
def test_any_convolution(conv, seed, density):
    torch.manual_seed(seed)
    x = spikes(conv, density, T=3, B=2, dtype=torch.float64, graded=seed % 2 == 0)
    check(conv, x, *parameters(conv, torch.float64), 1e-12)


def test_events_are_preferred_where_they_are_few():
    conv = conv2((12, 64), size=(12, 12), kernel=5)
    assert prefers_events(conv, 0.05, masked=True)
    assert not prefers_events(conv, 0.9, masked=True)
    preferred = [prefers_events(conv, k / 100, masked=True) for k in range(100)]
    assert preferred == sorted(preferred, reverse=True)


def test_a_maximum_without_its_winners_says_so():
    conv = conv2(pool=max2())
    weight, bias = parameters(conv)
    train = SpikeTrain.from_dense(spikes(conv))
    current, winners = forward(conv, train, weight, bias, False)
    assert winners is None
    with pytest.raises(ValueError, match="keep_winners=True"):
        backward(conv, train, weight, current, None, weight_grad=True, bias_grad=False, input="none")
