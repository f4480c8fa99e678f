"""NIR export and import of sparse neurons: upstream's graphs, and networks built from them."""

from __future__ import annotations

import pytest
import torch
from snntorch_cases import WAYS, B, N, T, equal, every_way, outcome, snntorch
from torch import nn

from snn_sparse_plugin import sparsify  # isort: skip
import snn_sparse_plugin.snntorch as face  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:nirtorch.extract_nir_graph is being deprecated")


def close(a, b):
    return a.shape == b.shape and bool((a - b).norm() <= 1e-5 * b.norm() + 1e-12)


def nir_network(library, kind):
    torch.manual_seed(0)
    wide, options = torch.full((N,), 0.9), {"init_hidden": True, "threshold": torch.ones(N)}
    builds = {
        "Leaky": lambda: library.Leaky(wide, **options),
        "Synaptic": lambda: library.Synaptic(0.8 * wide, wide, **options),
        "RLeaky": lambda: library.RLeaky(wide, linear_features=N, **options),
        "RLeaky-V": lambda: library.RLeaky(wide, V=0.3 * wide, all_to_all=False, **options),
        "RLeaky-scalar-V": lambda: library.RLeaky(wide, V=0.3, all_to_all=False, **options),
        "RSynaptic": lambda: library.RSynaptic(0.8 * wide, wide, linear_features=N, **options),
        "RSynaptic-V": lambda: library.RSynaptic(0.8 * wide, wide, V=0.3 * wide, all_to_all=False, **options),
        "Alpha": lambda: library.Alpha(0.9, 0.8, **options),
    }
    return nn.Sequential(nn.Linear(6, N), builds[kind](), nn.Linear(N, 3))


NIR_KINDS = ["Leaky", "Synaptic", "RLeaky", "RLeaky-V", "RSynaptic", "RSynaptic-V"]
NOT_EXPORTED = ["RLeaky-scalar-V", "Alpha"]


def described(graph):
    """A NIR graph as plain comparable data."""
    nodes = {}
    for name, node in graph.nodes.items():
        if hasattr(node, "nodes"):
            nodes[name] = described(node)
        else:
            values = {k: torch.as_tensor(v) for k, v in vars(node).items() if hasattr(v, "dtype")}
            nodes[name] = (type(node).__name__, values)
    return nodes, sorted(graph.edges)


def same_graph(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for name, node in a[0].items():
        other = b[0][name]
        if isinstance(node[0], dict):
            same_graph(node, other)
        else:
            assert node[0] == other[0]
            assert node[1].keys() == other[1].keys()
            assert all(equal(v, other[1][k]) for k, v in node[1].items())


class TestNIR:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("nir")
        pytest.importorskip("nirtorch")

    def export(self, net):
        from snntorch.export_nir import export_to_nir

        return export_to_nir(net, torch.rand(6))

    @every_way
    @pytest.mark.parametrize("kind", [*NIR_KINDS, *NOT_EXPORTED])
    def test_export(self, kind, way):
        error, theirs = outcome(lambda: described(self.export(nir_network(snntorch, kind))))
        with way.on():
            failed, ours = outcome(lambda: described(self.export(way.ready(nir_network(way.library, kind)))))
        assert failed == error, ours
        assert bool(error) == (kind in NOT_EXPORTED), theirs
        if not error:
            same_graph(ours, theirs)

    @pytest.mark.parametrize(
        "way", [WAYS[k] for k in WAYS if k != "face"], ids=[k for k in WAYS if k != "face"]
    )
    @pytest.mark.parametrize("kind", NIR_KINDS)
    def test_import(self, kind, way):
        """What upstream builds from a graph (reset without delay, its gradient attached) is sparse too."""
        from snntorch.import_nir import import_from_nir

        def run(ready):
            torch.manual_seed(0)
            net = ready(import_from_nir(self.export(nir_network(face, kind))))
            x, state, outs = (3 * torch.rand(T, B, 6)).requires_grad_(), None, []
            for h in x.unbind(0):
                out, state = net(h, state)
                outs.append(out)
            outs = torch.stack(outs)
            return outs, torch.autograd.grad(outs.square().sum(), x)[0]

        error, theirs = outcome(lambda: run(lambda net: net))
        with way.on():
            failed, ours = outcome(lambda: run(way.ready))
        assert failed == error, ours
        if error:
            assert ours == theirs
        else:
            assert equal(ours[0], theirs[0])
            assert close(ours[1], theirs[1])


def test_an_imported_network_is_in_the_report():
    pytest.importorskip("nirtorch")
    from snntorch.export_nir import export_to_nir
    from snntorch.import_nir import import_from_nir

    net = import_from_nir(export_to_nir(nir_network(face, "Leaky"), torch.rand(6)))
    assert len(sparsify(net).names("fused")) == 1
