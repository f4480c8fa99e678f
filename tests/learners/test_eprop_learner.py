"""Options of the learner, its state, and what it refuses."""

import io

import norse.torch as norse
import pytest
import snntorch as snn
import torch
from eprop_cases import (
    C,
    M,
    Mixed,
    N,
    SnnNet,
    build,
    compare,
    grads,
    inputs,
    learned,
    loop,
    loss_of,
    oracle,
    silent_leaky,
    spike,
)
from helpers import relative
from snntorch import utils
from torch import nn
from torch.nn.utils import prune

from snn_sparse_plugin import ConfigError, InputError, UnsupportedError
from snn_sparse_plugin.core import registry
from snn_sparse_plugin.learners import eprop

# --- feedback ---


class Carried(torch.autograd.Function):
    """A product that carries errors back by another matrix."""

    @staticmethod
    def forward(ctx, x, weight, feedback):
        ctx.save_for_backward(x, feedback)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, feedback = ctx.saved_tensors
        return grad @ feedback, grad.T @ x, None


@pytest.mark.parametrize("engine", ["step", "chunk"])
def test_given_feedback_equals_autograd_with_another_backward(engine):
    net, x = build("lsnn"), inputs()
    feedback = torch.randn(C, N, dtype=torch.float64)
    linear = net.readout.linear
    linear.forward = lambda z: Carried.apply(z, linear.weight, feedback) + linear.bias
    expected = oracle_of(net, x)
    del linear.forward
    compare(learned(net, x, engine=engine, chunk=5, feedback=feedback), expected)


def oracle_of(net, x):
    # detached() puts its own forward around the Linear's, so it runs the one of the test
    with eprop.detached(net):
        loop(net, x)[0].backward()
    found = grads(net)
    net.zero_grad()
    return found


