"""``EProp.run`` and the step loop on a device against backward through time: in the interpreter and on a GPU."""

import pytest
import torch
from eprop_cases import C, M, N, build, compare, grads, inputs, loop, loss_of, oracle
from helpers import on_grid, spikes

from snn_sparse_plugin import SpikeTrain
from snn_sparse_plugin.learners import eprop

NETS = {
    "lsnn": lambda: build("lsnn"),
    "feed-forward": lambda: build("lsnn-feed-forward"),
    "autapses": lambda: build("lsnn-autapses"),
    "two-layers": lambda: build("lsnn-two-layers"),
    "not-adaptive": lambda: eprop.LSNNNetwork(M, N, C, adaptive=0, v_th=0.3).double(),
    "wide": lambda: eprop.LSNNNetwork(M, 70, C, beta=0.3, v_th=0.3).double(),
}
STEPPED = [
    *("leaky-zero", "norse-lsnn-recurrent", "lsnn-masked"),
    *("leaky-subtract", "leaky-beta-per-neuron", "leaky-synaptic-readout", "rleaky"),
    *("norse-lif-recurrent", "norse-ex", "recurrence-outside"),
]


def with_engines(names, quick):
    """All names and engines, of which some are quick enough for the interpreter at every change."""
    for name in names:
        for engine in ("chunk", "offline"):
            marks = () if (name, engine) in quick else pytest.mark.slow
            yield pytest.param(name, engine, marks=marks, id=f"{name}-{engine}")


class EPropTests:
    """A subclass says on which ``device``, and ``on_device()`` is a context in which tensors are taken for its."""

    device: str

    def on_device(self):
        raise NotImplementedError

    def moved(self, x):
        return x.to(self.device)

    def run(self, net, x, targets=None, loss=lambda y, _: loss_of(y), **options):
        """Gradients by EProp.run on the device, on the CPU again, and its result."""
        net.zero_grad()
        net.to(self.device)
        with self.on_device(), eprop.EProp(net, **options) as learner:
            result = learner.run(x, loss, targets)
            assert (learner.compiled is not None) == (options.get("trace_dtype") is None)
        found = {name: grad.cpu() for name, grad in grads(net).items()}
        net.zero_grad()
        net.cpu()
        return found, result

    @pytest.mark.parametrize(
        ("name", "engine"),
        [
            *with_engines(
                NETS,
                {("lsnn", "offline"), ("two-layers", "chunk"), ("not-adaptive", "chunk"), ("wide", "chunk")},
            )
        ],
    )
    def test_run_equals_detached_backward(self, name, engine):
        net, x = NETS[name](), inputs(T=12, B=3)
        found, result = self.run(net, self.moved(x), engine=engine, chunk=5)
        compare(found, oracle(net, x))
        total, state = loop(net, x)
        assert abs(result.loss - total.item()) < 1e-10
        for own, reference in zip(result.state[0], state[0], strict=True):
            assert torch.allclose(own.cpu(), reference, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("chunk", [pytest.param(7, marks=pytest.mark.slow), 40])
    def test_run_in_float32(self, chunk):
        net, x = build("lsnn", torch.float32), inputs(T=70, B=2, dtype=torch.float32)
        compare(self.run(net, self.moved(x), chunk=chunk)[0], oracle(net, x), 1e-5)

    def test_spikes_are_bit_equal(self):
        net = eprop.LSNNNetwork(40, 33, C, v_th=0.5, refractory=3.0)
        with torch.no_grad():  # sums of multiples of 2^-8 are exact in any order
            net.layers[0].input_weights.copy_(on_grid(33, 40, scale=0.5))
            net.layers[0].recurrent_weights.copy_(on_grid(33, 33, scale=0.5).fill_diagonal_(0))
        x = spikes(30, 3, 40, p=0.2)
        _, result = self.run(net, self.moved(x), chunk=16)
        with torch.no_grad():
            state = None
            for now in x:
                _, state = net(now, state)
        assert result.spikes["layers.0"] > 0.02
        for own, reference in zip(result.state[0], state[0], strict=True):
            assert torch.equal(own.cpu(), reference)

    @pytest.mark.parametrize("graded", [False, True])
    def test_events_and_blocks(self, graded):
        net, x = build("lsnn"), inputs(T=8, B=2)
        x = x * torch.rand_like(x) if graded else x
        expected = oracle(net, x)
        for given in (
            lambda: SpikeTrain.from_dense(self.moved(x), binary=not graded),
            lambda: iter(self.moved(x).split(3)),
        ):
            compare(self.run(net, given(), chunk=4)[0], expected)

    def test_a_run_goes_on(self):
        net, x = build("lsnn"), inputs(T=12, B=2)
        expected = oracle(net, x)
        net.to(self.device)
        with self.on_device(), eprop.EProp(net, chunk=4) as learner:
            learner.run(self.moved(x[:5]), lambda y, _: loss_of(y))
            saved, state = learner.state_dict(), learner.last_state
        before = {name: grad.clone() for name, grad in grads(net).items()}
        net.zero_grad()
        with self.on_device(), eprop.EProp(net, chunk=4) as learner:
            learner.load_state_dict(saved)
            learner.run(self.moved(x[5:]), lambda y, _: loss_of(y), fresh=False, state=state)
        found = {name: (grad + before[name]).cpu() for name, grad in grads(net).items()}
        net.cpu()
        compare(found, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"feedback": "random"},
            {"rate_reg": eprop.FiringRate(c=0.5, target_hz=50, tau=20)},
            {"kappa": 0.0},
            {"kappa": 0.5},
        ],
        ids=str,
    )
    def test_options(self, options):
        net, x = build("lsnn"), inputs(T=9, B=2)
        made = lambda: {"generator": torch.Generator().manual_seed(1), **options}  # noqa: E731
        net.zero_grad()
        with eprop.EProp(net, chunk=5, **made()) as learner:  # on the CPU
            learner.run(x, lambda y, _: loss_of(y))
            expected = grads(net)
        compare(self.run(net, self.moved(x), chunk=5, **made())[0], expected)

    @pytest.mark.parametrize(
        ("name", "engine"), [*with_engines(STEPPED, {(name, "chunk") for name in STEPPED[:3]})]
    )
    def test_the_step_loop(self, name, engine):
        net, x = build(name), inputs(T=8, B=2)
        expected = oracle(net, x)
        net.to(self.device)
        if name == "recurrence-outside" and self.device != "cpu":
            pytest.skip("the network makes its first state on the CPU")
        with self.on_device(), eprop.EProp(net, engine=engine, chunk=3) as learner:
            loop(net, self.moved(x), learner.step)
            learner.flush()
        found = {key: grad.cpu() for key, grad in grads(net).items()}
        net.cpu()
        compare(found, expected)

    def test_memory_does_not_grow_with_time(self):
        def kept(T):
            net = eprop.LSNNNetwork(M, N, C).to(self.device)
            with self.on_device(), eprop.EProp(net, chunk=4) as learner:
                learner.run(
                    (self.moved(spikes(4, 2, M, p=0.3)) for _ in range(T // 4)), lambda y, _: loss_of(y)
                )
                (layer,), out = learner.compiled.layers, learner.compiled.out
                tensors = [
                    layer.local,
                    layer.spikes,
                    layer.words,
                    *layer.tensors().values(),
                    *out.tensors().values(),
                ]
                for synapses in layer.watched.synapses.values():
                    tensors += [*synapses.per_input.values(), *synapses.per_synapse.values()]
                return sum(x.numel() for x in tensors)

        assert kept(8) == kept(24)
