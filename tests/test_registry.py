"""Plugins: found through entry points, loaded on first use, a broken one skipped with one warning."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from snn_sparse_plugin import UnsupportedError
from snn_sparse_plugin.core import moved, registry
from snn_sparse_plugin.core.registry import Plugin
from snn_sparse_plugin.ops.spiking_layer.reference import ReferenceBackend

ROOT = Path(__file__).parents[1]


def test_our_own_plugins_are_registered_and_load():
    assert {"cpu", "triton", "torch_sparse", "reference"} <= set(registry.plugins("backends"))
    assert {"snntorch", "norse"} <= set(registry.plugins("adapters"))
    for group in ("backends", "adapters"):
        for name in registry.plugins(group):
            assert registry.load(group, name).name == name


def test_a_wheel_has_every_package():
    tomllib = pytest.importorskip("tomllib", reason="from Python 3.11 on")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    homes = {made.parent for made in ROOT.glob("snn_sparse_plugin/**/__init__.py")}
    ours = {str(home.relative_to(ROOT)).replace("/", ".") for home in homes}
    assert {name for name in listed if name != "snn_sparse_plugin.triton_kernels"} == ours


def test_loading_twice_gives_the_same_object():
    assert registry.load("backends", "cpu") is registry.load("backends", "cpu")


@pytest.fixture
def broken():
    registry.refresh()
    plugin = Plugin("backends", "broken", "no_such_module_at_all:Backend", "toy", "0.1")
    registry.plugins("backends")["broken"] = plugin
    yield plugin
    registry.refresh()


def test_a_broken_plugin_is_skipped_with_one_warning(broken):
    with pytest.warns(UserWarning, match="'broken' of toy 0.1 cannot be loaded: ModuleNotFoundError"):
        loaded = registry.load_all("backends")
    assert "broken" not in loaded
    assert "cpu" in loaded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.load_all("backends")


def test_a_broken_plugin_asked_for_by_name_raises(broken):
    with pytest.raises(UnsupportedError, match=r"'broken' of toy 0.1 cannot be loaded"):
        registry.load("backends", "broken")


def test_a_broken_plugin_is_not_tried_again(broken, monkeypatch):
    tried = []
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: tried.append(name) or object())
    for _ in range(3):
        with pytest.raises(UnsupportedError, match=r"'broken' of toy 0.1 cannot be loaded: AttributeError"):
            broken.load()
    assert tried == ["no_such_module_at_all"]


def test_a_plugin_that_asks_for_its_own_group_while_it_loads(monkeypatch):
    seen = []
    backend = ReferenceBackend()
    backend.name = "asking"

    class Module:
        @staticmethod
        def Backend():
            seen.append(registry.load_all("backends"))
            return backend

    registry.refresh()
    registry.plugins("backends")["asking"] = Plugin("backends", "asking", "asking:Backend", "toy", "0.1")
    monkeypatch.setitem(sys.modules, "asking", Module)
    assert registry.load_all("backends")["asking"] is backend
    assert ["asking" in loaded for loaded in seen] == [False]
    registry.refresh()


def test_unknown_names_and_groups_say_what_there_is():
    with pytest.raises(UnsupportedError, match=r"Registered: .*norse"):
        registry.load("adapters", "brian")
    with pytest.raises(UnsupportedError, match="groups are backends"):
        registry.plugins("flowers")


def test_a_backend_whose_own_check_fails_is_passed_over(counted):
    import torch

    from snn_sparse_plugin import NeuronParams
    from snn_sparse_plugin.backends import Backend
    from snn_sparse_plugin.ops import spiking_layer

    class Fragile(Backend):
        name, priority = "fragile", 1000

        def available(self):
            raise OSError("no device file")

    registry.refresh()
    registry.plugins("backends")["fragile"] = Plugin(
        "backends", "fragile", "", "toy", "1", _instance=Fragile()
    )
    try:
        spiking_layer(torch.zeros(2, 2, 3), params=NeuronParams(0.9))
        assert counted["cpu", "forward"] == 1
        with pytest.raises(UnsupportedError, match="OSError: no device file"):
            spiking_layer(torch.zeros(2, 2, 3), params=NeuronParams(0.9), backend="fragile")
    finally:
        registry.refresh()


def test_importing_the_package_is_light():
    code = (
        "import sys, snn_sparse_plugin\n"
        "heavy = ('triton', 'numba', 'snntorch', 'norse', 'matplotlib', 'torchvision', 'rich', 'typer')\n"
        "sys.exit(' '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernel_folder_is_a_sub_package():
    """Installed under our own name: the top-level name ``triton_kernels`` belongs to others."""
    code = "import snn_sparse_plugin.triton_kernels as k; print(k.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.strip() == "snn_sparse_plugin.triton_kernels", done.stderr


@pytest.mark.parametrize(("old", "new"), moved.HOMES.items())
def test_public_modules_are_found_where_they_were_at_first(old, new):
    found = importlib.import_module(f"snn_sparse_plugin.{old}")
    assert found is importlib.import_module(f"snn_sparse_plugin.{new}")
    assert found.__spec__.name == f"snn_sparse_plugin.{new}"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("snn_sparse_plugin.never_there")
