"""``unroll(..., lengths=)``: each sample alone for its own steps, and the loop with masks."""

from __future__ import annotations

from collections import Counter

import norse.torch as norse
import numpy as np
import pytest
import snntorch as snn
import torch
from helpers import on_grid, relative, spikes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snntorch import utils
from torch import nn

from snn_sparse_plugin import InputError, SpikeTrain, readout, unroll
from snn_sparse_plugin.core.backend import calls
from snn_sparse_plugin.fusion.ragged import pieces

T, B = 13, 5
LENGTHS = [0, 13, 4, 7, 1]


def fully_connected() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(9, 8), snn.Synaptic(alpha=0.5, beta=0.75, init_hidden=True)),
        *(nn.Linear(8, 7), snn.RLeaky(beta=0.5, linear_features=7, init_hidden=True)),
        *(nn.Linear(7, 4), snn.Leaky(beta=0.5, init_hidden=True, output=True)),
    )


def readout_network() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(9, 8), snn.Leaky(beta=0.5, init_hidden=True, reset_delay=False)),
        *(nn.Linear(8, 4), snn.Leaky(beta=0.5, init_hidden=True, reset_mechanism="none", output=True)),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 2), snn.Leaky(beta=0.5, init_hidden=True), nn.BatchNorm2d(3, eps=0.0).eval()),
        *(nn.Flatten(), nn.Linear(12, 4), snn.Leaky(beta=0.5, init_hidden=True, output=True)),
    )


def norse_cells() -> nn.Module:
    return norse.SequentialState(
        *(nn.Linear(9, 8), norse.LIFCell(), norse.LIFRecurrentCell(8, 6), nn.Linear(6, 4), norse.LICell())
    )


def norse_sequences() -> nn.Module:
    return norse.SequentialState(
        *(norse.Lift(nn.Conv2d(1, 3, 2)), norse.LIF(), nn.Flatten(2), nn.Linear(12, 6)),
        *(norse.LIFRecurrent(6, 4), norse.LI()),
    )


NETWORKS = [fully_connected, readout_network, convolutional, norse_cells, norse_sequences]


def made(build) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    net = build()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim():
                p.copy_(on_grid(*p.shape, scale=2.0))
    image = build in (convolutional, norse_sequences)
    return net, spikes(T, B, *((1, 3, 3) if image else (9,)), p=0.4)


def leaves(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (tuple, list)) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def rows(state, b):
    if isinstance(state, torch.Tensor):
        return state[b : b + 1]
    if isinstance(state, dict):
        return {name: rows(part, b) for name, part in state.items()}
    if isinstance(state, list):
        return [rows(part, b) for part in state]
    return type(state)(*(rows(part, b) for part in state)) if isinstance(state, tuple) else state


def fresh(net: nn.Module) -> nn.Module:
    if isinstance(net, nn.Sequential):
        utils.reset(net)
    return net


def alone(net, x, lengths, state=None):
    """Every sample by upstream's step loop, for its own steps."""
    found = []
    for b, n in enumerate(lengths):
        own = None if state is None else rows(state, b)
        found.append(unroll(fresh(net), x[:n, b : b + 1], own, fuse_time=False) if n else None)
    return found


def check(out, each, lengths) -> None:
    for b, (n, one) in enumerate(zip(lengths, each, strict=True)):
        assert not out.spikes[n:, b].any()
        if n:
            assert torch.equal(out.spikes[:n, b], one.spikes[:, 0])
            if one.mem is not None:  # stepped, a sequence module of Norse shows none
                assert torch.equal(out.mem[:n, b], one.mem[:, 0])
                assert not out.mem[n:, b].any()
            assert all(
                torch.equal(mine[b], its[0])
                for mine, its in zip(leaves(out.state), leaves(one.state), strict=True)
            )


