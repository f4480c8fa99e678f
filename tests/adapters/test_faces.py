"""The import-swap faces: every name of the original, and neurons that are the original's in all but speed."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import compiles_whole
from oracle import on_grid, snntorch_loop, spikes
from torch import nn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

import snn_sparse_plugin as ssp  # noqa: E402
import snn_sparse_plugin.norse as sparse_norse  # noqa: E402
import snn_sparse_plugin.snntorch as sparse_snn  # noqa: E402
from snn_sparse_plugin.core.config import active_config  # noqa: E402

NEURONS = {
    "Leaky": {"beta": 0.9},
    "Synaptic": {"alpha": 0.8, "beta": 0.9},
    "RLeaky": {"beta": 0.9, "linear_features": 6},
    "RSynaptic": {"alpha": 0.8, "beta": 0.9, "linear_features": 6},
}
NORSE = {
    "LIF": (),
    "LIFCell": (),
    "LIFRecurrent": (6, 6),
    "LIFRecurrentCell": (6, 6),
    "LIFBoxCell": (),
    "IAF": (),
    "IAFCell": (),
    "LI": (),
    "LICell": (),
    "LILinearCell": (6, 6),
}
for _name in sparse_norse.__all__:
    if _name not in NORSE and _name not in ("SequentialState", "to_nir", "CobaLIFCell", "LIFCorrelation"):
        _sizes = (6, 5) if "Recurrent" in _name else ()
        NORSE[_name] = (*_sizes, norse.tonic_spiking) if _name.startswith("Izhikevich") else _sizes


@pytest.fixture(autouse=True)
def _fresh():
    snntorch.SpikingNeuron.instances.clear()
    torch.manual_seed(0)


class TestNames:
    @pytest.mark.parametrize(
        ("face", "original"), [(sparse_snn, snntorch), (sparse_norse, norse)], ids=["snntorch", "norse"]
    )
    def test_every_public_name_is_there(self, face, original):
        names = getattr(original, "__all__", None) or [n for n in dir(original) if not n.startswith("_")]
        assert set(names) <= set(dir(face))
        for name in names:
            mine, theirs = getattr(face, name), getattr(original, name)
            assert mine is theirs or name == "to_nir" or issubclass(mine, theirs)
            assert getattr(mine, "__name__", None) == getattr(theirs, "__name__", None)

    def test_submodules_are_the_originals(self):
        import norse.torch.functional.lif
        import snn_sparse_plugin.snntorch.backprop as backprop
        import snntorch.backprop
        import snntorch.functional
        import snntorch.spikegen
        from snn_sparse_plugin.norse.functional import lif

        from snn_sparse_plugin.snntorch import functional, spikegen, surrogate, utils

        assert backprop is snntorch.backprop
        assert functional is snntorch.functional
        assert spikegen is snntorch.spikegen
        assert surrogate is snntorch.surrogate
        assert utils is snntorch.utils
        assert lif is norse.torch.functional.lif
        assert backprop.__spec__.name == "snntorch.backprop"

    def test_a_name_that_is_in_neither(self):
        with pytest.raises(AttributeError, match=r"'snn_sparse_plugin\.snntorch' has no attribute 'Leeky'"):
            _ = sparse_snn.Leeky

    @pytest.mark.parametrize(
        ("blocked", "face", "extra"),
        [("snntorch", "snntorch", "snntorch"), ("norse", "norse", "norse")],
    )
    def test_a_missing_library_says_what_to_install(self, blocked, face, extra):
        code = f"""
            import sys

            class Blocked:
                def find_spec(self, name, path, target=None):
                    if name == "{blocked}":
                        raise ModuleNotFoundError("blocked", name=name)

            sys.meta_path.insert(0, Blocked())
            import snn_sparse_plugin
            try:
                import snn_sparse_plugin.{face}
            except snn_sparse_plugin.MissingDependencyError as error:
                assert "pip install {extra}" in str(error), error
            else:
                raise SystemExit("no error")
            """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NEURONS)
class TestSnnTorch:
    def pair(self, name, **options):
        torch.manual_seed(0)
        ours = getattr(sparse_snn, name)(**NEURONS[name], **options)
        torch.manual_seed(0)
        return ours, getattr(snntorch, name)(**NEURONS[name], **options)

    def test_is_the_original_in_name_and_keys(self, name):
        ours, theirs = self.pair(name)
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == name
        assert "snntorch" in str(type(ours))  # nirtorch looks for it
        assert repr(ours) == repr(theirs)
        assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())

    def test_spikes_and_states_are_the_originals(self, name):
        ours, theirs = self.pair(name, init_hidden=True, output=True)
        for x in torch.randn(8, 3, 6):
            assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x), strict=True))

    def test_is_always_sparse(self, name):
        ours, theirs = self.pair(name, init_hidden=True)
        x = torch.randn(5, 6)
        with ssp.sparse_mode(backprop_threshold=0.05, min_active=0):
            mine = self.gradient(ours, x)
        assert not torch.equal(mine, self.gradient(theirs, x))
        # by default the heavy-tailed atan is cut at a distance of 4: nothing here is that far
        far = torch.full((5, 6), -9.0)
        far[0] = 1.0
        assert (self.gradient(self.pair(name, init_hidden=True)[0], far)[1:] == 0).all()
        assert (self.gradient(self.pair(name, init_hidden=True)[1], far)[1:] != 0).all()

    def gradient(self, neuron, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(neuron(x).sum(), x)[0]

    def test_deepcopy_and_pickle(self, name):
        ours, _ = self.pair(name, init_hidden=True, spike_grad=snntorch.surrogate.fast_sigmoid(slope=30))
        x = torch.randn(8, 3, 6)
        twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
        expected = torch.stack([ours(h) for h in x])
        for twin in twins:
            assert type(twin) is type(ours)
            assert twin.state_function.__self__ is twin
            assert torch.equal(torch.stack([twin(h) for h in x]), expected)
        assert "slope" in str(inspect.getclosurevars(twins[1].spike_grad).nonlocals)

    def test_upstreams_reset_finds_it(self, name):
        ours, _ = self.pair(name, init_hidden=True)
        net = nn.Sequential(ours)
        net(torch.randn(3, 6))
        assert ours.mem.abs().sum() > 0
        sparse_snn.utils.reset(net)
        assert ours.mem.abs().sum() == 0

    @compiles_whole
    def test_compiles_without_a_graph_break(self, name):
        ours, theirs = self.pair(name)
        x = torch.randn(3, 6)
        states = [torch.zeros(3, 6) for _ in range(len(theirs(x)))]
        order = states[: len(inspect.signature(theirs.forward).parameters) - 1]
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, *order)[0], theirs(x, *order)[0])


def test_pickle_keeps_an_unknown_spike_function():
    neuron = pickle.loads(pickle.dumps(sparse_snn.Leaky(0.9, spike_grad=torch.sign)))
    assert neuron.spike_grad is torch.sign


def test_pickle_of_a_model_in_a_fresh_process(tmp_path):
    net = nn.Sequential(nn.Linear(6, 4), sparse_snn.Leaky(0.9, init_hidden=True))
    torch.save(net, tmp_path / "net.pt")
    code = f"""
        import torch
        net = torch.load({str(tmp_path / "net.pt")!r}, weights_only=False)
        # one sample brings every neuron to its threshold, the others stay far below
        net[0].weight.data.fill_(10.0 / 6)
        net[0].bias.data.fill_(-9.0)
        x = torch.zeros(5, 6)
        x[0] = 1.0
        x.requires_grad_()
        net(x).sum().backward()
        assert (x.grad[1:] == 0).all(), x.grad
        assert (x.grad[0] != 0).all()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_unroll_of_a_face_network():
    def build(snn):
        torch.manual_seed(0)
        options = {"init_hidden": True}
        return on_grid(
            nn.Sequential(
                nn.Linear(30, 9),
                snn.Leaky(0.9, **options),
                nn.Linear(9, 4),
                snn.Leaky(0.9, output=True, **options),
            )
        )

    x = spikes(12, 3, 30)
    out = ssp.unroll(build(sparse_snn), x)
    expected, mem = snntorch_loop(build(snntorch), x)
    assert torch.equal(out.spikes, expected)
    assert torch.equal(out.mem, mem)


