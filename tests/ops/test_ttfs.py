"""The TTFS op: analytic gradients, the unfused straight-through graph, every backend, torch.library."""

import math

import pytest
import torch
from helpers import relative
from ttfs_cases import KERNELS, TtfsTests, problem

from snn_sparse_plugin import ConfigError, InputError, UnsupportedError, backends
from snn_sparse_plugin.core import registry
from snn_sparse_plugin.ops.ttfs import SILENT, Kernel, get_kernel, register_kernel, spike_table, ttfs

OP = torch.ops.snn_sparse_plugin.ttfs.default


class TestCpu(TtfsTests):
    backend = "cpu"

    def test_many_elements_on_two_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            self.compare(problem(shape=(70_001,)), "exp")
        finally:
            torch.set_num_threads(before)


def test_large_outputs_on_huge_pages():
    x, table, tau, t_d = problem(shape=(2_200_001,))
    found = ttfs(x, table, tau, t_d)
    expected = ttfs(x, table, tau, t_d, backend="reference")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    g = torch.randn(x.shape).where(x.isfinite(), 0)
    a, b = (torch.autograd.grad(out[0], x, g)[0] for out in (found, expected))
    assert relative(a.nan_to_num(), b.nan_to_num()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_that_does_not_fall_ends_and_stays_inside(dtype):
    """Only falling tables mean something; with any other the kernel's search still ends at one of the steps."""
    x = torch.linspace(-2, 2, 999, dtype=dtype)
    mixed = torch.tensor([1.0, -1.0, 3.0, torch.nan, 0.0, 1e-40, -torch.inf, torch.inf])
    for thresholds in (torch.linspace(0.1, 1, 8), mixed, torch.full((8,), torch.nan), -torch.ones(8)):
        table = thresholds.to(dtype).expand(2, -1).contiguous()
        times = ttfs(x, table, torch.tensor(1.0), torch.tensor(0.0), backend="cpu")[1]
        assert bool(((times < 8) | (times == SILENT)).all())


def unfused(x, tau, t_d, window):
    """Elementary autograd operations; the rounding passes its gradient straight through."""
    largest, smallest = torch.exp(t_d / tau), torch.exp(-(window - 1 - t_d) / tau)
    safe = x.clamp(min=1e-300)
    exact = t_d - tau * torch.log(torch.minimum(safe, largest))
    rounded = exact + (torch.ceil(exact) - exact).detach()
    return torch.where(x >= smallest, torch.exp(-(rounded - t_d) / tau), torch.zeros_like(x))


def between(n=4000, low=-0.2, high=1.6):
    return (torch.rand(n, dtype=torch.float64) * (high - low) + low).requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_equal_autograd_of_the_unfused_graph(backend):
    tau = torch.tensor(9.3, dtype=torch.float64, requires_grad=True)
    t_d = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    x, g = between(), torch.randn(4000, dtype=torch.float64)
    table = spike_table(get_kernel("exp"), 32, tau, t_d, dtype=torch.float64)
    out, _ = ttfs(x, table, tau, t_d, backend=backend)
    expected = unfused(x, tau, t_d, 32)
    assert relative(out, expected.detach()) < 1e-14
    found = torch.autograd.grad(out, (x, tau, t_d), g)
    for a, b in zip(found, torch.autograd.grad(expected, (x, tau, t_d), g), strict=True):
        assert b.norm() > 0
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_equal_the_analytic_formulas(backend):
    tau = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    t_d = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    table = spike_table(get_kernel("exp"), 32, tau, t_d, dtype=torch.float64)
    largest = math.exp(0.2)
    for value in (0.01, 0.07, 0.3, 0.99, 1.2, largest + 0.1, 7.0, -1.0):
        x = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        out, times = ttfs(x, table, tau, t_d, backend=backend)
        d_x, d_tau, d_t_d = (float(g) for g in torch.autograd.grad(out.sum(), (x, tau, t_d)))
        if value > largest:  # clipped
            expected = (0.0, -2.0 * largest / 100, largest / 10)
            assert times.tolist() == [0]
        elif value < math.exp(-2.9):  # pruned
            expected = (0.0, 0.0, 0.0)
            assert times.tolist() == [SILENT]
        else:
            exact = 2.0 - 10.0 * math.log(value)
            step = math.ceil(exact)
            xhat = math.exp(-(step - 2.0) / 10)
            assert times.tolist() == [step]
            expected = (xhat / value, xhat * (step - exact) / 100, 0.0)
        assert (d_x, d_tau, d_t_d) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_step_is_the_first_threshold_reached():
    tau = torch.tensor(7.0)
    table = spike_table(get_kernel("exp"), 20, tau, 0.0)
    x = torch.rand(3000) * 1.3
    _, times = ttfs(x, table, tau, torch.tensor(0.0))
    for value, t in zip(x.tolist(), times.tolist(), strict=True):
        first = next((k for k in range(20) if value >= table[0, k].item()), SILENT)
        assert t == first


def test_all_silent_gives_zero_gradients_and_no_nan():
    x, table, tau, t_d = problem(shape=(500,))
    x = torch.zeros(500, requires_grad=True)
    for backend in ("cpu", "reference"):
        out, times = ttfs(x, table, tau, t_d, backend=backend)
        assert (times == SILENT).all()
        for g in torch.autograd.grad(out.sum(), (x, tau, t_d)):
            assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions_compute_in_float32(dtype):
    x, table, tau, t_d = problem(shape=(300,))
    half = x.detach().nan_to_num(posinf=2, neginf=-2).clamp(-3, 3).to(dtype).requires_grad_()
    out, times = ttfs(half, table, tau, t_d)
    full, expected = ttfs(half.detach().float(), table, tau, t_d)
    assert out.dtype == dtype
    assert torch.equal(times, expected)
    assert torch.equal(out, full.to(dtype))
    (g,) = torch.autograd.grad(out.float().sum(), half)
    assert g.dtype == dtype
    assert g.isfinite().all()
    assert g.any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend, kernel):
    x, table, tau, t_d = problem(kernel, shape=(4, 6))
    x = x.detach().nan_to_num(posinf=1, neginf=-1).requires_grad_()
    torch.library.opcheck(OP, (x, table, tau, t_d, get_kernel(kernel).rate, backend))