def _seen(out, build) -> torch.Tensor:
    return out.spikes if build is norse_sequences else out.spikes + out.mem


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("build", NETWORKS)
def test_each_sample_alone(build, fuse_time: bool) -> None:
    net, x = made(build)
    fuse = {} if build is norse_sequences else {"fuse_time": fuse_time}
    out = unroll(fresh(net), x, lengths=LENGTHS, backprop_threshold=None, **fuse)
    check(out, alone(net, x, LENGTHS), LENGTHS)


@pytest.mark.parametrize("build", NETWORKS)
def test_gradients(build) -> None:
    """Of weights, of the input, and of the state that is carried in, from outputs and from the final state."""
    net, x = made(build)
    with torch.no_grad():
        start = unroll(fresh(net), x).state
    given_state = [leaf.requires_grad_() for leaf in leaves(start) if leaf.is_floating_point()]
    dense = x.clone().requires_grad_()
    wanted = [dense, *given_state, *net.parameters()]
    out = unroll(fresh(net), dense, start, lengths=LENGTHS, backprop_threshold=None)
    each = alone(net, dense, LENGTHS, start)
    check(out, each, LENGTHS)
    weights, ends = torch.randn_like(out.spikes), [torch.randn_like(leaf) for leaf in leaves(out.state)]

    def grads(loss):
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]

    loss = (_seen(out, build) * weights).sum()
    loss = loss + sum((leaf * g).sum() for leaf, g in zip(leaves(out.state), ends, strict=True))
    expected = torch.zeros(())
    for b, (n, one) in enumerate(zip(LENGTHS, each, strict=True)):
        if n:
            expected = expected + (_seen(one, build)[:, 0] * weights[:n, b]).sum()
        last = one.state if n else rows(start, b)
        expected = expected + sum((leaf[0] * g[b]).sum() for leaf, g in zip(leaves(last), ends, strict=True))
    assert max(relative(a, b) for a, b in zip(grads(loss), grads(expected), strict=True)) < 1e-5


def test_the_loop_with_masks() -> None:
    """What a user writes: every sample steps to the end, and its state stays where its own steps are over."""
    net, x = made(norse_cells)
    lengths = torch.tensor(LENGTHS)
    state = list(unroll(net, x).state)  # carried in: a mask wants an old state at the first step
    out = unroll(net, x, state, lengths=lengths, backprop_threshold=None)

    def masked(new, old, own):
        if isinstance(new, torch.Tensor):
            return torch.where(own.view(-1, *[1] * (new.dim() - 1)), new, old)
        if isinstance(new, (tuple, list)):
            parts = [masked(a, b, own) for a, b in zip(new, old, strict=True)]
            return parts if isinstance(new, list) else type(new)(*parts)
        return new

    values = []
    for t in range(T):
        own = t < lengths
        value, new = net(x[t], list(state))
        state = masked(new, state, own)
        values.append(torch.where(own.unsqueeze(1), value, 0.0))
    assert torch.equal(out.spikes, torch.stack(values))
    assert all(torch.equal(a, b) for a, b in zip(leaves(out.state), leaves(state), strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(st.lists(st.integers(0, T), min_size=B, max_size=B))
def test_any_lengths(lengths: list[int]) -> None:
    for build in (fully_connected, norse_cells):
        net, x = made(build)
        with torch.no_grad():
            train = SpikeTrain.from_dense(x)
            check(unroll(fresh(net), train, lengths=lengths), alone(net, x, lengths), lengths)


@given(st.lists(st.integers(0, 1000), max_size=40))
def test_pieces_are_each_samples_own_steps(lengths: list[int]) -> None:
    done = Counter[int]()
    found = list(pieces(torch.tensor(lengths, dtype=torch.int64)))
    for piece in found:
        for sample, first in zip(piece.samples.tolist(), piece.first.tolist(), strict=True):
            assert first == done[sample]
            done[sample] += piece.steps
    assert [done[b] for b in range(len(lengths))] == lengths
    assert len(found) <= 11


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda n: torch.tensor(n).int()])
def test_forms_of_lengths(make) -> None:
    net, x = made(fully_connected)
    first = unroll(fresh(net), x, lengths=LENGTHS).mem
    assert torch.equal(unroll(fresh(net), x, lengths=make(LENGTHS)).mem, first)


