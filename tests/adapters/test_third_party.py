"""An outside distribution registers a neuron library's adapter and a backend through real entry points."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

LIBRARY = """
    import torch

    class Toy(torch.nn.Module):
        '''Resets to zero in the step in which it fires; its state is the membrane.'''

        def __init__(self, decay):
            super().__init__()
            self.decay = torch.nn.Parameter(torch.tensor(decay))
            self.spike = None

        def forward(self, x, v):
            u = self.decay * v + x
            s = self.spike(u - 1)
            return s, (1 - s) * u
"""

PLUGIN = """
    import toylib
    from snn_sparse_plugin import NeuronParams, NeuronSpec, NeuronState, Surrogate
    from snn_sparse_plugin.adapters import Adapter, Neuron
    from snn_sparse_plugin.ops.spiking_layer.reference import ReferenceBackend

    class ToyAdapter(Adapter):
        name = package = "toylib"

        def available(self):
            return True, "1.0"

        def owns(self, module):
            return isinstance(module, toylib.Toy)

        def neuron(self, module):
            spec = NeuronSpec(reset="zero", timing="immediate", attached=True)
            return Neuron(spec, NeuronParams(mem=module.decay), Surrogate("fast_sigmoid", (10.0,)))

        def initial_state(self, module, neuron, template, state):
            return NeuronState(v=state), None

        def final_state(self, module, state, initial):
            return state.v

        def step(self, module, x, state):
            s, v = module(x, x.new_zeros(x.shape) if state is None else state)
            return s, v, v

    class ToyBackend(ReferenceBackend):
        name = "toybackend"
"""

MAIN = """
    import torch, toylib
    import snn_sparse_plugin as ssp
    from snn_sparse_plugin import registry
    from snn_sparse_plugin.backends import calls

    plugin = registry.plugins("adapters")["toy"]
    assert (plugin.distribution, plugin.version) == ("toy-spikes", "1.0"), plugin

    torch.manual_seed(0)
    neuron = toylib.Toy(0.75)
    neuron.spike = ssp.Surrogate("fast_sigmoid", (10.0,))
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), neuron)
    with torch.no_grad():
        for p in net[0].parameters():
            p.copy_((p * 1024).round() / 256)
    x = (torch.rand(9, 2, 6) < 0.3).float()

    results = []
    for options in ({"backend": "toybackend"}, {"fuse_time": False}):
        spikes, mem, state = ssp.unroll(net, x, backprop_threshold=None, **options)
        assert spikes.sum() > 0
        grads = torch.autograd.grad(spikes.sum() + mem.square().sum(), list(net.parameters()))
        results.append([spikes, mem, state[1], *grads])
    assert calls["toybackend", "forward"] == 1, calls
    assert calls["toybackend", "backward"] == 1, calls
    for fused, stepped in zip(*results):
        assert torch.allclose(fused, stepped, rtol=1e-5, atol=1e-6), (fused, stepped)
    assert ssp.sparsify(net).names("fused") == ["1"]
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    info = tmp_path / "toy_spikes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-spikes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[snn_sparse_plugin.adapters]\ntoy = toyplugin:ToyAdapter\nbroken = toyplugin:Missing\n\n"
        "[snn_sparse_plugin.backends]\ntoybackend = toyplugin:ToyBackend\n"
    )
    (tmp_path / "toylib.py").write_text(textwrap.dedent(LIBRARY))
    (tmp_path / "toyplugin.py").write_text(textwrap.dedent(PLUGIN))
    return tmp_path


def test_an_outside_adapter_and_backend_are_used(site):
    code = f"import sys\nsys.path.insert(0, {str(site)!r})\n" + textwrap.dedent(MAIN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("adapter 'broken' of toy-spikes 1.0 cannot be loaded") == 1


def test_broken_adapters_are_tried_once_and_imports_stay_as_they_were(tmp_path):
    pytest.importorskip("norse.torch")
    info = tmp_path / "broken_spikes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-spikes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[snn_sparse_plugin.adapters]\none = brokenone:Adapter\ntwo = brokentwo:Adapter\n"
    )
    for name in ("one", "two"):
        (tmp_path / f"broken{name}.py").write_text(
            f"print('trying {name}')\nimport colorsys, no_such_{name}\n"
        )
    code = f"""
        import sys, warnings
        sys.path.insert(0, {str(tmp_path)!r})
        warnings.simplefilter("ignore")
        import snn_sparse_plugin as ssp
        from snn_sparse_plugin import registry
        with ssp.sparse_mode():
            import mailbox, norse.torch
        from snn_sparse_plugin.adapters import is_hook
        assert is_hook(norse.torch.SequentialState.forward), "the late import is not hooked"
        registry.refresh()
        with ssp.sparse_mode():
            pass
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["trying one", "trying two"] * 2
