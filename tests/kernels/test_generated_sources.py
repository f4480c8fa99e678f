"""Generated kernels as files: named by content, whole or written again, in a folder of their own where need be."""

import ast
import logging
import subprocess
import sys

import norse.torch  # noqa: F401, so that its neurons are known
import pytest
import snntorch  # noqa: F401

from snn_sparse_plugin.adapters import loaded_adapters
from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.core.equations import Equations
from snn_sparse_plugin.core.errors import InputError
from snn_sparse_plugin.interfaces.doctor import kernel_source
from snn_sparse_plugin.triton_kernels import generate, sources
from snn_sparse_plugin.triton_kernels.scans import source_of

SOURCE = "VALUE = 3\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SNN_SPARSE_CACHE_DIR", str(tmp_path))
    sources.module_of.cache_clear()
    yield tmp_path / "triton"
    sources.module_of.cache_clear()


def test_a_source_is_a_file_named_by_its_content(home):
    module = sources.module_of(SOURCE, "forward")
    assert module.VALUE == 3
    (file,) = home.iterdir()
    assert file.name.startswith("forward_")
    assert file.read_text() == SOURCE
    assert sources.module_of(SOURCE, "forward") is module
    sources.module_of("VALUE = 4\n", "forward")
    assert len(list(home.iterdir())) == 2


def test_a_half_written_file_is_written_again(home):
    sources.module_of(SOURCE, "forward")
    (file,) = home.iterdir()
    file.write_text("VAL")
    sources.module_of.cache_clear()
    assert sources.module_of(SOURCE, "forward").VALUE == 3
    assert file.read_text() == SOURCE


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("SNN_SPARSE_CACHE_DIR", str(in_the_way))
    sources.module_of.cache_clear()
    with caplog.at_level(logging.WARNING, "snn_sparse_plugin"):
        assert sources.module_of("VALUE = 5\n", "forward").VALUE == 5
    sources.module_of.cache_clear()
    (said,) = caplog.messages
    assert str(in_the_way) in said
    assert "for this process only" in said


def fused_neurons():
    for adapter in loaded_adapters():
        for name, example in sorted(adapter.examples().items()):
            described = adapter.neuron(example.build())
            if not isinstance(described, str):
                yield pytest.param(described, id=f"{adapter.name}.{name}")


@pytest.mark.parametrize("described", fused_neurons())
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_every_fused_neuron_has_a_readable_source(described, way):
    text = source_of(described.spec, described.recurrent, way)
    names = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    more = {"all_back"} if described.recurrent else set()
    assert names == ({"step", "forward"} if way == "forward" else {"step", "adjoint", "backward"} | more)
    assert " = ()" not in text  # no tuple that grows: older Tritons do not compile them


def test_a_neuron_without_recurrence_adds_no_zero():
    text = source_of(NeuronSpec(), False, "forward")
    assert "rec" not in text


def test_names_of_equations_that_a_kernel_needs_itself_are_changed():
    spec = Equations("tl = T * tl + x - r7\ns = spike(tl - N)", ("tl",), membrane="tl")
    text = source_of(spec, False, "backward", True)
    assert "def step(n0, x, n3, n4, n5):" in text


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_every_variable_of_a_kernel_is_kept_from_equations(way, recurrent):
    tree = ast.parse(source_of(NeuronSpec(), recurrent, way, True))
    found = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    found |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    found -= {"v", "x", "rec", "mem", "threshold"}  # of the program
    assert {
        name for name in found if not (name in generate._TAKEN or generate._MADE.fullmatch(name))
    } == set()


def test_doctor_prints_the_kernels_of_a_neuron():
    text = kernel_source("snntorch.RLeaky")
    assert "rec = recurrent_current(" in text
    assert kernel_source("RLeaky") == text


@pytest.mark.parametrize(
    ("name", "message"),
    [("Leeky", "did you mean Leaky"), ("nothing", r"no neuron class 'nothing' in the installed libraries\.")],
)
def test_an_unknown_neuron_is_named_with_suggestions(name, message):
    with pytest.raises(InputError, match=message):
        kernel_source(name)


def test_sources_are_generated_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from snn_sparse_plugin.core.dynamics import NeuronSpec\n"
        "from snn_sparse_plugin.triton_kernels.scans import source_of\n"
        "print(len(source_of(NeuronSpec(), False, 'forward')) > 100)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"