def test_forms_of_the_input() -> None:
    net, x = made(fully_connected)
    expected = unroll(fresh(net), x, lengths=LENGTHS).spikes
    csr = SpikeTrain.from_dense(x)
    words = SpikeTrain.from_words(csr.words, csr.shape)
    for given_input in (csr, words, x.to_sparse_coo(), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(unroll(fresh(net), given_input, lengths=LENGTHS).spikes, expected)
    graded = SpikeTrain.from_dense(x * 0.5)
    same = unroll(fresh(net), graded, lengths=LENGTHS)
    check(same, alone(net, x * 0.5, LENGTHS), LENGTHS)
    still = x[3].expand(T, -1, -1)
    check(unroll(fresh(net), still, lengths=LENGTHS), alone(net, still, LENGTHS), LENGTHS)


def test_events_carry_the_gradient() -> None:
    net, x = made(fully_connected)
    out = unroll(fresh(net), x, lengths=LENGTHS, events=True, backprop_threshold=None)
    dense = unroll(fresh(net), x, lengths=LENGTHS, backprop_threshold=None)
    assert isinstance(out.spikes, SpikeTrain)
    assert torch.equal(out.spikes.to_dense(), dense.spikes)
    weights = torch.randn(B, 4)
    got = torch.autograd.grad((out.spikes.counts() * weights).sum(), net[0].weight)[0]
    expected = torch.autograd.grad((dense.spikes.sum(0) * weights).sum(), net[0].weight)[0]
    assert expected.any()
    assert relative(got, expected) < 1e-6
    # events in, with a gradient, from another network
    first, second = nn.Sequential(*list(net)[:2]), nn.Sequential(*list(net)[2:])
    hidden = unroll(fresh(first), x, lengths=LENGTHS, events=True, backprop_threshold=None).spikes
    chained = unroll(fresh(second), hidden, lengths=LENGTHS, backprop_threshold=None)
    assert torch.equal(chained.spikes, dense.spikes)
    got = torch.autograd.grad((chained.spikes.sum(0) * weights).sum(), net[0].weight)[0]
    assert relative(got, expected) < 1e-6


def test_hidden_states_are_those_of_the_loop() -> None:
    """A second batch goes on from the first one's; one of another size starts anew, as upstream does."""
    net, x = made(fully_connected)
    with torch.no_grad():
        fresh(net)
        first = unroll(net, x, lengths=LENGTHS)
        assert torch.equal(net[5].mem, first.state[5]["mem"])
        check(unroll(net, x, lengths=LENGTHS[::-1]), alone(net, x, LENGTHS[::-1], first.state), LENGTHS[::-1])
        short = [2, 1, 0, 5]
        check(unroll(net, x[:, :4], lengths=short), alone(net, x[:, :4], short), short)


def test_a_sample_of_no_steps_keeps_its_state() -> None:
    net, x = made(norse_cells)
    start = unroll(net, x).state
    kept = unroll(net, x, start, lengths=LENGTHS).state
    assert all(torch.equal(a[0], b[0]) for a, b in zip(leaves(kept), leaves(start), strict=True))
    resting = unroll(norse.IzhikevichCell(norse.tonic_spiking), x, lengths=LENGTHS).state[0]
    assert resting.v[0].unique().tolist() == [-70.0]
    nothing = unroll(net, x, start, lengths=[0] * B)
    assert nothing.spikes.shape == (T, B, 4)
    assert not nothing.spikes.any()
    assert all(torch.equal(a, b) for a, b in zip(leaves(nothing.state), leaves(start), strict=True))


def test_padded_steps_do_no_work() -> None:
    """NaN in them is never read, and the op runs for the steps of the samples alone."""
    net, x = made(fully_connected)
    padded = torch.where((torch.arange(T).unsqueeze(1) < torch.tensor(LENGTHS)).unsqueeze(2), x, torch.nan)
    before = calls["cpu", "forward"]
    out = unroll(fresh(net), padded, lengths=LENGTHS)
    assert calls["cpu", "forward"] > before
    check(out, alone(net, x, LENGTHS), LENGTHS)


class Counting(nn.Module):
    def forward(self, x):
        self.seen = getattr(self, "seen", 0) + 1
        return x


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.BatchNorm1d(9), "BatchNorm1d"),
        (Counting(), "Counting"),
        (nn.Flatten(0), "Flatten"),
        (nn.Sequential(nn.Linear(9, 9), Counting()), "1.1 (Counting)"),
        (snn.StateLeaky(beta=0.5, channels=9), "StateLeaky"),
    ],
)
def test_refused_layers(layer, named: str) -> None:
    net = nn.Sequential(nn.Linear(9, 9), layer)
    with pytest.raises(InputError, match="lengths") as error:
        unroll(net, spikes(T, B, 9), lengths=LENGTHS)
    assert named in str(error.value)


