"""Products with spikes, against dense ones."""

import pytest
import torch

from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.equations import Equations
from snn_sparse_plugin.ops import spiking_layer


def close(got, expected, within=1e-6):
    scale = expected.double().norm().clamp(min=1e-30)
    error = ((got.double() - expected.double()).norm() / scale).item()
    assert error < (1e-12 if got.dtype == torch.float64 else within)


def as_pairs(x):
    """float32 as pairs of bf16 numbers, the smaller first."""
    high = x.bfloat16()
    high = torch.where(x.isfinite() & high.isinf(), torch.full_like(high, 3.38e38).copysign(high), high)
    low = torch.where(x.isinf(), 0.0, x - high.float()).bfloat16()
    return torch.stack([low, high], -1).view(torch.float32).squeeze(-1)


class ProductTests:
    device: str

    def spikes(self, T, B, M, density=0.2):
        made = torch.rand(T, B, M, generator=torch.Generator().manual_seed(T + M)) < density
        return made.float().to(self.device)

    @pytest.mark.parametrize("graded", [False, True])
    @pytest.mark.parametrize(
        ("T", "B", "M", "N"), [(3, 2, 5, 4), (7, 3, 64, 33), (40, 2, 33, 1), (0, 2, 5, 4)]
    )
    def test_equal_dense_products(self, T, B, M, N, graded):
        from snn_sparse_plugin.triton_kernels import products

        x = self.spikes(T, B, M)
        if graded:
            x = x * torch.randn(x.shape, device=self.device)
        x[..., 31:32] = 1  # the sign bit of a word
        torch.manual_seed(0)
        weight, bias, nu = (torch.randn(*s, device=self.device) for s in ((N, M), (N,), (T, B, N)))
        words, values = products.packed(x), x if graded else None
        close(products.current(words, values, weight, bias), torch.nn.functional.linear(x, weight, bias))
        expected = torch.einsum("tbn,tbm->nm", nu, x)
        close(products.weight_gradient(nu, words, values, M), expected)

    def test_double_precision(self):
        from snn_sparse_plugin.triton_kernels import products

        x = self.spikes(5, 2, 40).double()
        weight, nu = (torch.randn(*s, dtype=torch.float64, device=self.device) for s in ((6, 40), (5, 2, 6)))
        words = products.packed(x)
        close(products.current(words, x, weight, None), x @ weight.t())
        close(products.weight_gradient(nu, words, None, 40), torch.einsum("tbn,tbm->nm", nu, x))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("T", "B", "M", "N"), [(3, 2, 5, 4), (40, 2, 33, 12)])
    def test_three_terms_of_a_weight_are_all_of_it(self, T, B, M, N, bias, monkeypatch):
        from snn_sparse_plugin.triton_kernels import products, terms

        monkeypatch.setattr(terms, "_LONGEST_OF_SPIKES", 40)
        monkeypatch.setattr(terms, "_blocks", lambda rows, _: [(0, rows // 2), (rows // 2, rows - rows // 2)])
        x = self.spikes(T, B, M, 0.5)
        torch.manual_seed(0)
        weight = torch.randn(M, N, device=self.device).t()  # not contiguous
        added = torch.randn(N, device=self.device) if bias else None
        close(
            terms.current(products.packed(x), weight, added),
            torch.nn.functional.linear(
                x.double(), weight.double(), None if added is None else added.double()
            ),
        )

    @pytest.mark.parametrize(("T", "B", "M", "N"), [(3, 2, 5, 4), (40, 2, 33, 12)])
    def test_pairs_are_close_to_float32(self, T, B, M, N, monkeypatch):
        from snn_sparse_plugin.triton_kernels import products, terms

        monkeypatch.setattr(terms, "_LONGEST_OF_PAIRS", 8)
        torch.manual_seed(0)
        nu, weight = torch.randn(T, B, N, device=self.device), torch.randn(N, M, device=self.device)
        pairs, odd = as_pairs(nu), torch.zeros(1, dtype=torch.int32, device=self.device)
        close(terms.input_gradient(pairs, odd, weight), nu.double() @ weight.double(), 5e-6)
        assert not odd
        x = self.spikes(T, B, M)
        expected = torch.einsum("tbn,tbm->nm", nu.double(), x.double())
        close(products.weight_gradient(pairs, products.packed(x), None, M, True), expected, 5e-6)

    @pytest.mark.parametrize("where", ["weight", "nu"])
    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
    def test_what_is_not_finite_leaves_as_from_a_float32_product(self, value, where):
        from snn_sparse_plugin.triton_kernels import terms

        torch.manual_seed(0)
        nu, weight = torch.rand(4, 2, 8, device=self.device) + 0.5, torch.randn(8, 40, device=self.device)
        if where == "nu":
            nu[1, 0, 3] = value
        else:
            weight[2, 5] = value
        odd = torch.zeros(1, dtype=torch.int32, device=self.device)
        if where == "nu" and not abs(value) < float("inf"):
            odd += 1  # as the scan says
        got, expected = terms.input_gradient(as_pairs(nu), odd, weight), nu @ weight
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(expected))
        finite = torch.isfinite(expected)
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-4)

    def test_an_infinite_weight_stays_infinite_in_three_terms(self):
        from snn_sparse_plugin.triton_kernels import products, terms

        weight = torch.randn(8, 3, device=self.device)
        weight[2, 1], weight[3, 0] = float("inf"), float("nan")
        x = torch.ones(4, 2, 3, device=self.device)
        got = terms.current(products.packed(x), weight, None)
        assert torch.equal(torch.isposinf(got), torch.isposinf(x @ weight.t()))
        assert torch.equal(torch.isnan(got), torch.isnan(x @ weight.t()))

    @pytest.mark.parametrize("equations", [False, True], ids=["leaky", "two inputs"])
    def test_a_layer_by_terms(self, equations, monkeypatch):
        from equation_cases import CONDUCTANCE

        from snn_sparse_plugin.core.spikes import SpikeTrain
        from snn_sparse_plugin.triton_kernels import choice, crossovers, terms

        used = []
        table = crossovers.H100._replace(terms_from=0, rows_below_terms=((float("inf"), 0.0),))
        monkeypatch.setattr(choice, "of_device", lambda _: table)
        monkeypatch.setattr(choice, "_seen", {})
        for name in ("current", "input_gradient"):
            made = getattr(terms, name)
            monkeypatch.setattr(terms, name, lambda *a, made=made, name=name: used.append(name) or made(*a))
        inputs = 2 if equations else 1
        options = {"params": NeuronParams(mem=0.9, threshold=0.5)}
        if equations:
            names = CONDUCTANCE.program.params
            options = {"spec": CONDUCTANCE, "params": dict.fromkeys(names, 0.5)}
        g = torch.Generator().manual_seed(0)
        weight = (torch.randn(inputs * 8, 6, generator=g) * 64).round().div(256).to(self.device)
        bias = (torch.randn(inputs * 8, generator=g) * 64).round().div(256).to(self.device)
        words, upstream = self.spikes(36, 2, 6, 0.5), torch.randn(36, 2, 8, generator=g).to(self.device)

        def train(backend):
            leaves = [x.clone().requires_grad_() for x in (words, weight, bias)]
            x = SpikeTrain.from_dense(leaves[0], binary=True)
            for _ in range(2):  # the density is known at the second call
                out = spiking_layer(x, *leaves[1:], backend=backend, **options).spikes
                if self.device == "cuda":
                    torch.cuda.synchronize()
            out.backward(upstream)
            return out.detach(), [x.grad for x in leaves]

        got, grads = train("triton")
        expected, expected_grads = train("reference")
        assert torch.equal(got, expected)
        assert {"current", "input_gradient"} <= set(used)
        for grad, want in zip(grads, expected_grads, strict=True):
            close(grad, want, 1e-5)

    def test_a_scan_says_that_nu_is_not_finite(self, monkeypatch):
        from snn_sparse_plugin.core.spikes import SpikeTrain
        from snn_sparse_plugin.triton_kernels import choice, crossovers

        weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(self.device)
        x, upstream = self.spikes(6, 2, 6, 0.5), torch.ones(6, 2, 8, device=self.device)
        upstream[2, 1, 4] = float("inf")

        def grads(terms_from):
            monkeypatch.setattr(
                choice, "of_device", lambda _: crossovers.H100._replace(terms_from=terms_from)
            )
            leaf = x.clone().requires_grad_()
            train = SpikeTrain.from_dense(leaf, binary=True)
            options = {"params": NeuronParams(mem=0.9), "backend": "triton", "backprop_threshold": None}
            spiking_layer(train, weight, **options).spikes.backward(upstream)
            return leaf.grad

        got, expected = grads(0), grads(float("inf"))
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(expected))
        assert expected.isinf().any()

    def test_crossovers_are_measured(self):
        from snn_sparse_plugin.triton_kernels import tune

        times, told = iter(range(1, 100)), []

        def timer(run):
            run()
            return next(times)

        device = torch.device(self.device)
        sizes = {"widths": ((8, 64), (12, float("inf"))), "rows": (4, 8)}
        found = tune.measure(device, **sizes, timer=timer, tell=told.append)
        assert [width for width, _ in found.rows_below_float32] == [64, float("inf")]
        # each call takes longer than the one before: rows always win, and terms never do
        assert {x for limits in found[:3] for _, x in limits} == {1.0}
        assert found.terms_from == float("inf")
        assert len(told) == 7
        falling = iter(range(100, 0, -1))
        found = tune.measure(device, **sizes, timer=lambda run: next(falling), tell=told.append)
        assert {x for limits in found[:3] for _, x in limits} == {0.0}
        assert found.terms_from == 4 * 8 * 8

    @pytest.mark.parametrize(("other", "expected"), [(0.5, 0.0), (3.5, 0.03), (4, 0.04), (8, 1.0)])
    def test_where_times_cross(self, other, expected):
        from snn_sparse_plugin.triton_kernels import tune

        assert tune.crossing([1, 2, 3, 4, 5, 6, 7], other) == pytest.approx(expected)

    def test_words_are_those_of_the_package(self):
        from snn_sparse_plugin.core.bits import pack
        from snn_sparse_plugin.triton_kernels import products

        x = self.spikes(9, 2, 70)
        assert torch.equal(products.packed(x), pack(x))

    def test_rows_are_added_where_few_numbers_are_not_zero(self, monkeypatch):
        from snn_sparse_plugin.triton_kernels import choice

        monkeypatch.setattr(choice, "_seen", {})
        weight = torch.empty(10, 50, device=self.device)

        def ways(density, name):
            x = self.spikes(20, 4, 50, density)
            found = []
            for _ in range(3):
                found.append(choice.adds_rows(name, x, weight))
                if self.device == "cuda":
                    torch.cuda.synchronize()
            return found

        assert ways(0.05, "sparse")[1:] == [True, True]
        assert ways(0.9, "dense") == [False, False, False]
        assert ways(0.01, "dense")[-1]  # turned sparse: it is looked at again at calls 4, 8 and so on

    @pytest.mark.parametrize("forward", [False, True], ids=["library", "rows"])
    def test_backward_replays_the_sums_of_the_forward(self, forward, monkeypatch):
        # sums in another order differ in the last bit, and a replay would spike where the forward did not
        from snn_sparse_plugin.triton_kernels import choice, products

        asked, added = [], []

        def adds_rows(*_):
            asked.append(
                forward if not asked else not forward
            )  # a count that arrives in between changes the choice
            return asked[-1]

        current = products.current
        monkeypatch.setattr(choice, "adds_rows", adds_rows)
        monkeypatch.setattr(products, "current", lambda *args: added.append(1) or current(*args))
        weight = torch.randn(6, 5, device=self.device, requires_grad=True)
        x = self.spikes(6, 2, 5)
        spiking_layer(x, weight, params=NeuronParams(mem=0.9), backend="triton").spikes.sum().backward()
        assert asked == [forward]
        assert len(added) == 2 * forward

    def test_a_neuron_whose_names_a_kernel_needs_itself(self):
        spec = Equations("tl = T * tl + x - r7\ns = spike(tl - N)", ("tl",), membrane="tl")
        params = {"T": 0.9, "r7": 0.01, "N": 0.5}
        x = torch.rand(6, 2, 5, generator=torch.Generator().manual_seed(0)).to(self.device)

        def run(backend):
            leaf = x.clone().requires_grad_()
            out = spiking_layer(leaf, spec=spec, params=params, backend=backend, return_mem=True)
            (out.spikes.sum() + out.mem.square().sum()).backward()
            return out.spikes, out.mem, leaf.grad

        for got, expected in zip(run("triton"), run("reference"), strict=True):
            close(got, expected)
