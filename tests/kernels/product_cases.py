"""Products with spikes, against dense ones."""

import pytest
import torch

from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.equations import Equations
from snn_sparse_plugin.ops import spiking_layer


def close(got, expected):
    scale = expected.double().norm().clamp(min=1e-30)
    assert ((got.double() - expected.double()).norm() / scale).item() < (
        1e-12 if got.dtype == torch.float64 else 1e-6
    )


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
