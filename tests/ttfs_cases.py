"""Checks of the TTFS op that every backend has to pass; the reference is the oracle."""

import math

import pytest
import torch
from helpers import relative
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_sparse_plugin.ops.ttfs import SILENT, get_kernel, spike_table, ttfs

KERNELS = {"exp": (10.0, 0.5), "power-of-two": (6.0, 0.25), "linear": (40.0, 1.0)}


def problem(kernel="exp", window=32, shape=(1000,), dtype=torch.float32, rounding="ceil", tau=None):
    """x over all three regions and both signs, exact thresholds and extreme values among it."""
    default, t_d = KERNELS[kernel]
    tau = torch.tensor(tau or default, dtype=dtype, requires_grad=True)
    t_d = torch.tensor(t_d, dtype=dtype, requires_grad=True)
    table = spike_table(get_kernel(kernel), window, tau, t_d, rounding=rounding, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    flat = x.view(-1)
    special = torch.cat(
        [
            table.flatten(),
            torch.nextafter(table[0], torch.zeros_like(table[0])),
            torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-42, 1e30, -1e30], dtype=dtype),
        ]
    )
    n = min(len(special), flat.numel())
    flat[:n] = special[:n]
    return x.requires_grad_(), table, tau, t_d


class TtfsTests:
    device = "cpu"
    backend = "cpu"
    truncates = ()  # dtypes that are not rounded to the nearest there

    def same(self, found, expected):
        """Equal numbers of half precision, to the bit where the device rounds."""
        if expected.dtype in self.truncates:
            return torch.allclose(
                found.float(), expected.float(), rtol=torch.finfo(expected.dtype).eps, atol=1e-30
            )
        return torch.equal(found, expected)

    def run(self, arguments, kernel, backend):
        x, table, tau, t_d = (a.detach().to(self.device).requires_grad_(a.requires_grad) for a in arguments)
        out, times = ttfs(x, table, tau, t_d, kernel=kernel, backend=backend)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        g = torch.where(x.isinf(), 0, g)
        grads = torch.autograd.grad(out, (x, tau, t_d), g)
        return out.detach(), times, *grads

    def compare(self, arguments, kernel):
        found = self.run(arguments, kernel, self.backend)
        expected = self.run([a.double() for a in arguments], kernel, "reference")
        exact = self.run(arguments, kernel, "reference")
        assert torch.equal(found[1], exact[1])
        assert torch.equal(found[0], exact[0])
        tolerance = 1e-12 if found[0].dtype == torch.float64 else 1e-5
        # the parameters' gradients are sums with cancellation: compare with the sum of sizes
        scale = (found[0].abs().sum() + 1).double()
        assert relative(torch.nan_to_num(found[2].double()), torch.nan_to_num(expected[2])) <= tolerance
        for a, b in zip(found[3:], expected[3:], strict=True):
            assert abs(a.double() - b) <= tolerance * max(scale * 1e-1, abs(b))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("rounding", ["ceil", "nearest", "floor"])
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_equals_the_reference(self, kernel, rounding, dtype):
        self.compare(problem(kernel, rounding=rounding, dtype=dtype), kernel)

    @pytest.mark.parametrize(("window", "tau"), [(2, 10.0), (7, 0.4), (32, 1.3), (255, 200.0), (200, 5000.0)])
    def test_windows_and_time_constants(self, window, tau):
        self.compare(problem(window=window, tau=tau), "exp")

    @pytest.mark.parametrize("window", [2, 3, 31, 32, 33, 127, 128, 255])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_every_neighbour_of_every_threshold(self, window, dtype):
        """Where a search by arithmetic would be wrong: at each threshold, two numbers below and two above it."""
        for kernel, tau in (("exp", 9.7), ("exp", 1e9), ("power-of-two", 20.0), ("linear", 1000.0)):
            table = spike_table(get_kernel(kernel), window, tau, 0.3, dtype=dtype)
            down, up = torch.tensor([-math.inf, math.inf], dtype=dtype)
            below, above = torch.nextafter(table[0], down), torch.nextafter(table[0], up)
            special = torch.tensor(
                [0.0, -0.0, 1e-45, math.inf, -math.inf, math.nan, -math.nan, -1.0], dtype=dtype
            )
            near = [torch.nextafter(below, down), below, table[0], above, torch.nextafter(above, up), special]
            x, numbers = torch.cat(near), [torch.tensor(p, dtype=dtype) for p in (tau, 0.3)]
            out, times = ttfs(
                *(a.to(self.device) for a in (x, table, *numbers)), kernel=kernel, backend=self.backend
            )
            expected = ttfs(x, table, *numbers, kernel=kernel, backend="reference")
            assert torch.equal(times.cpu(), expected[1])
            assert torch.equal(out.cpu().nan_to_num(-1), expected[0].nan_to_num(-1))

    @settings(max_examples=30, deadline=None)
    @given(
        window=st.integers(2, 255), dtype=st.sampled_from([torch.float32, torch.float64]), data=st.data(),
        kernel=st.sampled_from(sorted(KERNELS)), rounding=st.sampled_from(["ceil", "nearest", "floor"]),
    )  # fmt: skip
    def test_any_number(self, window, dtype, data, kernel, rounding):
        tau = torch.tensor(data.draw(st.floats(2 * window, 1e6, width=32)), dtype=dtype)
        table = spike_table(get_kernel(kernel), window, tau, 0.0, rounding=rounding, dtype=dtype)
        width = 32 if dtype == torch.float32 else 64
        x = torch.tensor(data.draw(st.lists(st.floats(width=width), min_size=1, max_size=50)), dtype=dtype)
        x = torch.cat([x, x.abs().remainder(1.1)])
        arguments = x, table, tau, torch.zeros((), dtype=dtype)
        out, times = ttfs(*(a.to(self.device) for a in arguments), kernel=kernel, backend=self.backend)
        expected = ttfs(*arguments, kernel=kernel, backend="reference")
        assert torch.equal(times.cpu(), expected[1])
        assert torch.equal(out.cpu().nan_to_num(-1), expected[0].nan_to_num(-1))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_half_precisions_are_computed_in_float32(self, kernel, dtype):
        x, table, tau, t_d = problem(kernel, shape=(1500,))
        half = x.detach().nan_to_num(posinf=3, neginf=-3).to(dtype).requires_grad_()
        found = self.run((half, table, tau, t_d), kernel, self.backend)
        wide = self.run((half.detach().float().requires_grad_(), table, tau, t_d), kernel, self.backend)
        assert (found[0].dtype, found[2].dtype) == (dtype, dtype)
        assert torch.equal(found[1], wide[1])
        assert self.same(found[0], wide[0].to(dtype))
        g = (
            torch.randn(half.shape, generator=torch.Generator().manual_seed(1))
            .to(dtype)
            .float()
            .to(self.device)
        )
        exact = half.detach().float().to(self.device).requires_grad_()
        given = [a.detach().to(self.device) for a in (table, tau, t_d)]
        out, _ = ttfs(exact, *given, kernel=kernel, backend=self.backend)
        (expected,) = torch.autograd.grad(out, exact, g)
        assert self.same(found[2], expected.to(dtype))
        assert found[3].isfinite()

    @pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 2), (2, 3, 5, 7), (1025,)], ids=str)
    def test_shapes(self, shape):
        self.compare(problem(shape=shape), "exp")

    def test_nan_stays_nan_and_does_not_fire(self):
        x, table, tau, t_d = problem(shape=(70,))
        with torch.no_grad():
            x[3], x[66] = math.nan, -math.nan
        out, times, d_x, d_tau, _ = self.run((x, table, tau, t_d), "exp", self.backend)
        assert out.isnan().nonzero().flatten().tolist() == [3, 66]
        assert times[3] == times[66] == SILENT
        assert d_x.isnan().nonzero().flatten().tolist() == [3, 66]
        assert d_tau.isfinite()

    @pytest.mark.parametrize("form", ["channels_last", "transposed", "strided", "expanded"])
    def test_memory_orders(self, form):
        x, table, tau, t_d = problem(shape=(2, 3, 4, 5))
        x = x.detach().to(self.device)
        view = {
            "channels_last": lambda: x.to(memory_format=torch.channels_last),
            "transposed": lambda: x.transpose(1, 3),
            "strided": lambda: x[:, :, ::2],
            "expanded": lambda: x[:1].expand(4, -1, -1, -1),
        }[form]()
        table, tau, t_d = (a.detach().to(self.device) for a in (table, tau, t_d))
        leaf = view.detach().requires_grad_()
        out, times = ttfs(leaf, table, tau, t_d, backend=self.backend)
        expected = ttfs(view.contiguous().requires_grad_(), table, tau, t_d, backend="reference")
        assert torch.equal(out, expected[0])
        assert torch.equal(times, expected[1])
        g = torch.randn(view.shape).to(self.device).transpose(0, 1).contiguous().transpose(0, 1)
        (d_x,) = torch.autograd.grad(out, leaf, g)
        ratio = torch.where((out > 0) & (view <= table[1, 0]), out / view, 0)
        torch.testing.assert_close(d_x, (g * ratio).detach(), rtol=1e-5, atol=1e-7)
