"""Without a block as well, the layer that feeds a sparse neuron runs with it once that has been seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

snn = pytest.importorskip("snntorch")

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin import snntorch as face  # noqa: E402
from snn_sparse_plugin.core.backend import calls  # noqa: E402
from snn_sparse_plugin.fusion import sources  # noqa: E402
from snn_sparse_plugin.fusion.recorded import Recorded  # noqa: E402

T, B, M, N = 8, 3, 12, 6


class Net(nn.Module):
    """A hand-made parent."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1 = nn.Linear(M, N), library.Leaky(beta=0.5)
        self.fc2, self.lif2 = nn.Linear(N, 4), library.Leaky(beta=0.5)
        with torch.no_grad():
            for fc in (self.fc1, self.fc2):
                for p in fc.parameters():
                    p.copy_((p * 64).round() / 16)
        self.kinds: list[type] = []

    def forward(self, x: Tensor) -> Tensor:
        m1, m2, out = torch.zeros(B, N), torch.zeros(B, 4), []
        for step in x:
            current = self.fc1(step)
            self.kinds.append(type(current))
            spikes, m1 = self.lif1(current, m1)
            spikes, m2 = self.lif2(self.fc2(spikes), m2)
            out.append(m2)
        return torch.stack(out)


def passes(net: Any, n: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    found = []
    for _ in range(n):
        net.zero_grad()
        out = net((torch.rand(T, B, M) < 0.4).float())
        out.square().sum().backward()
        found += [out.detach(), *(p.grad.clone() for p in net.parameters())]
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["sparsify", "face"])
def test_it_is_recorded_from_the_third_pass_on(way: str) -> None:
    net = Net(face if way == "face" else snn)
    if way == "sparsify":
        ssp.sparsify(net, backprop_threshold=None)
    found, expected = passes(net, 4), passes(Net(snn), 4)
    assert net.kinds[-T:] == [Recorded] * T
    step = 1 if way == "sparsify" else 5  # a face has its window: the outputs alone
    same(found[::step], expected[::step])


def test_a_list_of_layers_and_a_function() -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(M, N), snn.Leaky(0.5)])
    ssp.sparsify(parts)
    kinds = []
    for _ in range(3):
        mem = torch.zeros(B, N)
        for step in torch.rand(2 * T, B, M):  # enough to be recorded
            current = parts[0](step)
            kinds.append(type(current))
            _, mem = parts[1](current, mem)
        mem.sum().item()
    assert kinds[-1] is Recorded


def test_after_restore_it_runs_at_once() -> None:
    net = Net(snn)
    ssp.sparsify(net)
    passes(net)
    ssp.restore(net)
    net.kinds.clear()
    same(passes(net), passes(Net(snn)))
    assert set(net.kinds) == {Tensor}


def test_layers_that_feed_no_sparse_neuron_run_at_once() -> None:
    net = Net(snn)
    ssp.sparsify(net)
    passes(net)
    other, plain = nn.Linear(M, N), Net(snn)
    assert type(other(torch.rand(B, M))) is Tensor
    same(passes(plain), passes(Net(snn)))
    assert set(plain.kinds) == {Tensor}


def test_the_search_for_the_layer_ends() -> None:
    net, other = Net(snn), nn.Linear(2, 2)
    ssp.sparsify(net)
    net(torch.rand(T, B, M)).sum().item()
    for _ in range(sources.SEARCH + 1):
        other(torch.zeros(1, 2))
    assert sources._recent.left == 0
    before = len(sources._recent.calls)
    sources._recent.calls.clear()
    other(torch.zeros(1, 2))
    assert not sources._recent.calls, before


def test_what_a_layer_makes_that_feeds_no_neuron_is_not_kept() -> None:
    last = nn.Linear(M, N)
    with ssp.sparse_mode():
        for _ in range(sources.ENOUGH_OF_ONE - 1):
            last(torch.rand(B, M))
        assert sources._recent.calls  # of 32 calls the graphs
        for _ in range(2):
            last(torch.rand(B, M))
            assert not sources._recent.calls


def test_a_layer_that_feeds_a_neuron_later_is_found() -> None:
    fc, lif, x = nn.Linear(M, N), snn.Leaky(beta=0.5), torch.rand(B, M)
    kinds = []
    with ssp.sparse_mode():
        for _ in range(2 * sources.ENOUGH_OF_ONE):
            fc(x)
        for _ in range(3):
            mem, total = torch.zeros(B, N), 0
            for _ in range(20):
                current = fc(x)
                spikes, mem = lif(current, mem)
                total = total + spikes
            kinds.append(type(current))
            total.sum().item()
    assert kinds == [Tensor, Recorded, Recorded]


def test_fuse_time_off_is_heard() -> None:
    net = Net(snn)
    ssp.sparsify(net)
    passes(net)
    ssp.sparsify(net, fuse_time=False)
    net.kinds.clear()
    calls.clear()
    passes(net)
    assert set(net.kinds) == {Tensor}
    assert not calls


def test_layers_are_torchs_own_again_from_the_first_call_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_inside", 0)  # models of other tests are sparse for good
    fc, x = nn.Linear(M, N), torch.rand(B, M)
    with ssp.sparse_mode():
        hooked = nn.Linear.__call__
        fc(x)
    assert hooked is not nn.Module.__call__
    expected = nn.functional.linear(x, fc.weight, fc.bias)
    assert torch.equal(fc(x), expected)
    assert nn.Linear.__call__ is nn.Module.__call__
    with ssp.sparse_mode():
        assert nn.Linear.__call__ is hooked
    sources._unhook()
    assert all(cls.__call__ is nn.Module.__call__ for cls in sources._LAYERS)


def test_a_call_put_in_place_of_torchs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_inside", 0)
    sources._unhook()
    seen = []

    def call(self: nn.Module, *args: Any) -> Any:
        seen.append(self)
        return nn.Module.__call__(self, *args)

    monkeypatch.setattr(nn.Linear, "__call__", call, raising=False)
    net = Net(snn)
    with ssp.sparse_mode():
        net(torch.rand(T, B, M)).sum().item()
    assert len(seen) == 2 * T
    assert nn.Linear.__call__ is call
