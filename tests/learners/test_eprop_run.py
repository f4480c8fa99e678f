"""Whole sequences: EProp.run, and the kernels behind it for layers of LSNN."""

import pytest
import torch
from eprop_cases import C, M, N, build, compare, grads, inputs, learned, loop, loss_of, oracle
from helpers import on_grid, relative, spikes
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_sparse_plugin import InputError, SpikeTrain
from snn_sparse_plugin.learners import eprop

KERNELS = ["lsnn", "lsnn-feed-forward", "lsnn-autapses", "lsnn-two-layers"]


def run(net, x, *, compiled=True, **options):
    net.zero_grad()
    with eprop.EProp(net, **options) as learner:
        result = learner.run(x, lambda y, _: loss_of(y))
        assert (learner.compiled is not None) == compiled
    found = grads(net)
    net.zero_grad()
    return found, result


@pytest.mark.parametrize("engine", ["chunk", "offline"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_detached_backward(name, engine):
    net, x = build(name), inputs()
    found, result = run(net, x, engine=engine, chunk=5)
    compare(found, oracle(net, x), 1e-12)
    total, state = loop(net, x)
    assert abs(result.loss - total.item()) < 1e-10
    for own, reference in zip(result.state[0], state[0], strict=True):
        assert torch.allclose(own, reference, rtol=0, atol=1e-12)


def test_kernels_in_float32():
    net, x = build("lsnn", torch.float32), inputs(dtype=torch.float32)
    compare(run(net, x, chunk=5)[0], oracle(net, x), 1e-5)


def test_spikes_of_the_kernels_are_bit_equal():
    net = eprop.LSNNNetwork(40, 33, C, v_th=0.5, refractory=3.0)
    with torch.no_grad():  # sums of multiples of 2^-8 are exact in any order
        net.layers[0].input_weights.copy_(on_grid(33, 40, scale=0.5))
        net.layers[0].recurrent_weights.copy_(on_grid(33, 33, scale=0.5).fill_diagonal_(0))
    x = spikes(50, 3, 40, p=0.2)
    _, result = run(net, x, chunk=16)
    state = None
    with torch.no_grad():
        for now in x:
            _, state = net(now, state)
    assert result.spikes["layers.0"] > 0.02
    for own, reference in zip(result.state[0], state[0], strict=True):
        assert torch.equal(own, reference)


@settings(max_examples=12, deadline=None)
@given(
    T=st.integers(1, 12), B=st.integers(1, 4), m=st.integers(1, 20), n=st.integers(1, 35), chunk=st.integers(1, 9),
    adaptive=st.sampled_from([0, 0.5, 1.0]), refractory=st.integers(0, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_shapes(T, B, m, n, chunk, adaptive, refractory, seed):
    torch.manual_seed(seed)
    adaptive = round(adaptive * n)
    net = eprop.LSNNNetwork(m, n, 2, adaptive=adaptive, refractory=refractory, beta=0.2, v_th=0.3).double()
    x = (torch.rand(T, B, m) < 0.4).double()
    expected = oracle(net, x)
    for name, grad in run(net, x, chunk=chunk)[0].items():
        assert (grad - expected[name]).norm() <= 1e-12 * max(1.0, expected[name].norm())


@pytest.mark.parametrize("make", [SpikeTrain.from_dense, lambda x: x.to_sparse_coo(), lambda x: x])
def test_events_graded_or_not_give_the_same(make):
    net, x = build("lsnn"), inputs()
    graded = x * torch.rand_like(x)
    compare(run(net, make(x), chunk=7)[0], oracle(net, x), 1e-12)
    compare(run(net, make(graded), chunk=7)[0], oracle(net, graded), 1e-12)


@pytest.mark.parametrize("name", ["lsnn", "lsnn-masked", "norse-lif-recurrent", "norse-lif-sequence"])
def test_a_stream_equals_the_whole(name):
    net, x = build(name), inputs(T=30)
    compiled = name == "lsnn"
    expected, whole = run(net, x, compiled=compiled, chunk=8)
    found, streamed = run(net, (x[k : k + 6] for k in range(0, 30, 6)), compiled=compiled, chunk=8)
    compare(found, expected, 1e-12)
    assert streamed.steps == whole.steps == 30
    assert abs(streamed.loss - whole.loss) < 1e-10


def test_targets_of_every_step():
    net, x = build("lsnn"), inputs()
    wanted = torch.rand(len(x), x.shape[1], C, dtype=x.dtype)
    total, state = 0.0, None
    with eprop.detached(net):
        for now, target in zip(x, wanted, strict=True):
            y, state = net(now, state)
            total = total + (y - target).square().sum()
        total.backward()
    expected = grads(net)
    for compiled in (True, False):
        net.zero_grad()
        with eprop.EProp(net, chunk=5, trace_dtype=None if compiled else torch.float64) as learner:
            learner.run(x, lambda y, target: (y - target).square().sum(), wanted, per_step=True)
            assert (learner.compiled is not None) == compiled
        compare(grads(net), expected, 1e-12)


def test_the_general_way_and_the_kernels_agree_on_every_option():
    for options in (
        {"feedback": "random"},
        {"feedback": torch.randn(C, N, dtype=torch.float64)},
        {"rate_reg": eprop.FiringRate(c=0.5, target_hz=50, tau=20)},
        {"kappa": 0.0},
        {"kappa": 0.5},
    ):
        net, x = build("lsnn"), inputs()
        found = []
        for dtype in (None, torch.float64):  # a trace_dtype keeps the kernels out
            generator = torch.Generator().manual_seed(1)
            found.append(
                run(
                    net, x, compiled=dtype is None, chunk=5, trace_dtype=dtype, generator=generator, **options
                )[0]
            )
        compare(*found, 1e-12)


def test_snntorch_hidden_states_begin_anew_with_every_run():
    import snntorch as snn
    from torch import nn

    net = nn.Sequential(
        nn.Linear(M, N), snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(N, C), snn.Leaky(beta=0.8, init_hidden=True, reset_mechanism="none", output=True),
    )  # fmt: skip
    x = inputs(dtype=torch.float32)
    results = []
    with eprop.EProp(net, chunk=5) as learner:
        for _ in range(2):
            net.zero_grad()
            results.append((learner.run(x, lambda out, _: loss_of(out[1])).loss, grads(net)))
    assert results[0][0] == results[1][0]
    compare(results[0][1], results[1][1], 1e-12)


def test_weights_change_after_every_chunk_when_asked():
    for dtype in (None, torch.float64):
        net, x = build("lsnn"), inputs(T=20)
        optimizer, losses = torch.optim.SGD(net.parameters(), lr=1e-3), []

        def update(optimizer=optimizer, net=net, losses=losses):
            losses.append(net.layers[0].input_weights.grad.norm().item())
            optimizer.step()
            optimizer.zero_grad()

        with eprop.EProp(net, chunk=6, update="chunk", trace_dtype=dtype) as learner:
            learner.run(x, lambda y, _: loss_of(y), on_update=update)
        assert len(losses) >= 3
        assert all(size > 0 for size in losses)


def test_bad_sequences_are_refused():
    net = build("lsnn")
    with eprop.EProp(net) as learner:
        for x, message in (
            (torch.zeros(5, 3, dtype=torch.float64), "expected \\(T, B"),
            (inputs()[..., :-1], "expects 7"),
            (torch.zeros(0, 2, M, dtype=torch.float64), "no steps"),
        ):
            with pytest.raises(InputError, match=message):
                learner.run(x, lambda y, _: loss_of(y))
        with pytest.raises(InputError, match="NaN"):
            learner.run(torch.full((3, 2, M), float("nan"), dtype=torch.float64), lambda y, _: loss_of(y))


def test_memory_does_not_grow_with_time():
    """What a learner keeps after 2000 steps is what it keeps after 100."""

    def kept(T):
        net = eprop.LSNNNetwork(M, N, C)
        with eprop.EProp(net, chunk=20) as learner:
            learner.run((spikes(20, 4, M, p=0.3) for _ in range(T // 20)), lambda y, _: loss_of(y))
            return sum(t.numel() for part in learner.compiled.tensors() for t in part.values())

    assert kept(100) == kept(2000)


def test_learned_stays_equal_over_updates():
    """Twenty optimizer steps by the kernels and by autograd end at the same weights."""
    ends = []
    for way in ("kernels", "autograd"):
        torch.manual_seed(3)
        net = build("lsnn")
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for k in range(20):
            x = (torch.rand(15, 4, M, generator=torch.Generator().manual_seed(k)) < 0.4).double()
            found = run(net, x, chunk=4)[0] if way == "kernels" else oracle(net, x)
            for name, p in net.named_parameters():
                p.grad = found[name]
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert relative(*ends) < 1e-10


def test_textbook_rule_is_slow_but_the_same():
    net, x = build("lsnn"), inputs()
    compare(learned(net, x, engine="step"), run(net, x, chunk=9)[0], 1e-12)
