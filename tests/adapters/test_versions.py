"""Versions outside of what an adapter is tested with, and neuron classes that no adapter knows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

from norse.torch.module.snn import SNNCell  # noqa: E402

from snn_sparse_plugin import sparse_mode, sparsify, unroll  # noqa: E402
from snn_sparse_plugin.adapters import loading  # noqa: E402
from snn_sparse_plugin.core import registry  # noqa: E402
from snn_sparse_plugin.fusion import boundaries  # noqa: E402
from snn_sparse_plugin.interfaces.cli import app  # noqa: E402

RANGES = {"snntorch": "0.9.4 to 1.0", "norse": "1.1"}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no library has been hooked yet; the hooks themselves are set once."""
    monkeypatch.setattr(loading, "_installed", [])
    monkeypatch.setattr(loading, "_refused", [])
    monkeypatch.setattr(loading, "_found", None)


def install(monkeypatch: pytest.MonkeyPatch, library: str, version: str) -> list[str]:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == library else real(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with sparse_mode():
                pass
    return [str(w.message) for w in caught]


@pytest.mark.usefixtures("fresh")
class TestVersions:
    @pytest.mark.parametrize(
        ("library", "version"),
        [
            ("snntorch", "0.9.3"),
            ("snntorch", "1.1.0"),
            ("snntorch", "2.0rc1"),
            ("norse", "1.0.0"),
            ("norse", "1.2"),
        ],
    )
    def test_one_outside_warns_once(
        self, monkeypatch: pytest.MonkeyPatch, library: str, version: str
    ) -> None:
        (warning,) = install(monkeypatch, library, version)
        assert f"{library} {version} " in warning
        assert f"tested with, {RANGES[library]}:" in warning

    @pytest.mark.parametrize(
        ("library", "version"),
        [
            ("snntorch", "0.9.4"),
            ("snntorch", "0.10.1"),
            ("snntorch", "1.0.7"),
            ("norse", "1.1"),
            ("norse", "1.1.0.post1"),
        ],
    )
    def test_one_inside_does_not(self, monkeypatch: pytest.MonkeyPatch, library: str, version: str) -> None:
        assert not install(monkeypatch, library, version)

    def test_the_installed_ones_are_inside(self) -> None:
        assert [loading.outside_tested(a) for a in registry.load_all("adapters").values()] == ["", ""]

    def test_one_that_cannot_be_hooked_stays_exact(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(_: Any) -> None:
            raise AttributeError("no such class")

        adapter = registry.load("adapters", "snntorch")
        monkeypatch.setattr(type(adapter), "install", broken)
        (warning,) = install(monkeypatch, "snntorch", "9.0")
        assert "9.0" in warning
        assert "stay exact: hooking them failed with AttributeError: no such class" in warning
        net = nn.Sequential(nn.Linear(3, 3), snntorch.Leaky(0.9, init_hidden=True))
        assert not sparsify(net).entries
        assert net(torch.ones(2, 3)).shape == (2, 3)

    def test_a_tested_one_that_cannot_be_hooked_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(_: Any) -> None:
            raise AttributeError("no such class")

        monkeypatch.setattr(type(registry.load("adapters", "snntorch")), "install", broken)
        with pytest.raises(AttributeError, match="no such class"):
            install(monkeypatch, "snntorch", "1.0.0")

    def test_it_is_masked_once_it_is_hooked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        neuron = snntorch.Leaky(0.9, init_hidden=True)
        x = torch.randn(2, 30, requires_grad=True)
        with sparse_mode(fuse_time=False, backprop_threshold=0.1, min_active=0):
            boundaries._of_a_threshold.cache_clear()
            with monkeypatch.context() as patch:
                patch.setattr(loading, "_refused", [registry.load("adapters", "snntorch")])
                snntorch.surrogate.atan()(x)
            for _ in range(2):  # as it is decided, and as it was
                (grad,) = torch.autograd.grad(neuron(x).sum(), x)
        assert (grad == 0).any()

    def test_doctor_shows_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["optional"]
        assert rows["snntorch"]["tested"] == ["0.9.4", "1.0"]
        assert not rows["snntorch"]["warning"]
        real = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: "3.0" if name == "snntorch" else real(name))
        rows = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["optional"]
        assert "snntorch 3.0 is outside" in rows["snntorch"]["warning"]
        shown = " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
        assert "snntorch 3.0 is outside" in shown


def test_classes_that_an_older_snntorch_lacks_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from snn_sparse_plugin.adapters.snntorch_neurons import builders

    for name in ("DeltaLeaky", "StateLeaky", "LinearLeaky", "AssociativeLeaky"):
        monkeypatch.delattr(snntorch, name)
    builders.cache_clear()
    try:
        registry.load("adapters", "snntorch").install()
        net = nn.Sequential(nn.Linear(3, 4), snntorch.Alpha(0.9, 0.8, init_hidden=True, output=True))
        assert sparsify(net).names("fused") == ["1"]
        assert unroll(net, torch.ones(5, 2, 3)).spikes.shape == (5, 2, 4)
    finally:
        builders.cache_clear()


# --- classes that no adapter knows ---


class Resonator(snntorch.SpikingNeuron):
    """A neuron of a future snnTorch: unknown state, own forward."""

    def __init__(self) -> None:
        super().__init__(init_hidden=True)
        self.register_buffer("phase", torch.zeros(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = self.phase if self.phase.shape == x.shape else torch.zeros_like(x)
        self.phase = x - 0.5 * last
        return self.fire(self.phase)


def resonance(x: torch.Tensor, state: Any, p: Any, dt: float = 0.001) -> Any:
    v = x - 0.5 * (state.v if state is not None else 0)
    return norse.functional.threshold.threshold(
        v - 1, "super", torch.tensor(10.0)
    ), norse.LIFBoxFeedForwardState(v)


class ResonatorCell(SNNCell):
    """The same of a future Norse."""

    def __init__(self) -> None:
        super().__init__(resonance, lambda x: norse.LIFBoxFeedForwardState(torch.zeros_like(x)), p=())


@pytest.fixture(params=["snntorch", "norse"])
def net(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    if request.param == "snntorch":
        yield nn.Sequential(nn.Linear(6, 5), Resonator())
    else:
        yield norse.SequentialState(nn.Linear(6, 5), ResonatorCell())


def loop(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    outs, state = [], None
    for module in net:
        if isinstance(module, Resonator):
            module.phase = torch.zeros(0)
    for h in x:
        if isinstance(net, norse.SequentialState):
            out, state = net(h, state)
        else:
            out = net(h)
        outs.append(out)
    return torch.stack(outs)


def test_an_unknown_class_falls_back(net: nn.Module) -> None:
    x = 4 * torch.randn(8, 3, 6)
    expected = loop(net, x)
    (grad,) = torch.autograd.grad(expected.sum(), net[0].weight)
    with sparse_mode(backprop_threshold=None):
        runs = [loop(net, x)]
    for module in net:
        if isinstance(module, Resonator):
            module.phase = torch.zeros(0)
    runs.append(unroll(net, x, backprop_threshold=None).spikes)
    report = sparsify(net, backprop_threshold=None)
    runs.append(loop(net, x))
    assert expected.any()
    for found in runs:
        assert torch.equal(found, expected)
        assert torch.allclose(torch.autograd.grad(found.sum(), net[0].weight)[0], grad, atol=1e-5)
    (entry,) = report.entries
    assert entry.status == "masked"
    assert "is in no fused family" in entry.reason
