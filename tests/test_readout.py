"""Readouts over each sample's own steps."""

from __future__ import annotations

import pytest
import torch

from snn_sparse_plugin import InputError, SpikeTrain, readout

T, B, N = 7, 4, 3
LENGTHS = [0, 7, 3, 1]
BY_HAND = {
    "counts": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0).values,
    "last": lambda x: x[-1],
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("features", [(), (N,), (2, N)])
def test_own_steps_only(name: str, features: tuple[int, ...]) -> None:
    x = torch.randn(T, B, *features, dtype=torch.float64)
    for b, n in enumerate(LENGTHS):
        x[n:, b] = torch.nan  # what is padded is never looked at
    x.requires_grad_()
    out = getattr(readout, name)(x, LENGTHS)
    expected = torch.stack(
        [BY_HAND[name](x[:n, b]) if n else x.new_zeros(features) for b, n in enumerate(LENGTHS)]
    )
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, x, g)[0], torch.autograd.grad(expected, x, g)[0])


@pytest.mark.parametrize("name", BY_HAND)
def test_all_steps(name: str) -> None:
    x = (torch.rand(T, B, N) < 0.4).float()
    expected = BY_HAND[name](x)
    for given in (x, SpikeTrain.from_dense(x)):
        torch.testing.assert_close(getattr(readout, name)(given), expected)
        torch.testing.assert_close(getattr(readout, name)(given, torch.full((B,), T)), expected)


@pytest.mark.parametrize("name", BY_HAND)
def test_no_steps(name: str) -> None:
    assert torch.equal(getattr(readout, name)(torch.empty(0, B, N), [0] * B), torch.zeros(B, N))


def test_one_step_gets_the_gradient_of_a_maximum() -> None:
    x = torch.ones(T, B, N, requires_grad=True)
    readout.max(x, LENGTHS).sum().backward()
    assert x.grad.sum() == 3 * N


@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        (torch.ones(T, B, N), [1, 2], r"expected \(4,\)"),
        (torch.ones(T, B, N), [8, 0, 0, 0], "got 8 for sample 0"),
        (torch.ones(T, B, N, dtype=torch.int64), LENGTHS, "floating dtype"),
        (torch.ones(T), LENGTHS, r"got \(7,\)"),
        ([1.0], LENGTHS, "got list"),
    ],
)
def test_wrong_input(x, lengths, message: str) -> None:
    with pytest.raises(InputError, match=message):
        readout.mean(x, lengths)
