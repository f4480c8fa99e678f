"""``pytest --snn-sparse``: toy suites in processes of their own."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

import snn_sparse_plugin
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.core.config import active_config
from snn_sparse_plugin.core.tally import ClassRuns
from snn_sparse_plugin.interfaces import pytest_plugin

pytest_plugins = "pytester"

SNNTORCH = """
    import pytest, snntorch, torch
    from snntorch import surrogate

    net = torch.nn.Sequential(torch.nn.Linear(8, 200), snntorch.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(25)))
    at_import = net[1](torch.randn(4, 200, requires_grad=True), torch.zeros(4, 200))[0]

    @pytest.fixture(scope="session")
    def from_fixture():
        return net[1](torch.randn(4, 200, requires_grad=True), torch.zeros(4, 200))[0]

    def masked(spikes):
        spike_function = spikes.grad_fn.next_functions[0][0]  # below the product with the graded spikes' factor
        return type(spike_function).__name__ == "_MaskedSpikeBackward"

    def test_every_place(from_fixture):
        x = torch.randn(4, 200, requires_grad=True)
        spikes, _ = net[1](x, torch.zeros(4, 200))
        spikes.sum().backward()
        found = {masked(at_import), masked(from_fixture), masked(spikes)}
        assert found == {MASKED}, found

    def test_a_neuron_outside_the_family():
        neuron = snntorch.Lapicque(beta=0.9, state_quant=lambda x: x * 1.0)
        neuron(torch.randn(4, 200, requires_grad=True), torch.zeros(4, 200))
"""

NORSE = """
    import norse.torch as norse, torch
    from snn_sparse_plugin.backends import calls

    def test_sequence():
        net = norse.SequentialState(torch.nn.Linear(5, 4), norse.LIF())
        z, _ = net(torch.rand(6, 2, 5))
        z.sum().backward()
        assert sum(n for (_, way), n in calls.items() if way == "backward") == FUSED

    def test_cells():
        norse.LIFCell()(torch.rand(2, 4, requires_grad=True))[0].sum().item()
        norse.LIFMCRecurrentCell(4, 4)(torch.rand(2, 4, requires_grad=True))
"""

NOT_IMPORTED = """
    import sys

    def test_light():
        loaded = {"torch", "numpy", "snntorch", "norse", "snn_sparse_plugin.core.config"} & set(sys.modules)
        assert not loaded, loaded
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """Runs a toy suite in a process where our plugin is the only one beside pytest's own."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(snn_sparse_plugin.__file__).parents[1]))
    monkeypatch.setenv("COLUMNS", "200")  # rows stay lines

    def run(code: str, *options: str, **names: object) -> pytest.RunResult:
        for name, value in names.items():
            code = code.replace(name, repr(value))
        pytester.makepyfile(code)
        return pytester.runpytest_subprocess("-p", "snn_sparse_plugin.interfaces.pytest_plugin", *options)

    return run


@pytest.mark.parametrize(
    ("option", "masked"), [("=exact", False), ("=0.3", True), ("=auto", True), ("", True), (None, False)]
)
def test_snntorch(suite, option, masked):
    pytest.importorskip("snntorch")
    result = suite(SNNTORCH, *([] if option is None else [f"--snn-sparse{option}"]), MASKED=masked)
    result.assert_outcomes(passed=2)
    text = result.stdout.str()
    assert ("snn-sparse" in text) == (option is not None)
    if option is not None:
        result.stdout.fnmatch_lines(["snn-sparse: *", "*= snn-sparse: * =*", "Lapicque *state_quant * (1)"])
        # one module at three places
        result.stdout.fnmatch_lines([f"Leaky *3 in 1*{'1 in 1 *' * masked}called step by step (1)"])


@pytest.mark.parametrize(("option", "fused"), [("--snn-sparse=exact", 1), ("--snn-sparse=0.5", 1), (None, 0)])
def test_norse(suite, option, fused):
    pytest.importorskip("norse.torch")
    result = suite(NORSE, *([option] if option else []), FUSED=fused)
    result.assert_outcomes(passed=2)
    if option:
        result.stdout.fnmatch_lines(
            [
                "neuron *fused *not fused because",
                "LIF *1 in 1 *1 in 1*",
                "LIFCell *1 in 1*called step by step (1)",
                "LIFMCRecurrentCell *1 in 1*its compartments are coupled by a matrix (1)",
                "modules: 1 ran fused, 2 step by step; 1 sparse backward calls",
            ]
        )


@pytest.mark.parametrize("value", ["exactly", "0", "-1", "nan", "inf", ""])
def test_a_bad_value_is_a_usage_error(suite, value):
    result = suite(NOT_IMPORTED, f"--snn-sparse={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--snn-sparse: takes exact, auto or a distance > 0*got {value!r}*"])


def test_a_path_taken_for_the_value_is_explained(suite):
    result = suite(NOT_IMPORTED, "--snn-sparse", "some/tests")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*in front of a path write --snn-sparse=auto*"])


def test_without_the_option_nothing_is_imported(suite):
    suite(NOT_IMPORTED).assert_outcomes(passed=1)


def test_no_neuron_ran(suite):
    result = suite("def test_nothing(): pass", "--snn-sparse")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["no spiking neuron of a supported library ran"])


def test_failures_stay_failures(suite):
    result = suite("def test_wrong():\n    raise KeyError('mine')", "--snn-sparse=exact")
    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    "blocked", ["cacheprovider", "terminal", "snn_sparse_plugin.interfaces.pytest_plugin"]
)
def test_blocked_plugins(suite, blocked):
    ours = blocked.startswith("snn")
    result = suite("def test_nothing(): pass", "-p", f"no:{blocked}", *([] if ours else ["--snn-sparse"]))
    assert result.ret == pytest.ExitCode.OK


def plugin_run(mode: str, **config: object) -> pytest_plugin.SparseRun:
    return pytest_plugin.SparseRun(SimpleNamespace(**config), mode)


@pytest.mark.parametrize("hook", ["pytest_collection", "pytest_runtest_protocol"])
def test_the_mode_ends_with_the_hook(hook):
    around = getattr(plugin_run("0.25"), hook)()
    next(around)
    assert active_config().backprop_threshold == 0.25
    assert next(around, "ended") == "ended"
    assert active_config() is None


def test_the_installed_entry_point(request):
    found = list(entry_points(group="pytest11", name="snn_sparse"))
    assert found, "not among the installed entry points: install the package again, pip install -e ."
    assert found[0].load() is pytest_plugin
    loaded = [plugin for _, plugin in request.config.pluginmanager.list_name_plugin()]
    assert loaded.count(pytest_plugin) == 1


def test_counts_of_xdist_workers_are_added(monkeypatch):
    monkeypatch.setattr(tally, "by_class", lambda: {"LIF": ClassRuns({"fused": 3}, {"fused": 2}, {"": 1})})
    worker = plugin_run("exact", workeroutput={})
    worker.pytest_sessionfinish()
    monkeypatch.setattr(tally, "by_class", dict)
    controller = plugin_run("exact")
    for _ in range(2):
        controller.pytest_testnodedown(worker.config)
    controller.pytest_testnodedown(SimpleNamespace())  # a worker that crashed
    controller.pytest_sessionfinish()
    assert controller.runs == {"LIF": ClassRuns({"fused": 6}, {"fused": 4}, {"": 2})}
    assert pytest_plugin.summary(controller.runs)[-1].startswith("modules: 4 ran fused, 2 step by step")
