"""What a newcomer does wrong, and that the error says what was expected, what came, where, and what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from snn_sparse_plugin import EProp, InputError, SparsePluginError, sparse_mode, sparsify, unroll

snntorch = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, 16),
        snntorch.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(16, 5),
        snntorch.Leaky(beta=0.9, init_hidden=True, output=True),
    )


X = torch.ones(6, 4, 20)


def elsewhere() -> nn.Sequential:
    net = network()
    net[0].to("meta")
    return net


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: unroll(network(), X[..., :19]),
            "0→1: input has shape (6, 4, 19), weight expects 20 features",
        ),
        (
            lambda: unroll(network(), X[:, 0]),
            "steps first, then samples, got (6, 20). One sample is x.unsqueeze(1)",
        ),
        (
            lambda: unroll(network(), X.double()),
            "0→1: weight is torch.float32, the input torch.float64; convert the input",
        ),
        (
            lambda: unroll(network().half(), X.half()),
            "keep the network and its input float32 and compute in half precision",
        ),
        (
            lambda: unroll(elsewhere(), X),
            "0→1: weight is on meta, the input on cpu; move the input with x.to('meta')",
        ),
        (lambda: unroll(network(), X.numpy()), "got ndarray. Write torch.from_numpy(x)."),
        (lambda: unroll(X, network()), "got Sequential. The network comes first: unroll(net, x)."),  # type: ignore[arg-type]
    ],
    ids=["features", "batch", "float64", "half", "device", "numpy", "order"],
)
def test_unroll(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert words in str(raised.value)


def loops(net: nn.Sequential, batches: int) -> None:
    for _ in range(batches):
        torch.stack([net(x)[0] for x in X]).sum().backward()


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="exceptions have notes from Python 3.11 on")
def test_a_state_that_is_not_begun_anew_with_the_batch() -> None:
    with pytest.raises(RuntimeError, match="second time") as upstream:
        loops(network(), 2)
    with sparse_mode(), pytest.raises(RuntimeError, match="second time") as raised:
        loops(network(), 2)
    assert str(raised.value) == str(upstream.value)
    (note,) = raised.value.__notes__
    for words in ("Linear→Leaky: ", "snntorch.utils.reset(net)", "mem.detach()", "retain_graph=True"):
        assert words in note


def test_a_network_is_sparsified_twice() -> None:
    net = network()
    first, second = sparsify(net, backprop_threshold=0.1), sparsify(net, backprop_threshold=0.2)
    assert first.names("fused") == second.names("fused") == ["1", "3"]
    assert second.config.backprop_threshold == 0.2


def test_a_state_is_reset_without_its_traces() -> None:
    net = network()
    with EProp(net) as learner:
        learner.reset()  # before any step there is nothing to forget
        learner.step(net(X[0])[0].sum())
        utils.reset(net)
        with pytest.raises(SparsePluginError, match=r"traces did not.*learner\.reset\(\)"):
            learner.step(net(X[1])[0].sum())
