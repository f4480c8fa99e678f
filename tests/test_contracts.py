"""Third-party plugins that are junk: named in one warning, skipped, and raised when asked for by name."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import snn_sparse_plugin as ssp
from snn_sparse_plugin import NeuronParams, UnsupportedError
from snn_sparse_plugin.adapters import Adapter
from snn_sparse_plugin.backends import Backend
from snn_sparse_plugin.core import contracts, registry
from snn_sparse_plugin.interfaces.cli import app
from snn_sparse_plugin.ops import spiking_layer


class Sound(Backend):
    name, priority = "bad", 1000

    def supports(self, op, **_):
        return False, "does nothing"

    def spiking_layer(self, call):
        raise NotImplementedError


class SoundAdapter(Adapter):
    name, package = "bad", "torch"

    def available(self):
        return True, "1.0"

    def owns(self, module):
        return False

    def step(self, module, x, state):
        return module(x), None, state


def exits(*_, **__):
    raise SystemExit(5)


def raises(*_, **__):
    raise OSError("no device file")


def answers(value):
    return lambda *_, **__: value


def backend(**attributes):
    return lambda: type("Bad", (Sound,), attributes)()


def adapter(**attributes):
    return lambda: type("Bad", (SoundAdapter,), attributes)()


@pytest.fixture
def register(monkeypatch):
    """Registers a factory as the plugin ``bad`` of the distribution ``evil``."""
    registry.refresh()

    def add(group, factory, name="bad"):
        monkeypatch.setitem(sys.modules, "evilmod", SimpleNamespace(Thing=factory))
        plugin = registry.Plugin(group, name, "evilmod:Thing", "evil", "1.0")
        registry.plugins(group)[name] = plugin
        return plugin

    yield add
    registry.refresh()


def use():
    with ssp.sparse_mode():
        out = spiking_layer(torch.ones(2, 1, 3), torch.ones(2, 3), params=NeuronParams(0.9))
    assert out.spikes.shape == (2, 1, 2)


UNUSABLE = {
    "backend None": ("backends", answers(None), "None has no name"),
    "backend 42": ("backends", answers(42), "42 has no name"),
    "backend class": ("backends", answers(Sound), "TypeError"),
    "factory exits": ("backends", exits, "SystemExit: 5"),
    "factory raises": ("backends", raises, "OSError: no device file"),
    "GeneratorExit": ("backends", lambda: (_ for _ in ()).throw(GeneratorExit), "GeneratorExit"),
    "no name": ("backends", lambda: SimpleNamespace(priority=999), "has no name"),
    "empty name": ("backends", backend(name=""), "its name is ''"),
    "name a number": ("backends", backend(name=7), "its name is 7"),
    "name of ours": ("backends", backend(name="cpu"), "'cpu', which is that of snn-sparse-plugin"),
    "priority a string": ("backends", backend(priority="high"), "its priority is 'high'"),
    "priority None": ("backends", backend(priority=None), "its priority is None"),
    "priority NaN": ("backends", backend(priority=float("nan")), "its priority is nan"),
    "priority True": ("backends", backend(priority=True), "its priority is True"),
    "attribute raises": ("backends", backend(priority=property(raises)), "OSError: no device file"),
    "equations None": ("backends", backend(equations=None), "its equations is None"),
    "no supports": ("backends", backend(supports=None), "no method supports"),
    "no backward": (
        *("backends", backend(spiking_layer_backward=property())),
        "without spiking_layer_backward",
    ),
    "available exits": ("backends", backend(available=exits), "SystemExit: 5"),
    "available raises": ("backends", backend(available=raises), "OSError: no device file"),
    "available None": ("backends", backend(available=answers(None)), "answered None"),
    "available True": ("backends", backend(available=answers(True)), "answered True"),
    "available (1, 2)": ("backends", backend(available=answers((1, 2))), "answered (1, 2)"),
    "adapter None": ("adapters", answers(None), "None has no name"),
    "adapter exits": ("adapters", exits, "SystemExit: 5"),
    "adapter without package": ("adapters", adapter(package=""), "its package is ''"),
    "adapter package a list": ("adapters", adapter(package=[]), "its package is []"),
    "adapter tested a string": ("adapters", adapter(tested="1.0"), "its tested is '1.0'"),
    "adapter without owns": ("adapters", adapter(owns=None), "no method owns"),
    "adapter available exits": ("adapters", adapter(available=exits), "SystemExit: 5"),
    "learner None": ("learners", answers(None), "it is None, not a learner"),
    "learner 3": ("learners", answers(3), "it is 3, not a learner"),
    "learner exits": ("learners", exits, "SystemExit: 5"),
    "layer None": ("layers", answers(None), "None has no name"),
    "layer without layers": ("layers", lambda: SimpleNamespace(name="x"), "has no layers"),
    "layer of numbers": ("layers", lambda: SimpleNamespace(name="x", layers=(1,)), "its layers is (1,)"),
}


@pytest.mark.parametrize(("group", "factory", "problem"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_plugin_is_named_once_and_skipped(group, factory, problem, register):
    plugin = register(group, factory)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert "bad" not in registry.load_all(group)
            use()
    (warning,) = seen
    text = str(warning.message)
    assert text.startswith(f"{group[:-1]} 'bad' of evil 1.0 cannot be ")
    assert problem in text
    assert "ninstall evil" in text
    with pytest.raises(UnsupportedError, match="'bad' of evil 1.0 cannot be"):
        registry.load(group, "bad")
    listing = json.loads(CliRunner().invoke(app, ["plugins", "--json"]).stdout)
    (row,) = (r for r in listing if (r["group"], r["name"]) == (group, "bad"))
    assert (row["state"], row["reason"]) == ("broken", plugin.error)


def test_a_backend_that_does_not_answer_is_left_behind_once(register, monkeypatch):
    asked = []
    register("backends", backend(available=lambda self: asked.append(1) or time.sleep(60)))
    monkeypatch.setattr(contracts, "TIMEOUT", 0.05)
    with pytest.warns(UserWarning, match="'bad' of evil 1.0.* did not answer within 0.05 s"):
        use()
    use()
    assert asked == [1]
    with pytest.raises(UnsupportedError, match="did not answer"):
        spiking_layer(torch.ones(2, 1, 3), params=NeuronParams(0.9), backend="bad")


def test_an_interrupt_while_a_plugin_loads_passes_through_and_it_may_be_tried_again(register):
    def interrupted():
        raise KeyboardInterrupt

    plugin = register("backends", interrupted)
    with pytest.raises(KeyboardInterrupt):
        use()
    assert plugin.error is None
    register("backends", backend(available=lambda self: interrupted()))
    with pytest.raises(KeyboardInterrupt):
        use()


@pytest.mark.parametrize(
    ("supports", "problem"),
    [(exits, "SystemExit: 5"), (raises, "OSError"), (answers(None), "None"), (answers(True), "True")],
    ids=["exits", "raises", "None", "True"],
)
def test_a_backend_that_cannot_say_what_it_supports_is_passed_over(supports, problem, register, counted):
    register("backends", backend(supports=supports))
    with pytest.warns(UserWarning, match=rf"'bad' of evil 1.0 fails: its supports\(\) .*{problem}"):
        use()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use()
    assert counted["cpu", "forward"] == 2
    with pytest.raises(UnsupportedError, match=rf"'bad' cannot run.*supports\(\).*{problem}"):
        spiking_layer(torch.ones(2, 1, 3), params=NeuronParams(0.9), backend="bad")


QUESTIONS = {
    "owns None": {"owns": answers(None)},
    "owns exits": {"owns": exits},
    "container raises": {"container": raises},
    "unwrap 3": {"unwrap": answers(3)},
    "takes_sequence None": {"takes_sequence": answers(None)},
    "install exits": {"install": exits},
    "install raises": {"install": raises},
    "neuron raises": {"owns": lambda self, m: type(m) is nn.Tanh, "neuron": raises},
    "neuron None": {"owns": lambda self, m: type(m) is nn.Tanh, "neuron": answers(None)},
    "masks exits": {
        "owns": lambda self, m: type(m) is nn.Tanh,
        "neuron": answers("none"),
        "masks": exits,
    },
}


@pytest.mark.parametrize("methods", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_an_adapter_that_fails_later_is_named_once_and_harms_nobody(methods, register):
    snntorch = pytest.importorskip("snntorch")
    plugin = register("adapters", adapter(**methods))
    net = nn.Sequential(nn.Tanh(), nn.Linear(3, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            report = ssp.sparsify(net)
            assert "2" in report.names("fused")
            ssp.unroll(net, torch.rand(4, 2, 3))
    (warning,) = seen
    assert str(warning.message).startswith("adapter 'bad' of evil 1.0 fails: its ")
    assert plugin.trouble is not None


def test_a_name_of_ours_is_not_taken_and_both_are_listed(monkeypatch):
    entries = [
        registry.EntryPoint("cpu", "evilmod:Thing", "snn_sparse_plugin.backends"),
        registry.EntryPoint("toy", "evilmod:Thing", "snn_sparse_plugin.backends"),
        registry.EntryPoint("toy", "othermod:Thing", "snn_sparse_plugin.backends"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if "backends" in group else [])
    registry.refresh()
    with pytest.warns(UserWarning, match="is ignored") as seen:
        assert registry.plugins("backends")["cpu"].ours
    ignored = "of an unnamed distribution ? is ignored: the name is taken by"
    assert [str(w.message).partition(". ")[0] for w in seen] == [
        f"backend 'cpu' {ignored} snn-sparse-plugin {ssp.__version__}",
        f"backend 'toy' {ignored} an unnamed distribution ?",
    ]
    states = [(p.name, p.ours, p.error is None) for p in registry.listed("backends") if p.name == "cpu"]
    assert states == [("cpu", True, True), ("cpu", False, False)]
    registry.refresh()


def test_entry_points_that_cannot_be_read_leave_our_own(monkeypatch):
    def unreadable(group):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(registry, "entry_points", unreadable)
    registry.refresh()
    with pytest.warns(UserWarning, match="cannot be read .UnicodeDecodeError"):
        assert "cpu" in registry.plugins("backends")
    registry.refresh()


@pytest.mark.parametrize("group", ["backends", "adapters", "learners", "layers"])
def test_a_module_that_exits_at_import_does_not_end_the_program(group, tmp_path):
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[snn_sparse_plugin.{group}]\nbad = evilmod:Thing\n")
    (tmp_path / "evilmod.py").write_text("import sys; sys.exit(3)")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from snn_sparse_plugin import registry
        assert set(registry.load_all({group!r})) == set(registry.plugins({group!r})) - {{"bad"}}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("'bad' of evil 1.0 cannot be loaded: SystemExit: 3") == 1
