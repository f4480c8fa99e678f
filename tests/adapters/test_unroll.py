"""unroll on snnTorch networks: the step loop's numbers, whatever stands between the neurons."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from oracle import on_grid, relative, snntorch_loop, spikes, windowed, worst
from torch import nn

snntorch = pytest.importorskip("snntorch")
from snntorch import surrogate, utils  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin import InputError, SpikeTrain, unroll  # noqa: E402
from snn_sparse_plugin.backends import calls  # noqa: E402
from snn_sparse_plugin.backends.cpu import CPUBackend  # noqa: E402
from snn_sparse_plugin.fusion import opened  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh():
    snntorch.SpikingNeuron.instances.clear()
    torch.manual_seed(0)
    calls.clear()


def forwards() -> int:
    """How many calls of the fused op there were."""
    return sum(n for (_, direction), n in calls.items() if direction == "forward")


def decays(n):
    return torch.linspace(0.7, 0.95, n)


# per-neuron parameters: of a scalar one the gradient is a sum of thousands of terms that cancel
CLASSES = {
    "Leaky": lambda n, **k: snntorch.Leaky(decays(n), learn_beta=True, **k),
    "Synaptic": lambda n, **k: snntorch.Synaptic(
        decays(n), 0.9 * decays(n), learn_alpha=True, learn_beta=True, **k
    ),
    "RLeaky": lambda n, **k: snntorch.RLeaky(decays(n), linear_features=n, **k),
    "RLeaky-one-to-one": lambda n, **k: snntorch.RLeaky(0.9, V=torch.rand(n), all_to_all=False, **k),
    "RSynaptic": lambda n, **k: snntorch.RSynaptic(0.8, 0.9, linear_features=n, **k),
}
RESETS = {
    "subtract": {},
    "zero": {"reset_mechanism": "zero"},
    "none": {"reset_mechanism": "none"},
    "subtract-now": {"reset_delay": False},
    "zero-now": {"reset_mechanism": "zero", "reset_delay": False},
}
COMBINATIONS = [
    pytest.param(CLASSES[name], RESETS[reset], id=f"{name}-{reset}")
    for name, reset in itertools.product(CLASSES, RESETS)
    if not (name == "RSynaptic" and reset.endswith("now"))
]


def two_layers(neuron, **options):
    options = {"spike_grad": surrogate.fast_sigmoid(10), "learn_threshold": True, **options}
    return on_grid(
        nn.Sequential(
            nn.Linear(30, 20),
            neuron(20, threshold=torch.ones(20), init_hidden=True, **options),
            nn.Linear(20, 7, bias=False),
            neuron(7, threshold=torch.ones(7), init_hidden=True, output=True, **options),
        )
    )


def leaky_net():
    return two_layers(CLASSES["Leaky"])


def compare(net, x, exact=True, window=None, **options):
    """Loop and unroll of twin networks: spikes and membranes equal, gradients close; -> the two twins."""
    ours, theirs = net, copy.deepcopy(net)
    if window is not None:
        for module in theirs:
            if hasattr(module, "spike_grad"):
                module.spike_grad = windowed(module.spike_grad, window)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    s1, m1 = snntorch_loop(theirs, x1)
    s2, m2, _ = unroll(ours, x2, backprop_threshold=window, min_active=0, **options)
    assert s1.sum() > 0
    if exact:
        assert torch.equal(s2, s1)
        assert torch.equal(m2, m1)
    assert s2.shape == s1.shape
    gs, gm = torch.randn_like(s1), torch.randn_like(m1)
    ((s1 * gs).sum() + (m1 * gm).sum()).backward()
    ((s2 * gs).sum() + (m2 * gm).sum()).backward()
    assert relative(x2.grad, x1.grad) < 1e-5
    assert worst((p.grad for p in ours.parameters()), (p.grad for p in theirs.parameters())) < 1e-5
    return ours, theirs


@pytest.mark.parametrize("window", [None, 0.15], ids=["exact", "window"])
@pytest.mark.parametrize(("neuron", "reset"), COMBINATIONS)
def test_equals_the_step_loop(neuron, reset, window):
    ours, theirs = compare(two_layers(neuron, **reset), spikes(12, 3, 30), window=window)
    assert forwards() == 2
    for a, b in zip(
        ours.buffers(), theirs.buffers(), strict=True
    ):  # hidden states are left as the loop leaves them
        assert torch.equal(a, b)


def test_the_window_changes_something():
    net, x = leaky_net(), spikes(12, 3, 30)
    grads = []
    for window in (None, 0.15):
        utils.reset(net)
        out = unroll(net, x, backprop_threshold=window, min_active=0)
        grads.append(torch.autograd.grad(out.spikes.sum(), net[0].weight)[0])
    assert relative(grads[1], grads[0]) > 1e-2


def test_first_layer_without_input_gradient():
    net, x = leaky_net(), spikes(12, 3, 30)
    twin = copy.deepcopy(net)
    s1, m1 = snntorch_loop(twin, x)
    s2, m2, _ = unroll(net, x, backprop_threshold=None)
    assert torch.equal(s1, s2)
    m1.square().sum().backward()
    m2.square().sum().backward()
    assert worst((p.grad for p in net.parameters()), (p.grad for p in twin.parameters())) < 1e-5


class Halved(nn.Module):
    """In the place of its input."""

    def forward(self, x):
        return x.mul_(0.5)


class TestModulesBetween:
    def test_convolutions_pooling_flatten(self):
        options = {"spike_grad": surrogate.atan(), "init_hidden": True}
        net = on_grid(
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.MaxPool2d(2),
                snntorch.Leaky(0.9, **options),
                nn.Conv2d(4, 3, 3),
                snntorch.Synaptic(0.5, 0.9, **options),
                nn.Flatten(),
                nn.Linear(12, 5),
                snntorch.Leaky(0.9, output=True, **options),
            )
        )
        compare(net, spikes(6, 2, 1, 8, 8))
        assert forwards() == 3

    def test_samples_without_a_batch(self):
        net = nn.Sequential(
            on_grid(nn.Conv2d(1, 3, 3)),
            nn.LayerNorm((3, 6, 6)),
            snntorch.Leaky(0.9, init_hidden=True),
            nn.Flatten(0),
            on_grid(nn.Linear(108, 5)),
            snntorch.Leaky(0.9, init_hidden=True, output=True),
        )
        x, twin = 4 * torch.rand(6, 1, 8, 8), copy.deepcopy(net)
        expected, mem = snntorch_loop(twin, x)
        out = unroll(net, x)
        assert torch.equal(out.spikes, expected)
        assert torch.equal(out.mem, mem)

    def test_dropout_in_training_is_drawn_at_every_step(self):
        net = nn.Sequential(*leaky_net())
        net.insert(2, nn.Dropout(0.5))
        twin, x = copy.deepcopy(net), spikes(12, 3, 30)
        torch.manual_seed(3)
        expected = snntorch_loop(twin, x)
        torch.manual_seed(3)
        assert torch.equal(unroll(net, x).spikes, expected[0])

    @pytest.mark.parametrize(
        "writes",
        [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.5, inplace=True), Halved()],
        ids=repr,
    )
    def test_modules_that_write_into_their_input(self, writes, monkeypatch):
        monkeypatch.setattr(CPUBackend, "prefers_events", lambda *a, **k: True)
        net = on_grid(
            nn.Sequential(
                *(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), writes, snntorch.Leaky(0.9, init_hidden=True)),
                *(nn.Flatten(), nn.Linear(36, 5), snntorch.Leaky(0.9, init_hidden=True, output=True)),
            )
        )
        twin, x = copy.deepcopy(net), spikes(6, 2, 1, 8, 8)
        torch.manual_seed(3)
        expected = snntorch_loop(twin, x)[1]
        torch.manual_seed(3)
        found = unroll(net, x, backprop_threshold=None).mem
        assert torch.equal(found, expected)
        for mems in (found, expected):
            mems.square().sum().backward()
        assert worst((p.grad for p in net.parameters()), (p.grad for p in twin.parameters())) < 1e-5

    def test_what_runs_step_by_step_does_so_together_where_steps_are_large(self, monkeypatch):
        monkeypatch.setattr(opened, "LARGE", 0)
        seen = []
        layers = nn.BatchNorm1d(20), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Dropout(0.5)
        first, neuron, *others = leaky_net()
        net = nn.Sequential(first, *layers, neuron, *others)
        for index in (1, 3):
            net[index].register_forward_hook(lambda module, args, out: seen.append((type(module), out.shape)))
        twin, x = copy.deepcopy(net), spikes(12, 3, 30)
        torch.manual_seed(3)
        expected = snntorch_loop(twin, x)[0]
        wanted, seen[:] = seen[:], []
        torch.manual_seed(3)
        assert torch.equal(unroll(net, x).spikes, expected)
        assert seen == wanted
        assert torch.allclose(net[1].running_var, twin[1].running_var)

    def test_dropout_in_eval_keeps_events(self):
        net = nn.Sequential(*leaky_net())
        net.insert(2, nn.Dropout(0.5))
        compare(net.eval(), spikes(12, 3, 30))
        assert forwards() == 2

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_batch_norm_keeps_its_statistics_per_step(self, training):
        net = nn.Sequential(*leaky_net())
        net[0] = nn.Linear(30, 20, bias=False)  # in training the gradient of a bias would be zero
        net.insert(1, nn.BatchNorm1d(20))
        net.train(training)
        ours, theirs = compare(net, spikes(12, 3, 30), exact=False)
        assert torch.allclose(ours[1].running_mean, theirs[1].running_mean)
        assert ours[1].num_batches_tracked == theirs[1].num_batches_tracked

    def test_an_unknown_module_sees_single_steps(self):
        class Centre(nn.Module):
            def forward(self, x):
                assert x.dim() == 2
                return x - x.mean(0)

        net = nn.Sequential(*leaky_net())
        net[0] = on_grid(nn.Linear(30, 20, bias=False))
        net.insert(1, Centre())
        compare(net, spikes(12, 4, 30))

    def test_neurons_that_cannot_be_fused_are_stepped(self):
        options = {"spike_grad": surrogate.fast_sigmoid(10), "init_hidden": True}
        net = on_grid(
            nn.Sequential(
                nn.Linear(30, 20),
                snntorch.Lapicque(beta=0.9, threshold=0.1, state_quant=lambda x: x * 1.0, **options),
                nn.Linear(20, 20),
                snntorch.Leaky(0.9, state_quant=lambda x: x * 1.0, **options),
                nn.Linear(20, 7),
                snntorch.Leaky(0.9, output=True, **options),
            )
        )
        compare(net, spikes(12, 3, 30), window=0.15)
        assert forwards() == 1

    def test_graded_spikes(self):
        factor = torch.tensor(0.75)
        net = two_layers(CLASSES["Leaky"], graded_spikes_factor=factor, learn_graded_spikes_factor=True)
        compare(net, spikes(12, 3, 30))

    def test_custom_spike_functions(self):
        def gradient(x, grad, spikes):
            return grad / (1 + x.abs()) ** 3

        net = two_layers(CLASSES["Leaky"], spike_grad=surrogate.custom_surrogate(gradient))
        compare(net, spikes(12, 3, 30), window=0.2)

    def test_nested_sequentials_and_a_module_used_twice(self):
        act, net = nn.Flatten(), leaky_net()
        net = nn.Sequential(nn.Sequential(net[0], net[1], act), nn.Sequential(act, net[2], net[3]))
        x, twin = spikes(12, 3, 30), copy.deepcopy(net)
        out = unroll(net, x)
        assert torch.equal(out.spikes, snntorch_loop(twin, x)[0])
        assert len(out.state) == 6
        assert forwards() == 2

    def test_a_last_layer_without_neuron(self):
        net = nn.Sequential(*leaky_net()[:3])
        twin, x = copy.deepcopy(net), spikes(12, 3, 30)
        out = unroll(net, x)
        assert torch.equal(out.spikes, torch.stack([twin(h) for h in x]))
        assert out.mem is None

    def test_parametrized_weights(self):
        net = leaky_net()
        torch.nn.utils.parametrizations.weight_norm(net[0])
        compare(net, spikes(12, 3, 30), exact=False)
        assert forwards() == 2

    def test_many_one_to_one_neurons(self, monkeypatch):
        monkeypatch.setattr("snn_sparse_plugin.fusion.fused.MAX_DIAGONAL", 10)
        compare(two_layers(CLASSES["RLeaky-one-to-one"]), spikes(12, 3, 30))
        assert forwards() == 1  # 20 neurons are stepped, 7 fused


class TestHooks:
    @pytest.mark.parametrize("position", [0, 1], ids=["linear", "neuron"])
    def test_forward_hooks_fire_at_every_step(self, position):
        net, seen = leaky_net(), []
        net[position].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
        compare(net, spikes(12, 3, 30))
        assert len(seen) == 24  # twelve steps of either twin
        assert set(seen) == {(3, net[0].weight.shape[1 - position])}

    def test_a_hook_that_changes_the_output_does(self):
        net = leaky_net()
        net[0].register_forward_hook(lambda module, args, out: out * 0)
        twin, x = copy.deepcopy(net), spikes(12, 3, 30)
        assert torch.equal(unroll(net, x).spikes, snntorch_loop(twin, x)[0])

    def test_backward_hooks_fire(self):
        net, seen = leaky_net(), []
        net[2].register_full_backward_hook(lambda module, gin, gout: seen.append(gout[0].shape))
        unroll(net, spikes(12, 3, 30)).spikes.sum().backward()
        assert len(seen) == 12

    def test_hooks_on_the_network_itself_are_refused(self):
        net = leaky_net()
        net.register_forward_hook(lambda *args: None)
        with pytest.raises(InputError, match="network itself has"):
            unroll(net, spikes(12, 3, 30))


class TestState:
    def test_continues_where_the_last_call_stopped(self):
        net, x = two_layers(CLASSES["RSynaptic"]), spikes(12, 3, 30)
        twin = copy.deepcopy(net)
        whole = unroll(twin, x)
        first, second = unroll(net, x[:5]), unroll(net, x[5:])
        assert torch.equal(torch.cat([first.spikes, second.spikes]), whole.spikes)
        assert torch.equal(second.mem[-1], whole.mem[-1])

    @pytest.mark.parametrize("name", CLASSES)
    def test_single_steps_without_gradient_are_upstreams_code(self, name):
        net, x = two_layers(CLASSES[name]), spikes(12, 3, 30)
        twin, third = copy.deepcopy(net), copy.deepcopy(net)
        with torch.no_grad(), ssp.sparse_mode():
            whole = unroll(twin, x)
            calls.clear()
            parts = [unroll(net, step[None]) for step in x]
            assert not forwards()
            given = None
            for step in x:
                last = unroll(third, step[None], given)
                given = last.state
        assert torch.equal(parts[-1].mem[-1], whole.mem[-1])
        assert torch.equal(last.mem[-1], whole.mem[-1])
        assert torch.equal(torch.cat([part.spikes for part in parts]), whole.spikes)
        assert not parts[0].spikes.requires_grad

    def test_hidden_states_carry_the_graph(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        twin = copy.deepcopy(net)
        for part in (x[:5], x[5:]):
            _, mem, _ = unroll(net, part, backprop_threshold=None)
            _, expected = snntorch_loop(twin, part)
        mem.sum().backward()
        expected.sum().backward()
        assert worst((p.grad for p in net.parameters()), (p.grad for p in twin.parameters())) < 1e-5

    def test_loop_and_unroll_may_alternate(self):
        net, x = two_layers(CLASSES["RLeaky"]), spikes(12, 3, 30)
        expected = snntorch_loop(copy.deepcopy(net), x)[0]
        unroll(net, x[:4])
        middle = snntorch_loop(net, x[4:8])[0]
        last = unroll(net, x[8:]).spikes
        assert torch.equal(torch.cat([middle, last]), expected[4:])

    def test_upstreams_reset_and_detach_work_on_it(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        first = unroll(net, x)
        snntorch.Leaky.detach_hidden()
        assert not net[1].mem.requires_grad
        utils.reset(net)
        assert torch.equal(unroll(net, x).spikes, first.spikes)

    def test_an_explicit_state_wins_over_the_hidden_one(self):
        net, x = two_layers(CLASSES["Synaptic"]), spikes(12, 3, 30)
        whole = unroll(copy.deepcopy(net), x).spikes
        _, _, state = unroll(net, x[:5])
        utils.reset(net)
        unroll(net, x)  # the hidden state is now another one
        assert torch.equal(unroll(net, x[5:], state).spikes, whole[5:])

    def test_an_explicit_state_of_stepped_neurons(self):
        options = {"init_hidden": True}
        net = on_grid(
            nn.Sequential(nn.Linear(30, 8), snntorch.Alpha(alpha=0.9, beta=0.8, output=True, **options))
        )
        x, twin = spikes(12, 3, 30), copy.deepcopy(net)
        whole = unroll(twin, x).spikes
        _, _, state = unroll(net, x[:5])
        unroll(net, x)
        assert torch.equal(unroll(net, x[5:], state).spikes, whole[5:])

    @pytest.mark.parametrize("fuse", [True, False], ids=["fused", "loop"])
    def test_nothing_changes_when_it_fails(self, fuse):
        net, x = leaky_net(), spikes(12, 3, 30)
        unroll(net, x)
        before = [b.clone() for b in net.buffers()]
        net[2] = nn.Linear(21, 7)
        with pytest.raises(InputError):
            unroll(net, x, fuse_time=fuse)
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))

    def test_wrong_number_of_entries(self):
        with pytest.raises(InputError, match="2 entries, the network has 4 layers"):
            unroll(leaky_net(), spikes(12, 3, 30), [None, None])

    def test_another_batch_size_starts_from_zeros(self):
        net = leaky_net()
        unroll(net, spikes(12, 3, 30))
        out = unroll(net, spikes(12, 5, 30))
        assert torch.equal(out.spikes, snntorch_loop(leaky_net_like(net), spikes(12, 5, 30))[0])


def leaky_net_like(net):
    twin = leaky_net()
    twin.load_state_dict(net.state_dict())
    return twin


class TestInput:
    def expected(self, net, x):
        return snntorch_loop(copy.deepcopy(net), x)

    def test_events(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        expected, mem = self.expected(net, x)
        out = unroll(net, SpikeTrain.from_dense(x), events=True)
        assert isinstance(out.spikes, SpikeTrain)
        assert torch.equal(out.spikes.to_dense(), expected)
        assert torch.equal(out.mem, mem)

    def test_torch_coo_and_csr(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        expected, _ = self.expected(net, x)
        rows = x.transpose(0, 1).reshape(36, 30)
        utils.reset(net)
        assert torch.equal(unroll(net, x.to_sparse_coo()).spikes, expected)
        utils.reset(net)
        assert torch.equal(unroll(net, rows.to_sparse_csr(), batch_size=3).spikes, expected)

    def test_a_static_input_is_multiplied_once(self):
        net, image = leaky_net(), torch.rand(3, 30).mul(256).round().div(256)
        compare(net, image.expand(12, 3, 30), exact=False)

    def test_a_static_input_through_a_convolution(self):
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Flatten(), *on_grid(nn.Sequential(nn.Linear(72, 20))), leaky_net()[1]
        )
        twin, image = copy.deepcopy(net), torch.rand(3, 1, 8, 8)
        x = image.expand(12, *image.shape)
        shapes = []
        handle = torch.nn.functional.conv2d

        def conv2d(x, *args):
            shapes.append(x.shape[0])
            return handle(x, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "conv2d", conv2d)
            out = unroll(net, x)
        assert shapes == [3]
        difference = (out.spikes != torch.stack([twin(h) for h in x])).float().mean()
        assert difference < 1e-5

    @pytest.mark.parametrize("shape", [(0, 3, 30), (5, 0, 30), (0, 0, 30)], ids=["T=0", "B=0", "both"])
    @pytest.mark.parametrize("fuse", [True, False], ids=["fused", "loop"])
    def test_empty(self, shape, fuse):
        net = nn.Sequential(*leaky_net())
        net.insert(1, nn.BatchNorm1d(20).eval())
        out = unroll(net, torch.zeros(shape), fuse_time=fuse)
        assert out.spikes.shape == (*shape[:2], 7)
        assert out.mem is None or out.mem.shape == (*shape[:2], 7)

    def test_no_steps_leave_the_hidden_state(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        unroll(net, x)
        before = net[1].mem.clone()
        unroll(net, x[:0])
        assert torch.equal(net[1].mem, before)

    def test_non_contiguous(self):
        net, x = leaky_net(), spikes(3, 12, 30)
        expected, _ = self.expected(net, x.transpose(0, 1))
        assert torch.equal(unroll(net, x.transpose(0, 1)).spikes, expected)

    def test_float64_stays_float64(self):
        net = leaky_net().double()
        out = unroll(net, spikes(12, 3, 30).double())
        assert out.spikes.dtype == out.mem.dtype == torch.float64
        assert torch.equal(out.spikes.float(), unroll(leaky_net_like(net.float()), spikes(12, 3, 30)).spikes)

    def test_half_precision_is_upstreams(self):
        net = nn.Sequential(nn.Linear(30, 20), snntorch.Leaky(0.9, init_hidden=True, output=True)).bfloat16()
        twin, x = copy.deepcopy(net), spikes(12, 3, 30).bfloat16()
        expected, mem = snntorch_loop(twin, x)
        out = unroll(net, x)
        assert (out.spikes.dtype, out.mem.dtype) == (expected.dtype, mem.dtype)
        assert torch.equal(out.spikes, expected)

    def test_autocast_is_upstreams(self):
        net = nn.Sequential(nn.Linear(30, 20), snntorch.Leaky(0.9, init_hidden=True, output=True))
        twin, x = copy.deepcopy(net), spikes(12, 3, 30)
        with torch.autocast("cpu", torch.bfloat16):
            expected, mem = snntorch_loop(twin, x)
            out = unroll(net, x)
        assert (out.spikes.dtype, out.mem.dtype) == (expected.dtype, mem.dtype)
        assert torch.equal(out.spikes, expected)

    def test_recurrence_under_autocast_is_upstreams(self):
        lif = snntorch.RLeaky(0.9, linear_features=30, init_hidden=True, output=True)
        with torch.no_grad():  # weights whose sums are exact in half precision
            for p in lif.recurrent.parameters():
                p.copy_((p * 32).round() / 16)
        net = nn.Sequential(nn.Flatten(), lif)
        twin, x = copy.deepcopy(net), spikes(12, 3, 5, 6)
        with torch.autocast("cpu", torch.bfloat16):
            expected, mem = snntorch_loop(twin, x)
            out = unroll(net, x)
        assert (out.spikes.dtype, out.mem.dtype) == (expected.dtype, mem.dtype)
        assert torch.equal(out.spikes, expected)
        assert torch.equal(out.mem, mem)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(5, 3, 31), r"0→1: input has shape \(5, 3, 31\), weight expects 30 features"),
            (torch.zeros(5, 30), r"x must have shape \(T, B, ...\)"),
            (torch.zeros(5, 3, 30, dtype=torch.int64), "floating dtype"),
            ([[1.0]], "must be a tensor or a SpikeTrain, got list"),
            (torch.zeros(15, 30).to_sparse_csr(), "batch_size"),
        ],
        ids=["features", "dimensions", "integers", "list", "no batch_size"],
    )
    def test_bad_input_says_so(self, x, message):
        with pytest.raises(InputError, match=message):
            unroll(leaky_net(), x)

    def test_an_unknown_option(self):
        with pytest.raises(ssp.ConfigError, match="Did you mean 'backend'"):
            unroll(leaky_net(), spikes(5, 3, 30), backends="cpu")


class TestNetworks:
    def test_a_single_neuron(self):
        neuron, x = snntorch.Leaky(0.9), torch.randn(12, 3, 4, 5)
        out = unroll(neuron, x)
        assert out.spikes.shape == out.mem.shape == x.shape

    def test_a_neuron_without_hidden_state_in_the_middle(self):
        net = nn.Sequential(nn.Linear(30, 20), snntorch.Leaky(0.9), nn.Linear(20, 3))
        with pytest.raises(
            InputError, match=r"1 \(Leaky\) keeps no hidden state: build it with init_hidden=True"
        ):
            unroll(net, spikes(5, 3, 30))

    def test_an_output_neuron_in_the_middle(self):
        net = nn.Sequential(
            nn.Linear(30, 20), snntorch.Leaky(0.9, init_hidden=True, output=True), nn.Linear(20, 3)
        )
        with pytest.raises(InputError, match="output=True is for the last layer"):
            unroll(net, spikes(5, 3, 30))

    def test_something_else_than_a_sequence(self):
        class Net(nn.Module):
            def forward(self, x):
                return x

        with pytest.raises(InputError, match="got Net"):
            unroll(Net(), spikes(5, 3, 30))

    def test_events_of_a_network_without_spikes(self):
        with pytest.raises(InputError, match=r"last layer 0 \(Linear\) emits none"):
            unroll(nn.Sequential(nn.Linear(30, 20)), spikes(5, 3, 30), events=True)


class TestModes:
    def test_without_time_fusion_it_is_the_loop(self):
        compare(leaky_net(), spikes(12, 3, 30), window=0.15, fuse_time=False)
        assert forwards() == 0

    def test_without_time_fusion_random_layers_keep_their_order(self):
        net = nn.Sequential(*leaky_net())
        net.insert(2, nn.Dropout(0.5))
        net.insert(0, nn.Dropout(0.5))
        twin, x = copy.deepcopy(net), spikes(12, 3, 30)
        torch.manual_seed(3)
        expected = snntorch_loop(twin, x)[0]
        torch.manual_seed(3)
        assert torch.equal(unroll(net, x, fuse_time=False).spikes, expected)

    def test_options_of_the_call_win_over_those_of_the_model(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        expected = torch.autograd.grad(unroll(net, x, backprop_threshold=None).spikes.sum(), net[0].weight)[0]
        utils.reset(net)
        ssp.sparsify(net, backprop_threshold=0.01, min_active=0)
        for fuse in (True, False):
            utils.reset(net)
            out = unroll(net, x, backprop_threshold=None, fuse_time=fuse)
            assert relative(torch.autograd.grad(out.spikes.sum(), net[0].weight)[0], expected) < 1e-5

    def test_no_grad_saves_nothing(self):
        net = leaky_net()
        with torch.no_grad():
            out = unroll(net, spikes(12, 3, 30))
        assert not out.spikes.requires_grad
        assert not net[1].mem.requires_grad

    def test_an_event_output_carries_the_gradient(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        dense = torch.autograd.grad(unroll(net, x).spikes.square().sum(), net[0].weight)[0]
        utils.reset(net)
        train = unroll(net, x, events=True).spikes
        assert relative(torch.autograd.grad(train.to_dense().square().sum(), net[0].weight)[0], dense) < 1e-5

    def test_an_event_output_of_a_stepped_neuron_carries_the_gradient(self):
        net, x = leaky_net(), spikes(12, 3, 30)
        dense = torch.autograd.grad(unroll(net, x, min_active=0).spikes.square().sum(), net[0].weight)[0]
        utils.reset(net)
        train = unroll(net, x, events=True, fuse_time=False, min_active=0).spikes
        assert relative(torch.autograd.grad(train.to_dense().square().sum(), net[0].weight)[0], dense) < 1e-5


@pytest.mark.parametrize("wrapped", [False, True], ids=["twice", "inside another module"])
def test_a_neuron_at_two_places_shares_its_membrane(wrapped):
    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    neuron = snntorch.Leaky(0.9, init_hidden=True)
    net = on_grid(
        nn.Sequential(
            *(nn.Linear(30, 20), neuron, nn.Linear(20, 20), Block(neuron) if wrapped else neuron),
            *(nn.Linear(20, 7), snntorch.Leaky(0.9, init_hidden=True, output=True)),
        )
    )
    twin, x = copy.deepcopy(net), spikes(12, 3, 30)
    expected, mem = snntorch_loop(twin, x)
    out = unroll(net, x)
    assert expected.sum() > 0
    assert torch.equal(out.spikes, expected)
    assert torch.equal(out.mem, mem)
    assert torch.equal(neuron.mem, twin[1].mem)


def test_the_last_layer_is_exact_while_the_guard_is_on():
    net, x, grads = leaky_net(), spikes(12, 3, 30), {}
    windows = {"exact": None, "guarded": 0.15, "bare": 0.15}
    for name, window in windows.items():
        utils.reset(net)
        ssp.sparsify(net[1], backprop_threshold=None)
        ssp.sparsify(net[3], backprop_threshold=window, min_active=0 if name == "bare" else 0.01)
        grads[name] = torch.autograd.grad(unroll(net, x).spikes.sum(), net[2].weight)[0]
    # many neurons are active: the guard acted on the last layer alone, and says so
    assert sum(n for (kind, _), n in calls.items() if kind == "guard") == 1
    assert relative(grads["guarded"], grads["exact"]) < 1e-5
    assert relative(grads["bare"], grads["exact"]) > 1e-2


@pytest.mark.parametrize("name", ["Leaky", "RSynaptic"])
def test_a_disabled_surrogate_stops_the_gradient_as_upstreams_does(name):
    net, x = two_layers(CLASSES[name], spike_grad=None, surrogate_disable=True), spikes(12, 3, 30)
    twin = copy.deepcopy(net)
    expected, expected_mem = snntorch_loop(twin, x)
    out = unroll(net, x)
    assert forwards() == 2
    assert torch.equal(out.spikes, expected)
    assert out.spikes.requires_grad == expected.requires_grad is False
    out.mem.square().sum().backward()
    expected_mem.square().sum().backward()
    assert net[0].weight.grad is None
    assert worst((p.grad for p in net.parameters()), (p.grad for p in twin.parameters())) < 1e-5
    hidden = (
        (a.mem.requires_grad, getattr(a, "spk", a.mem).requires_grad) for n in (net, twin) for a in n[1::2]
    )
    hidden = list(hidden)
    assert hidden[:2] == hidden[2:]


def test_a_silent_neuron_of_a_step_loop_keeps_its_gradient():
    x = torch.tensor([[0.9, -3.0, -3.0], [-3.0, -3.0, 0.9]]).requires_grad_()
    for least, expected in ((0.01, [[1, 1, 0], [0, 1, 1]]), (0, [[1, 0, 0], [0, 0, 1]])):
        with ssp.sparse_mode(backprop_threshold=0.2, min_active=least):
            spk, _ = snntorch.Leaky(0.9)(x, torch.zeros(2, 3))
        assert (torch.autograd.grad(spk.sum(), x)[0] != 0).int().tolist() == expected


def test_a_silent_layer_learns_thanks_to_min_active():
    """With a window alone a network that starts silent never gets a gradient; the guard lets it learn."""

    def train(min_active):
        torch.manual_seed(0)
        options = {"spike_grad": surrogate.fast_sigmoid(5), "init_hidden": True}
        net = nn.Sequential(nn.Linear(30, 20), snntorch.Leaky(0.5, output=True, **options))
        with torch.no_grad():
            net[0].weight.mul_(0.1)
            net[0].bias.zero_()
        optimizer, x = torch.optim.Adam(net.parameters(), 0.05), spikes(10, 8, 30)
        rates = []
        for _ in range(30):
            utils.reset(net)
            out, _, _ = unroll(net, x, backprop_threshold=0.1, min_active=min_active)
            optimizer.zero_grad()
            (out.mean() - 0.2).square().backward()
            optimizer.step()
            rates.append(out.mean().item())
        return rates

    with_guard, without = train(0.01), train(0.0)
    assert with_guard[0] == without[0] == 0
    assert without[-1] == 0
    assert with_guard[-1] == pytest.approx(0.2, abs=0.1)