def test_random_feedback_is_drawn_once_from_the_generator():
    net, x = build("lsnn"), inputs()
    found = [
        learned(net, x, feedback="random", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["layers.0.input_weights"], found[2]["layers.0.input_weights"])
    assert torch.equal(
        found[0]["readout.linear.weight"], found[2]["readout.linear.weight"]
    )  # exact in any case


def test_adaptive_feedback_comes_to_the_readout_weights():
    net, x = build("lsnn"), inputs()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    weight, apart = net.readout.linear.weight, []
    with eprop.EProp(net, feedback="adaptive", feedback_decay=0.02) as learner:
        for _ in range(60):
            optimizer.zero_grad()
            learner.reset()
            loop(net, x, learner.step)
            learner.flush()
            optimizer.step()
            feedback = learner.carriers.of(weight, "readout.linear.weight")
            apart.append((feedback - weight).norm().item())
    assert apart[-1] < 0.5 * apart[0]


# --- regularisation, stacked layers ---


@pytest.mark.parametrize("engine", ["step", "chunk"])
def test_rate_regularisation_equals_a_loss_with_the_rate_held_fixed(engine):
    net, x = build("lsnn"), inputs()
    regular = eprop.FiringRate(c=0.7, target_hz=40, tau=30)
    rate, total, state = None, 0.0, None
    with eprop.detached(net):
        for now in x:
            y, state = net(now, state)
            z = state[0].z
            rate = regular.follow(rate, z.detach())
            total = total + loss_of(y) + (regular.c * (rate - regular.target) * z).sum()
        total.backward()
    expected = grads(net)
    assert relative(learned(net, x)["layers.0.input_weights"], expected["layers.0.input_weights"]) > 1e-3
    compare(learned(net, x, engine=engine, chunk=5, rate_reg=regular), expected)


class Stacked(nn.Module):
    """Two layers one above the other, of which only the upper one feeds the (memoryless) readout."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(M, N), snn.Leaky(beta=0.9, spike_grad=spike)
        self.fc2, self.lif2 = nn.Linear(N, N), snn.Leaky(beta=0.8, spike_grad=spike)
        self.out = nn.Linear(N, C)

    def forward(self, x, state=None):
        if state is None:
            self.lif1.reset_mem(), self.lif2.reset_mem()
        first, second = (None, None) if state is None else state
        z1, first = self.lif1(self.fc1(x), first)
        z2, second = self.lif2(self.fc2(z1), second)
        return self.out(z2), (first, second)


def test_stacked_layers_learn_through_the_layers_above_within_a_step(caplog):
    torch.manual_seed(1)
    net, x = Stacked().double(), inputs()
    # the stated approximation, by autograd: the upper membrane's past is a constant on the way to the lower layer
    mem1 = mem2 = torch.zeros(4, N, dtype=torch.float64)
    total = 0.0
    for now in x:
        reset1, reset2 = (mem1 > 1).double(), (mem2 > 1).double()
        beta1, beta2 = net.lif1.beta, net.lif2.beta  # 0.9 and 0.8 in float32
        mem1 = beta1 * mem1 + net.fc1(now) - reset1
        z1 = spike(mem1 - 1)
        kept = beta2 * mem2 + net.fc2(z1.detach()) - reset2
        fed = nn.functional.linear(z1, net.fc2.weight.detach(), net.fc2.bias.detach())
        passing = beta2 * mem2.detach() + fed - reset2
        mem2 = kept
        z2 = spike(kept - 1) + spike(passing - 1) - spike(passing - 1).detach()
        total = total + loss_of(net.out(z2))
    total.backward()
    expected = grads(net)
    for engine in ("step", "chunk"):
        net.zero_grad()
        with eprop.EProp(net, engine=engine, chunk=5) as learner:
            loop(net, x, learner.step)
            learner.flush()
            assert "lif1" in learner.approximations[0]
            assert "lif1" in repr(learner)
        compare(grads(net), expected)
    assert "lif1" in caplog.text


# --- state, streaming, updates ---


@pytest.mark.parametrize("name", ["lsnn", "leaky-zero", "norse-lif-recurrent", "lsnn-masked"])
def test_resumed_equals_uninterrupted(name):
    net, x = build(name), inputs(T=24)
    expected = learned(net, x, chunk=5)
    with eprop.EProp(net, chunk=5) as learner:
        _, state = loop(net, x[:13], learner.step)
        buffer = io.BytesIO()
        torch.save(learner.state_dict(), buffer)
    net.zero_grad()
    buffer.seek(0)
    with eprop.EProp(net, chunk=5) as learner:
        learner.load_state_dict(torch.load(buffer, weights_only=False))
        assert learner.steps_seen == 13
        loop(net, x[13:], learner.step, state)
        learner.flush()
    compare(grads(net), expected)


@pytest.mark.parametrize("trace_dtype", [None, torch.float64])
def test_a_resumed_run_equals_an_uninterrupted_one(trace_dtype):
    net, x = build("lsnn"), inputs(T=24)
    expected = learned(net, x, chunk=5)
    with eprop.EProp(net, chunk=5, trace_dtype=trace_dtype) as learner:
        first = learner.run(x[:13], lambda y, _: loss_of(y))
        saved = learner.state_dict()
    with eprop.EProp(net, chunk=5, trace_dtype=trace_dtype) as learner:
        learner.load_state_dict(saved)
        learner.run(x[13:], lambda y, _: loss_of(y), fresh=False, state=first.state)
    compare(grads(net), expected)


def test_hidden_states_of_snntorch_are_resumed():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(M, N), snn.Leaky(beta=0.9, init_hidden=True),
            nn.Linear(N, C), snn.Leaky(beta=0.8, init_hidden=True, reset_mechanism="none", output=True),
        )  # fmt: skip

    x = inputs(T=20, dtype=torch.float32)

    def steps(net, learner, part):
        for now in part:
            learner.step(loss_of(net(now)[1]))

    net = make()
    with eprop.EProp(net, chunk=6) as learner:
        steps(net, learner, x)
        learner.flush()
    expected = grads(net)
    net = make()
    with eprop.EProp(net, chunk=6) as learner:
        steps(net, learner, x[:11])
        saved, halfway = learner.state_dict(), grads(net)
    assert not halfway
    other = make()
    with eprop.EProp(other, chunk=6) as learner:
        learner.load_state_dict(saved)
        steps(other, learner, x[11:])
        learner.flush()
    compare(grads(other), expected, 1e-5)


def test_snntorch_detaches_and_resets_hidden_states():
    net = nn.Sequential(
        nn.Linear(M, N), snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(N, C), snn.Leaky(beta=0.8, init_hidden=True, reset_mechanism="none", output=True),
    )  # fmt: skip
    x, found = inputs(dtype=torch.float32), []
    for detach in (False, True):
        net.zero_grad()
        with eprop.EProp(net, chunk=6) as learner:
            utils.reset(net)
            for now in x:
                learner.step(loss_of(net(now)[1]))
                if detach:  # states are: nothing changes
                    snn.Leaky.detach_hidden()
        found.append(grads(net))
    compare(*found, 1e-12)


def test_flushing_in_the_middle_changes_nothing():
    net, x = build("lsnn"), inputs()
    expected = oracle(net, x)
    with eprop.EProp(net, chunk=5) as learner:
        state = None
        for k, now in enumerate(x):
            y, state = net(now, state)
            learner.step(loss_of(y))
            if k in (3, 4, 11):
                learner.flush()
        learner.flush()
    compare(grads(net), expected)


def test_steps_without_a_loss():
    net, x = build("lsnn"), inputs()
    total, state = 0.0, None
    with eprop.detached(net):
        for k, now in enumerate(x):
            y, state = net(now, state)
            total = total + (loss_of(y) if k > 15 else 0.0)
        total.backward()
    expected = grads(net)
    net.zero_grad()
    with eprop.EProp(net, chunk=5) as learner:
        state = None
        for k, now in enumerate(x):
            y, state = net(now, state)
            learner.step(loss_of(y) if k > 15 else None)
        learner.flush()
    compare(grads(net), expected)


@pytest.mark.parametrize("update", ["chunk", "step"])
def test_gradients_are_written_when_asked(update):
    net, x = build("lsnn"), inputs(T=12)
    expected = oracle(net, x)
    with eprop.EProp(net, chunk=4, update=update) as learner:
        written, state = [], None
        for now in x:
            y, state = net(now, state)
            written.append(learner.step(loss_of(y)))
        assert written == ([False, False, False, True] * 3 if update == "chunk" else [True] * 12)
        compare(grads(net), expected)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        optimizer.step()  # allowed here
        net(x[0], state)


def test_leaving_the_block_flushes_and_restores_the_model():
    net, x = build("lsnn"), inputs()
    expected = oracle(net, x)
    with eprop.EProp(net, chunk=5) as learner:
        loop(net, x, learner.step)
    compare(grads(net), expected)
    assert not any("forward" in vars(m) for m in net.modules())
    net.zero_grad()
    with pytest.raises(ZeroDivisionError), eprop.EProp(net):
        raise ZeroDivisionError
    assert not any("forward" in vars(m) for m in net.modules())
    loop(net, x)[0].backward()  # ordinary training again
    assert net.layers[0].input_weights.grad.norm() > 0


def test_traces_in_half_precision_are_close():
    net, x = build("leaky-zero", torch.float32), inputs(dtype=torch.float32)
    expected = oracle(net, x)
    for name, grad in learned(net, x, chunk=5, trace_dtype=torch.bfloat16).items():
        assert 0 <= relative(grad, expected[name]) < 2e-2


def test_scaled_losses_scale_gradients():
    net, x = build("leaky-subtract"), inputs()
    expected = oracle(net, x)
    with eprop.EProp(net) as learner:
        loop(net, x, lambda loss: learner.step(1024 * loss))
        learner.flush()
    compare({k: v / 1024 for k, v in grads(net).items()}, expected)


def test_parameters_behind_the_readout_learn_too():
    net, x = build("lsnn"), inputs()
    head = nn.Linear(C, C).double()

    def run(step=None):
        total, state = 0.0, None
        for now in x:
            y, state = net(now, state)
            loss = loss_of(head(y))
            total = total + loss if step is None else step(loss)
        return total

    with eprop.detached(net):
        run().backward()
    expected = grads(net) | {"head": head.weight.grad.clone()}
    net.zero_grad(), head.zero_grad()
    with eprop.EProp(net, readout=net.readout, chunk=5) as learner:
        run(learner.step)
        learner.flush()
    compare(grads(net) | {"head": head.weight.grad}, expected)


def test_masks_and_missing_autapses_stay_without_gradient_and_traces():
    net, x = build("lsnn-masked"), inputs()
    layer = net.layers[0]
    with eprop.EProp(net, chunk=5) as learner:
        loop(net, x, learner.step)
        learner.flush()
        synapses = learner.hidden[0].synapses["layers.0.input_weights"]
        kept = {t.shape[-1] for t in synapses.per_synapse.values()}
    assert kept == {int(layer.input_mask.sum())}
    assert layer.input_weights.grad[~layer.input_mask].abs().max() == 0
    assert layer.recurrent_weights.grad.diagonal().abs().max() == 0
    cell = build("norse-lif-recurrent")
    assert learned(cell, x)["0.recurrent_weights"].diagonal().abs().max() == 0


def test_pruned_layers_keep_traces_of_what_is_left():
    net, x = build("leaky-zero"), inputs()
    prune.random_unstructured(net.fc1, "weight", 0.5)
    expected = oracle(net, x)
    compare(learned(net, x, chunk=5), expected)
    assert expected["fc1.weight_orig"][net.fc1.weight_mask == 0].abs().max() == 0


def test_frozen_layers_are_left_alone():
    net, x = build("leaky-subtract"), inputs()
    net.fc1.weight.requires_grad_(False)
    found = learned(net, x)
    assert found.keys() == {"fc1.bias", "fc2.weight", "fc2.bias"}
    compare(found, oracle(net, x))


# --- what is refused ---


def refused(net, call, error, message, **options):
    with pytest.raises(error, match=message), eprop.EProp(net, **options) as learner:
        call(learner)


def test_a_loss_of_several_steps_is_refused():
    net, x = build("lsnn"), inputs()

    def outputs_summed(learner):
        total, state = 0.0, None
        for now in x:
            y, state = net(now, state)
            total = total + y
            learner.step(loss_of(total))

    def spikes_summed(learner):
        total, state = 0.0, None
        for now in x:
            _, state = net(now, state)
            total = total + state[0].z
            learner.step(total.sum())

    def losses_summed(learner):
        total, state = 0.0, None
        for k, now in enumerate(x):
            y, state = net(now, state)
            total = total + loss_of(y)
            learner.step(total if k == 5 else None)

    for call in (outputs_summed, spikes_summed, losses_summed):
        refused(net, call, UnsupportedError, "earlier step")


def test_a_loss_of_hidden_spikes_of_this_step_is_taken():
    net, x = build("lsnn"), inputs()

    def run(step=None):
        total, state = 0.0, None
        for now in x:
            y, state = net(now, state)
            loss = loss_of(y) + 0.1 * (state[0].z - 0.05).square().sum()
            total = total + loss if step is None else step(loss)
        return total

    with eprop.detached(net):
        run().backward()
    expected = grads(net)
    net.zero_grad()
    with eprop.EProp(net, chunk=5) as learner:
        run(learner.step)
        learner.flush()
    compare(grads(net), expected)


def test_a_loss_of_hidden_membranes_is_refused():
    net, x = build("lsnn"), inputs()
    refused(
        net, lambda learner: learner.step(net(x[0])[1][0].v.sum()), UnsupportedError, "state of hidden layer"
    )


def test_models_without_a_readable_readout_are_refused():
    spiking_end = nn.Sequential(nn.Linear(M, N), norse.LIFCell())
    with pytest.raises(ConfigError, match="no readable readout"):
        eprop.EProp(norse.SequentialState(*spiking_end))
    two = norse.SequentialState(nn.Linear(M, N), norse.LIFCell(), norse.LICell(), norse.LICell())
    with pytest.raises(ConfigError, match="2 leaky integrators"):
        eprop.EProp(two)
    with pytest.raises(ConfigError, match="no hidden spiking neuron"):
        eprop.EProp(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    with pytest.raises(ConfigError, match="not a module of the model"):
        eprop.EProp(build("lsnn"), readout=nn.Linear(1, 1))


def test_kappa_that_cannot_be_inferred_is_refused():
    x = inputs()
    betas = SnnNet(snn.Leaky(beta=0.9, spike_grad=spike), silent_leaky(torch.linspace(0.1, 0.9, C))).double()
    refused(betas, lambda learner: loop(betas, x, learner.step), ConfigError, "kappa cannot be inferred")
    resetting = SnnNet(
        snn.Leaky(beta=0.9, spike_grad=spike),
        snn.Leaky(beta=0.9, reset_mechanism="zero", spike_grad=spike, threshold=0.1),
    ).double()  # fmt: skip
    refused(
        resetting, lambda learner: loop(resetting, x, learner.step), ConfigError, "kappa cannot be inferred"
    )
    learned(betas, x, kappa=0.8)  # given, it runs


def test_a_module_shared_by_two_layers_is_refused():
    class Shared(Stacked):
        def __init__(self):
            super().__init__()
            self.lif2 = self.lif1

    class SharedWeight(Stacked):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(N, N)
            self.fc2.weight = self.fc1.weight

    net = Shared()
    refused(net, lambda _: net(torch.ones(2, M)), UnsupportedError, "ran twice")
    tied = SharedWeight()
    refused(tied, lambda _: tied(torch.ones(2, N)), UnsupportedError, "shared by two layers")


def test_another_batch_size_within_a_sequence_is_refused():
    net = Stacked()

    def call(learner):
        learner.step(loss_of(net(torch.ones(4, M))[0]))
        net(torch.ones(3, M))

    refused(net, call, InputError, "3 samples, the sequence began with 4")


def test_changed_weights_within_a_sequence_are_refused():
    net, x = build("lsnn"), inputs()

    def call(learner):
        _, state = loop(net, x[:3], learner.step)
        with torch.no_grad():
            net.layers[0].input_weights.add_(0.1)
        net(x[3], state)

    refused(net, call, UnsupportedError, "modified within a sequence")


def test_states_that_begin_anew_without_the_traces_are_refused():
    net, x = build("lsnn"), inputs()

    def call(learner):
        loop(net, x, learner.step)
        net(x[0], None)

    refused(net, call, ConfigError, "began anew")


def test_currents_that_are_not_sums_of_linears_are_refused():
    class Between(Mixed):
        def forward(self, x, state=None):
            spikes, mem = self.lif(2 * self.fc1(x), None)
            return self.out(spikes), mem

    net = Between()
    refused(net, lambda _: net(torch.ones(2, M)), UnsupportedError, "MulBackward0 stands before it")
    one_to_one = SnnNet(snn.RLeaky(beta=0.9, all_to_all=False), silent_leaky())
    with pytest.raises(UnsupportedError, match="RecurrentOneToOne"), eprop.EProp(one_to_one):
        pass
    inhibited = SnnNet(snn.Leaky(beta=0.9, inhibition=True), silent_leaky())
    with pytest.raises(UnsupportedError, match="inhibition"), eprop.EProp(inhibited):
        pass
    assert "forward" not in vars(inhibited.hidden)
    coupled = norse.SequentialState(norse.LIFMCRecurrentCell(M, N), nn.Linear(N, C), norse.LICell())
    refused(coupled, lambda _: coupled(torch.ones(2, M)), UnsupportedError, "do not simply add up")
    with (
        pytest.raises(UnsupportedError, match="CobaLIFCell"),
        eprop.EProp(norse.SequentialState(norse.CobaLIFCell(M, N), nn.Linear(N, C), norse.LICell())),
    ):
        pass


def test_parameters_between_spikes_and_readout_are_refused():
    class Normed(Stacked):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(N)

        def forward(self, x, state=None):
            self.lif1.reset_mem()
            return self.out(self.norm(self.lif1(self.fc1(x))[0])), None

    net = Normed()
    net.lif2, net.fc2 = nn.Identity(), nn.Identity()
    call = lambda learner: learner.step(loss_of(net(torch.ones(2, M))[0]))  # noqa: E731
    refused(net, call, UnsupportedError, "norm.weight stands between")
    net.norm.requires_grad_(False)
    with eprop.EProp(net) as learner:
        call(learner)
    assert net.fc1.weight.grad.norm() > 0


def test_steps_out_of_order_are_refused():
    net, x = build("lsnn"), inputs()
    refused(net, lambda learner: learner.step(torch.ones(())), ConfigError, "was not called")
    refused(net, lambda learner: (net(x[0]), learner.step(torch.ones(3))), InputError, "one number")
    refused(
        net, lambda learner: (net(x[0]), learner.step(torch.ones(()))), UnsupportedError, "does not depend"
    )
    learner = eprop.EProp(net)
    with pytest.raises(ConfigError, match="not attached"):
        learner.step(torch.ones(()))
    refused(net, lambda learner: learner.__enter__(), ConfigError, "attached already")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "engine"),
        ({"feedback": "none"}, "feedback"),
        ({"update": "never"}, "update"),
        ({"chunk": 0}, "chunk"),
        ({"kappa": 1.5}, "kappa"),
        ({"kappa": "fast"}, "kappa"),
        ({"rate_reg": 0.1}, "rate_reg"),
        ({"feedback_decay": 2.0}, "feedback_decay"),
        ({"trace_dtype": torch.int32}, "trace_dtype"),
        ({"engine": "offline", "update": "chunk"}, "offline"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        eprop.EProp(build("lsnn"), **options)


def test_feedback_of_the_wrong_shape():
    net, x = build("lsnn"), inputs()
    refused(net, lambda learner: net(x[0]), ConfigError, "shape", feedback=torch.ones(2, 2))


def test_registered_as_a_learner():
    assert registry.plugins("learners")["eprop"].value == "snn_sparse_plugin.learners.eprop:plugin"
    assert registry.load("learners", "eprop") is eprop.EProp


@pytest.mark.parametrize(
    "options",
    [{"tau_m": 0}, {"adaptive": 9}, {"refractory": -1}, {"input_mask": torch.ones(2, 2, dtype=torch.bool)}],
)
def test_bad_layers(options):
    with pytest.raises(ConfigError):
        eprop.LSNN(4, 5, **options)


def test_parameters_of_neurons_that_get_no_gradient_are_named(caplog):
    net, x = SnnNet(snn.Leaky(beta=0.9, learn_beta=True), silent_leaky()), inputs(dtype=torch.float32)
    found = learned(net, x)
    assert "hidden.beta" in caplog.text
    assert "hidden.beta" not in found


def test_autocast():
    net, x = build("leaky-subtract", torch.float32), inputs(dtype=torch.float32)
    expected = oracle(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = learned(net, x, chunk=5)
    for name, grad in expected.items():
        assert found[name].dtype == torch.float32
        assert 0 < relative(found[name], grad) < 3e-2


def test_inside_sparse_mode_the_surrogate_is_cut_as_anywhere_else():
    import snn_sparse_plugin

    net, x = build("norse-lif-recurrent"), inputs()
    exact = learned(net, x)
    with snn_sparse_plugin.sparse_mode(backprop_threshold=0.1, min_active=0):
        found, expected = learned(net, x, chunk=5), oracle(net, x)
    compare(found, expected)
    assert relative(found["0.input_weights"], exact["0.input_weights"]) > 1e-3


def test_without_gradients_the_model_runs_as_it_is():
    for name in ("lsnn", "norse-lif-recurrent", "recurrence-outside"):
        net, x = build(name), inputs()
        expected = oracle(net, x)
        with eprop.EProp(net, chunk=5) as learner:
            with torch.no_grad():
                loop(net, x)  # e.g. a validation
            loop(net, x, learner.step)
            learner.flush()
            with torch.no_grad():
                loop(net, x)
        compare(grads(net), expected)


def test_the_import_swap_faces_are_taken():
    import snn_sparse_plugin.snntorch as sparse

    net, x = (
        SnnNet(sparse.Leaky(beta=0.9), sparse.Leaky(beta=0.8, reset_mechanism="none")),
        inputs(dtype=torch.float32),
    )
    compare(learned(net, x, chunk=5), oracle(net, x), 1e-5)