def tensors(state):
    """The leaves of a state; those of refractory neurons are nested."""
    return [state] if isinstance(state, torch.Tensor) else [t for part in state for t in tensors(part)]


@pytest.mark.parametrize("name", NORSE)
class TestNorse:
    def pair(self, name):
        torch.manual_seed(0)
        ours = getattr(sparse_norse, name)(*NORSE[name])
        torch.manual_seed(0)
        return ours, getattr(norse, name)(*NORSE[name])

    def test_is_the_original_in_name_and_keys(self, name):
        ours, theirs = self.pair(name)
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == name
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert norse.SequentialState(ours).stateful_layers == [True]

    def test_outputs_are_the_originals(self, name):
        ours, theirs = self.pair(name)
        x = 20 * torch.rand(*((7,) if "Cell" not in name else ()), 3, 6)
        with (
            torch.no_grad()
        ):  # products without rounding: a library sums in an order that depends on sizes and CPU
            for weights in (x, *ours.parameters(), *theirs.parameters()):
                weights.copy_((256 * weights).round() / 256)
        out, state = ours(x)
        expected, expected_state = theirs(x)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(expected_state), strict=True))

    def test_deepcopy(self, name):
        ours, theirs = self.pair(name)
        x = 20 * torch.rand(*((7,) if "Cell" not in name else ()), 3, 6)
        assert torch.equal(copy.deepcopy(ours)(x)[0], theirs(x)[0])