def test_dropout_in_train_mode_runs() -> None:
    net, x = made(fully_connected)
    dropped = nn.Sequential(nn.Dropout(0.0), *net)
    assert torch.equal(
        unroll(fresh(dropped), x, lengths=LENGTHS).mem, unroll(fresh(net), x, lengths=LENGTHS).mem
    )


def test_an_error_leaves_hidden_states_as_they_were() -> None:
    net, x = made(fully_connected)
    before = unroll(fresh(net), x).state[1]["mem"].clone()
    with pytest.raises(InputError, match="features"):
        unroll(net, torch.ones(T, B, 10), lengths=LENGTHS)
    assert torch.equal(net[1].mem, before)


def test_a_module_with_a_state_of_its_own_is_refused() -> None:
    net = norse.SequentialState(nn.Linear(9, 9), nn.GRU(9, 4))
    with pytest.raises(InputError, match=r"lengths: 1 \(GRU\)"):
        unroll(net, spikes(T, B, 9), lengths=LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], r"shape \(2,\), expected \(5,\)"),
        ([1.0] * 5, "whole numbers, got torch.float32"),
        ([True] * 5, "whole numbers, got torch.bool"),
        ([1, 2, 14, 0, 0], r"0…T = 13, got 14 for sample 2"),
        ([1, -1, 0, 0, 0], "got -1 for sample 1"),
        ("abcde", "B = 5 whole numbers, got str"),
        (4, r"shape \(\), expected \(5,\)"),
    ],
)
def test_wrong_lengths(lengths, message: str) -> None:
    net, x = made(fully_connected)
    with pytest.raises(InputError, match=message):
        unroll(fresh(net), x, lengths=lengths)


def test_a_state_of_other_samples_is_refused() -> None:
    net, x = made(norse_cells)
    with pytest.raises(InputError, match="expected 5 samples"):
        unroll(net, x, unroll(net, x[:, :3]).state, lengths=LENGTHS)


def test_training_goes_with_readouts() -> None:
    """A mean over a sample's own steps: the same loss and gradient as the samples one by one."""
    net, x = made(readout_network)
    lengths, target = [13, 2, 4, 7, 1], torch.randint(0, 4, (B,))
    out = unroll(fresh(net), x, lengths=lengths, backprop_threshold=None)
    loss = nn.functional.cross_entropy(readout.mean(out.mem, lengths), target)
    means = torch.stack([one.mem.mean(0)[0] for one in alone(net, x, lengths)])
    expected = nn.functional.cross_entropy(means, target)
    assert torch.allclose(loss, expected)
    got = torch.autograd.grad(loss, list(net.parameters()))
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    assert max(relative(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5
