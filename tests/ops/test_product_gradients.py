"""A narrow layer on a wide one: its input gradient stays a product, and its membrane is kept instead of replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snn_sparse_plugin import SpikeTrain
from snn_sparse_plugin.backends.product import ProductGrad
from snn_sparse_plugin.core.dynamics import NeuronParams, NeuronSpec
from snn_sparse_plugin.ops import spiking_layer

T, B, M, N, K = 37, 3, 6, 35, 4  # more steps than a chunk, rows that are no whole vectors
EXACT: dict[str, Any] = {"backprop_threshold": None}


@pytest.fixture
def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(T, B, M, generator=g) + 0.4
    wide, narrow = torch.rand(N, M, generator=g) + 0.1, torch.rand(K, N, generator=g) * 0.1
    return [t.double().requires_grad_() for t in (x, wide, narrow)]


def network(
    tensors: list[Tensor], backend: str, spec: NeuronSpec, mem: bool = True, twice: bool = False
) -> tuple[Tensor, Any]:
    x, wide, narrow = tensors
    options: dict[str, Any] = {**EXACT, "backend": backend, "spec": spec}
    params = NeuronParams(mem=0.9, syn=0.5, threshold=0.5)
    spikes = spiking_layer(x, wide, params=params, events=True, **options).spikes
    out = spiking_layer(spikes, narrow, params=params, return_mem=mem, **options)
    loss = (out.spikes * torch.linspace(1, 2, K)).sum()
    if mem:
        loss = loss + (out.mem**2).mean()
    if twice:
        loss = loss + (spikes.to_dense() * torch.linspace(0, 1, N)).sum()
    return loss, (spikes, out)


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors, retain_graph=True))


SPECS = [
    NeuronSpec(),
    NeuronSpec(synapse=True),
    NeuronSpec(reset="none"),
    NeuronSpec(timing="immediate"),
    NeuronSpec(reset="zero"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.reset}-{s.timing}-{s.synapse}")
@pytest.mark.parametrize("mem", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_equals_the_reference(tensors: list[Tensor], spec: NeuronSpec, mem: bool, twice: bool) -> None:
    found, (spikes, out) = network(tensors, "cpu", spec, mem, twice)
    expected, (_, reference) = network(tensors, "reference", spec, mem, twice)
    assert spikes.events > 4 * T * B * K, "dense enough for the membrane to be kept"
    assert torch.equal(out.spikes, reference.spikes)
    for a, b in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_is_multiplied_outside_the_wide_layer(
    tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, _ = network(tensors, "cpu", NeuronSpec())
    before = gradients(loss, tensors)
    dense = ProductGrad.dense

    def refuse(self: ProductGrad) -> Tensor:
        raise AssertionError("the product was made")

    monkeypatch.setattr(ProductGrad, "dense", refuse)
    for a, b in zip(gradients(loss, tensors), before, strict=True):  # the graph can be used again
        assert torch.equal(a, b)
    twice, _ = network(tensors, "cpu", NeuronSpec(), twice=True)
    with pytest.raises(AssertionError, match="the product was made"):
        gradients(twice, tensors)
    monkeypatch.setattr(ProductGrad, "dense", dense)
    gradients(twice, tensors)


def test_a_weight_may_change_once_it_has_its_gradient(tensors: list[Tensor]) -> None:
    """As with an optimizer step in a hook, which runs before the gradient of the layer below is made."""
    loss, _ = network(tensors, "cpu", NeuronSpec())
    expected = gradients(loss, tensors)
    narrow = tensors[2]

    def update(weight: Tensor) -> None:
        with torch.no_grad():
            weight.data.zero_()

    handle = narrow.register_post_accumulate_grad_hook(update)
    loss.backward()
    handle.remove()
    assert not narrow.any()
    for tensor, grad in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_what_is_kept_is_not_what_was_given(tensors: list[Tensor]) -> None:
    loss, (spikes, _) = network(tensors, "cpu", NeuronSpec(), mem=False)
    expected = gradients(loss, tensors)
    params = NeuronParams(mem=0.9, syn=0.5, threshold=0.5)
    out = spiking_layer(spikes, tensors[2], params=params, return_mem=True, backend="cpu", **EXACT)
    with torch.no_grad():
        out.mem.zero_()
    found = gradients((out.spikes * torch.linspace(1, 2, K)).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_behaves_as_a_tensor() -> None:
    nu, weight = torch.rand(2, 3, 4), torch.rand(4, 5)
    product, expected = ProductGrad(nu, weight), nu @ weight
    assert product.shape == (2, 3, 5)
    for found in (product + 0, product.clone(), product.detach(), product.flatten(1).view(2, 3, 5)):
        assert type(found) is Tensor
        assert torch.equal(found, expected)
    assert str(expected[0, 0, 0].item())[:5] in str(product)
    carrier = torch.zeros(2, 3, 5, requires_grad=True)
    carrier.backward(ProductGrad(nu, weight))
    carrier.backward(ProductGrad(nu, weight))
    assert torch.equal(carrier.grad, 2 * expected)


def test_windows_take_no_product(tensors: list[Tensor]) -> None:
    """Where the wide layer has a list of active entries, the gradient is asked for at these alone."""
    x, wide, narrow = tensors
    params, found = NeuronParams(mem=0.9, threshold=0.5), []
    for backend in ("cpu", "reference"):
        options: dict[str, Any] = {"backprop_threshold": 0.05, "min_active": 0.0, "backend": backend}
        spikes = spiking_layer(x, wide, params=params, events=True, **options).spikes
        assert isinstance(spikes, SpikeTrain)
        out = spiking_layer(spikes, narrow, params=params, **options).spikes
        found.append(gradients(out.sum(), tensors))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