def test_norse_faces_are_always_sparse():
    x = torch.randn(4, 200, requires_grad=True)
    with ssp.sparse_mode(backprop_threshold=0.1, min_active=0):
        z, _ = sparse_norse.LIFBoxCell(sparse_norse.LIFBoxParameters(tau_mem_inv=torch.tensor(1000.0)))(x)
    assert (torch.autograd.grad(z.sum(), x)[0] == 0).float().mean() > 0.5


def test_a_norse_face_network_fuses():
    from snn_sparse_plugin.backends import calls

    net = sparse_norse.SequentialState(
        nn.Linear(5, 4), sparse_norse.LIF(), sparse_norse.Lift(nn.Linear(4, 2)), sparse_norse.LI()
    )
    calls.clear()
    net(torch.rand(6, 2, 5))
    assert sum(n for (_, direction), n in calls.items() if direction == "forward") == 2


@pytest.mark.parametrize("shape", [(3, 5), (7, 3, 5)], ids=["a step", "a sequence"])
def test_a_norse_face_container_is_sparse_within(shape):
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(active_config())
            return x

    sparse_norse.SequentialState(Probe(), norse.LIFCell() if len(shape) == 2 else norse.LIF())(
        torch.rand(shape)
    )
    assert seen
    assert None not in seen


class TestNIR:
    """Exchange with other simulators sees the originals."""

    def test_snntorch_round_trip(self):
        nir = pytest.importorskip("nir")
        pytest.importorskip("nirtorch")
        from snntorch.export_nir import export_to_nir
        from snntorch.import_nir import import_from_nir

        def build(snn):
            torch.manual_seed(0)
            neuron = snn.Leaky(torch.full((5,), 0.9), threshold=torch.ones(5), init_hidden=True)
            return nn.Sequential(nn.Linear(6, 5), neuron)

        ours, theirs = (export_to_nir(build(s), torch.rand(6)) for s in (sparse_snn, snntorch))
        assert isinstance(ours, nir.NIRGraph)
        assert {k: type(v) for k, v in ours.nodes.items()} == {k: type(v) for k, v in theirs.nodes.items()}
        assert sorted(ours.edges) == sorted(theirs.edges)
        net = import_from_nir(ours)
        with ssp.sparse_mode():
            spk, _ = net(torch.rand(2, 6))
        assert spk.shape == (2, 5)

    def test_norse_export_sees_norses_own_classes(self, monkeypatch):
        net, seen = sparse_norse.SequentialState(nn.Linear(6, 5), sparse_norse.LIFCell()), []
        monkeypatch.setattr(
            norse, "to_nir", lambda module, data: seen.extend(type(m) for m in module.modules())
        )
        sparse_norse.to_nir(net, None)
        assert seen == [norse.SequentialState, nn.Linear, norse.LIFCell]
        assert type(net[1]) is sparse_norse.LIFCell

    def test_norse_export(self):
        pytest.importorskip("nir")

        def build(snn):
            torch.manual_seed(0)
            return snn.SequentialState(nn.Linear(6, 5), snn.LIFCell())

        ours, theirs = (s.to_nir(build(s), torch.rand(1, 6)) for s in (sparse_norse, norse))
        assert {k: type(v) for k, v in ours.nodes.items()} == {k: type(v) for k, v in theirs.nodes.items()}
        assert sorted(ours.edges) == sorted(theirs.edges)