def test_opcheck_of_another_memory_order():
    x, table, tau, t_d = problem(shape=(2, 3, 4, 5))
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(OP, (x, table, tau, t_d, 1.0, "cpu"))


def test_compiled_equals_eager_without_a_graph_break():
    torch._dynamo.reset()
    x, _, tau, t_d = problem(shape=(50, 6))
    x = torch.randn(50, 6, requires_grad=True)

    def layer(x, tau, t_d):
        table = spike_table(get_kernel("exp"), 32, tau, t_d)
        return ttfs(x, table, tau, t_d)[0].sin().sum()

    found = torch.autograd.grad(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x, tau, t_d), (x, tau, t_d)
    )
    for a, b in zip(found, torch.autograd.grad(layer(x, tau, t_d), (x, tau, t_d)), strict=True):
        assert b.norm() > 0
        assert relative(a, b) < 1e-6


def test_saved_for_backward_is_the_input_and_one_byte():
    x, table, tau, t_d = problem(shape=(4096,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ttfs(x, table, tau, t_d)
    large = [t for t in kept if t.numel() == 4096]
    assert sorted(str(t.dtype) for t in large) == ["torch.float32", "torch.uint8"]
    assert any(t.data_ptr() == x.data_ptr() for t in large)


def test_the_fast_side_is_the_fast_one(counted):
    x, table, tau, t_d = problem(shape=(64,))
    ttfs(x, table, tau, t_d)[0].sum().backward()
    assert counted["cpu", "ttfs"] == counted["cpu", "ttfs_backward"] == 1
    assert not any(name == "reference" for name, _ in counted)


def test_a_backend_without_the_op_is_passed_over(monkeypatch, counted):
    class Other(backends.Backend):
        name, priority = "other", 1000

        def supports(self, op, **_):
            return True, ""

    load_all = registry.load_all
    monkeypatch.setattr(registry, "load_all", lambda group: {"other": Other(), **load_all(group)})
    ttfs(*problem()[:4])
    assert counted["cpu", "ttfs"] == 1


def test_a_kernel_of_ones_own():
    shape = Kernel(
        "square", lambda u: (3 + u) ** 2 / 9, lambda v: 3 * v.sqrt() - 3, lambda v: 2 * v.sqrt() / 3
    )
    register_kernel(shape)
    with pytest.raises(ConfigError, match="'square' already"):
        register_kernel(shape)
    tau = torch.tensor(15.0, dtype=torch.float64, requires_grad=True)
    t_d = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    table = spike_table(shape, 32, tau, t_d, dtype=torch.float64)
    x, g = between(500, high=0.99), torch.randn(500, dtype=torch.float64)
    out, times = ttfs(x, table, tau, t_d, kernel="square")

    exact = t_d - tau * (3 * x.clamp(min=1e-9).sqrt() - 3)
    rounded = exact + (torch.ceil(exact) - exact).detach()
    expected = torch.where(x >= table[0, -1], (3 + (t_d - rounded) / tau) ** 2 / 9, 0.0)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)
    assert (times != SILENT).any()
    for a, b in zip(
        torch.autograd.grad(out, (x, tau), g), torch.autograd.grad(expected, (x, tau), g), strict=True
    ):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_transforms_of_torch_func(kernel):
    """grad, jacrev and gradients of single samples are those of autograd."""
    x, table, tau, t_d = problem(kernel, shape=(6, 20), dtype=torch.float64)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, 20, dtype=torch.float64)

    def loss(x, tau, t_d, g):
        return (ttfs(x, table, tau, t_d, kernel=kernel)[0] * g).sum()

    expected = torch.autograd.grad(loss(x, tau, t_d, g), (x, tau, t_d))
    plain = tuple(a.detach() for a in (x, tau, t_d))
    for a, b in zip(torch.func.grad(loss, (0, 1, 2))(*plain, g), expected, strict=True):
        assert b.norm() > 0
        assert relative(a, b) < 1e-12
    each = torch.func.vmap(torch.func.grad(loss, (1, 2)), (0, None, None, 0))(*plain, g)
    for a, b in zip(each, expected[1:], strict=True):
        assert a.shape == (6,)
        assert relative(a.sum(), b) < 1e-12
    jacobian = torch.func.jacrev(lambda x: ttfs(x, table, tau, t_d, kernel=kernel)[0])(plain[0][0])
    assert relative(jacobian.diagonal() * g[0], expected[0][0]) < 1e-12


def test_a_table_that_wants_a_gradient_gets_none():
    x, table, tau, t_d = problem(shape=(40,))
    leaf = table.clone().requires_grad_()
    out, _ = ttfs(x, leaf * 1.0, tau, t_d)
    out.nan_to_num(posinf=0, neginf=0).sum().backward()
    assert leaf.grad is None


def test_bad_input():
    _, table, tau, t_d = problem()
    with pytest.raises(InputError, match="floating"):
        ttfs(torch.zeros(3, dtype=torch.int64), table, tau, t_d)
    with pytest.raises(InputError, match=r"shape \(2, 2…255\), got \(32,\)"):
        ttfs(torch.zeros(3), table[0], tau, t_d)
    with pytest.raises(ConfigError, match="kernels are exp"):
        ttfs(torch.zeros(3), table, tau, t_d, kernel="sigmoid")
    with pytest.raises(UnsupportedError, match="torch_sparse.*ttfs"):
        ttfs(torch.zeros(3), table, tau, t_d, backend="torch_sparse")
    assert backends.select("auto", "ttfs", device=torch.device("cpu"), dtype=torch.float64).name == "cpu"
