"""The benchmark, at sizes that say nothing about speed: what it computes, counts and writes."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from snn_sparse_plugin import ConfigError, UnsupportedError
from snn_sparse_plugin.bench import (
    CONVOLUTIONAL,
    BenchOptions,
    run_conv,
    run_conv_sweep,
    run_network,
    run_s3gd,
    run_surrogates,
    run_sweep,
)
from snn_sparse_plugin.bench.layers import Layer
from snn_sparse_plugin.bench.measure import peak_bytes, run_step, saved_bytes, time_alternating
from snn_sparse_plugin.bench.problem import Config, make_problem
from snn_sparse_plugin.bench.providers import PROVIDERS, Steps, setup
from snn_sparse_plugin.bench.report import crossover, human_bytes
from snn_sparse_plugin.interfaces.cli import app

TINY = Config(inputs=40, layers=(30, 20, 6), steps=25, batch=5, density=0.1, rate=0.06, slope=25.0)
MAPS = replace(TINY, inputs=(2, 12, 12), layers=("6C3p1-MP2", "8C3", 5), steps=12, batch=3)
OPTIONS = BenchOptions(rounds=2, threads=1, peak=False)
QUIET = Console(quiet=True)
LIBRARY = {"norse": "norse", "spikingjelly": "spikingjelly"}


def gradients(config: Config, provider: str) -> tuple[float, list[torch.Tensor]]:
    if provider in LIBRARY:
        pytest.importorskip(LIBRARY[provider])
    pytest.importorskip("snntorch")
    steps = setup(config, provider)
    out = steps.forward()
    steps.backward(out)
    return float(out.detach().sum()), [p.grad for p in steps.parameters if p.grad is not None]


def test_the_problem_is_the_same_in_every_process_and_fires_as_asked() -> None:
    first = make_problem(TINY)
    make_problem.cache_clear()
    again = make_problem(TINY)
    assert torch.equal(first.x, again.x)
    assert all(torch.equal(a, b) for a, b in zip(first.weights, again.weights, strict=True))
    assert first.rates == pytest.approx([0.06] * 3, rel=0.35)
    assert float(first.x.mean()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("provider", ["sparse-exact", "reference"])
def test_our_providers_compute_what_the_tutorial_loop_computes(provider: str) -> None:
    config = replace(TINY, window=None)
    loss, expected = gradients(config, "snntorch")
    got_loss, got = gradients(config, provider)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert [g.shape for g in got] == [g.shape for g in expected]
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("readout", [False, True], ids=["counts", "readout"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("provider", ["sparse-op", "sparse-exact"])
def test_our_forms_of_the_network_are_snntorchs(provider: str, reset: str, readout: bool) -> None:
    config = replace(TINY, window=None, reset=reset, readout=readout)
    loss, expected = gradients(config, "snntorch")
    got_loss, got = gradients(config, provider)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("readout", [False, True], ids=["counts", "readout"])
def test_the_libraries_compute_the_same_where_the_reset_is_to_zero(readout: bool) -> None:
    """But for SpikingJelly's surrogate, larger by slope / 2 once a spiking layer, and Norse's, which has no slope."""
    config = replace(TINY, window=None, reset="zero", readout=readout)
    loss, expected = gradients(config, "snntorch")
    assert gradients(config, "norse")[0] == pytest.approx(loss, rel=1e-6)
    got_loss, got = gradients(config, "spikingjelly")
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert float((a / 12.5 ** (3 - readout - k // 2) - b).norm() / b.norm()) < 1e-5


def test_dense_and_event_input_give_the_same_gradients() -> None:
    loss, expected = gradients(TINY, "sparse")
    got_loss, got = gradients(TINY, "sparse-events")
    assert got_loss == loss
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-6


@pytest.mark.parametrize("provider", ["norse", "spikingjelly"])
def test_the_other_libraries_run_comparable_neurons(provider: str) -> None:
    """Their resets differ from Leaky's, so their output fires at about the same rate, no more."""
    pytest.importorskip(LIBRARY[provider])
    config = replace(TINY, op="layer", layers=(60,))
    (rate,) = make_problem(config).rates
    spikes = setup(config, provider).forward()
    assert spikes.shape == (25, 5, 60)
    assert float(spikes.detach().mean()) == pytest.approx(rate, rel=0.5)


@pytest.mark.parametrize("provider", ["events", "dense", "auto"])
def test_the_paths_of_a_layer_agree(provider: str) -> None:
    config = replace(TINY, op="layer", layers=(30,), window=None)
    _, expected = gradients(config, "snntorch")
    _, got = gradients(config, provider)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_layer_two_alone_gets_the_dense_gradients() -> None:
    pytest.importorskip("snntorch")
    config = replace(TINY, op="s3gd", layers=(30, 20), window=None)
    found = {}
    for name in ("sparse", "snntorch"):
        steps = setup(config, name)
        found[name] = steps.backward(steps.forward())
    for a, b in zip(found["sparse"], found["snntorch"], strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_saved_bytes_counts_each_storage_once_and_leaves_out_what_lives_anyway() -> None:
    x = torch.randn(50, 4)
    w = torch.randn(4, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x * w  # keeps x (as an input: not counted)
        z = y.sigmoid()  # keeps z: 800 bytes
        return (z[:10] * z[10:20]).sum()  # keeps views of z

    count, out = saved_bytes(forward, [x, w])
    assert count == 50 * 4 * 4
    assert out.requires_grad
    assert saved_bytes(forward, [w])[0] == 2 * 50 * 4 * 4


def test_time_is_measured_in_alternating_rounds() -> None:
    order: list[str] = []

    def steps(name: str) -> Steps:
        parameter = torch.ones(1, requires_grad=True)

        def forward() -> torch.Tensor:
            order.append(name)
            return parameter * 2

        return Steps(forward, torch.Tensor.backward, [parameter], [parameter])

    cases = {name: steps(name) for name in "ab"}
    timings = time_alternating(cases, 3, "cpu")
    assert "".join(order) == "aabb" + "aabb" + "bbaa" + "aabb"
    for timing in timings.values():
        assert 0 < timing.step.p20 <= timing.step.median <= timing.step.p80
        assert timing.forward.median <= timing.step.median
        assert timing.backward.median <= timing.step.median
    assert run_step(cases["a"])[2] > 0


def test_rows_carry_what_is_needed_to_read_them_alone() -> None:
    pytest.importorskip("snntorch")
    options = replace(OPTIONS, providers=("sparse", "sparse-events", "snntorch"))
    rows = run_network(options, QUIET, (10, 20), TINY)
    assert [(r["provider"], r["shape"]["T"]) for r in rows] == [
        (name, T) for T in (10, 20) for name in options.providers or ()
    ]
    for row in rows:
        assert {"shape", "density", "dtype", "device", "versions", "commit", "threads", "layer_rates"} <= set(
            row
        )
        assert row["step_ms"]["median"] > 0
        assert row["skipped"] is None
        assert row["saved_bytes_per_neuron_step"] == pytest.approx(
            row["saved_bytes"] / (56 * 5 * row["shape"]["T"]), abs=1e-3
        )
    sparse, _, loop = rows[3:]
    assert loop["versions"]["snntorch"]
    assert sparse["saved_bytes"] < loop["saved_bytes"]
    json.dumps(rows)


def test_a_missing_library_is_a_skipped_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spikingjelly.activation_based", None)
    console = Console(record=True, width=200, file=io.StringIO())
    options = replace(OPTIONS, providers=("auto", "spikingjelly"))
    rows = run_sweep("density", options, console, [0.1], replace(TINY, op="layer", layers=(30,)))
    assert rows[0]["skipped"] is None
    assert "pip install 'spikingjelly>=2.0.0'" in rows[1]["skipped"]
    assert "skipped spikingjelly" in console.export_text()


def test_sweeps_vary_density_and_size() -> None:
    pytest.importorskip("snntorch")
    base = replace(TINY, op="layer", layers=(30,))
    options = replace(OPTIONS, providers=("events", "dense", "auto", "snntorch"))
    rows = run_sweep("density", options, QUIET, [0.05, 0.5], base)
    assert sorted({r["density"] for r in rows}) == [0.05, 0.5]
    rows = run_sweep("size", options, QUIET, [16, 33], base)
    assert sorted({(r["shape"]["inputs"], *r["shape"]["layers"]) for r in rows}) == [(16, 16), (33, 33)]


def test_the_published_protocol_compares_layer_two() -> None:
    pytest.importorskip("snntorch")
    rows = run_s3gd(OPTIONS, QUIET, 15, replace(TINY, op="s3gd", layers=(30, 20), window=0.5))
    assert [r["provider"] for r in rows] == ["sparse", "snntorch"] * 2
    assert rows[2]["layer_rates"] < rows[0]["layer_rates"]
    assert rows[0]["op"] == "s3gd"
    assert rows[0]["saved_bytes"] < rows[1]["saved_bytes"]
    # against the neurons of layer 2 alone
    assert rows[1]["saved_bytes_per_neuron_step"] == pytest.approx(
        rows[1]["saved_bytes"] / (20 * 15 * 5), abs=1e-3
    )


@pytest.mark.parametrize(
    ("times", "sweep", "sentence"),
    [
        ({0.01: (1, 2), 0.04: (4, 2)}, "density", "The dense product wins from about 2 % on."),
        ({0.01: (1, 2), 0.5: (1.5, 2)}, "density", "Events win at every point up to 50 %."),
        ({0.01: (3, 2), 0.5: (9, 2)}, "density", "The dense product wins at every point from 1 % on."),
        ({100: (3, 2), 1000: (1, 2)}, "size", "The dense product wins at 100 only."),
        ({100: (1, 2), 400: (4, 2)}, "size", "The dense product wins from about N = 200 on."),
    ],
    ids=["crossing", "never", "always", "only small", "size"],
)
def test_the_crossover_in_words(times: dict, sweep: str, sentence: str) -> None:
    assert crossover(times, sweep) == sentence


def test_peak_memory_is_that_of_the_steps() -> None:
    pytest.importorskip("snntorch")
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's high-water mark of resident memory")
    config = Config(op="layer", inputs=50, layers=(400,), steps=100, batch=64)
    # the loop keeps about 8 bytes for each of 2.56 million neuron-steps, and makes more on the way
    peak = peak_bytes(config, "snntorch", 1)
    assert peak is not None
    assert 15e6 < peak < 200e6


def test_bench_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    runner = CliRunner()
    tiny = "--steps 5 --batch 2 --rounds 1 --threads 1 --no-peak --providers sparse,snntorch"
    shown = runner.invoke(app, ["bench", *tiny.split(), "--json", "-"])
    assert shown.exit_code == 0, shown.output
    assert [row["provider"] for row in json.loads(shown.stdout)] == ["sparse", "snntorch"]
    written = runner.invoke(app, ["bench", *tiny.split(), "--json", str(tmp_path / "rows.json")])
    assert written.exit_code == 0
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
    assert "ratio" in written.stdout


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="known: sparse"):
        replace(OPTIONS, providers=("numpy",)).names("network")
    with pytest.raises(ConfigError, match="has no network benchmark"):
        replace(OPTIONS, providers=("events",)).names("network")
    with pytest.raises(UnsupportedError, match="does network"):
        setup(replace(TINY, op="layer", layers=(30,)), "sparse-events")
    with pytest.raises(ConfigError, match="density"):
        Config(density=0)
    with pytest.raises(ConfigError, match="not available"):
        Config(device="tpu")


def test_opt_in_providers_stay_out_until_asked_for() -> None:
    assert "compile" not in OPTIONS.names("network")
    assert "reference" not in OPTIONS.names("network")
    asked = replace(OPTIONS, compiled=True, reference=True).names("network")
    assert {"compile", "reference"} < set(asked)
    assert set(OPTIONS.names("layer")) <= set(PROVIDERS)


def test_bytes_for_people() -> None:
    assert [human_bytes(n) for n in (None, 12, 1536, 3 * 2**20, 5 * 2**30)] == [
        "–",
        "12 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]


def test_surrogates_stand_side_by_side() -> None:
    pytest.importorskip("snntorch")
    console = Console(record=True, width=200, file=io.StringIO())
    rows = run_surrogates(replace(OPTIONS, peak=False), console, (12,), TINY)
    assert [r["surrogate"] for r in rows[::3]] == ["atan(2)", "fast_sigmoid(25)", "fast_sigmoid(100)"]
    assert {r["provider"] for r in rows} == {"sparse", "sparse-loop", "snntorch"}
    # not upstream's bytes
    assert {r["provider"] for r in rows if r["saved_bytes"] is None} == {"sparse-loop"}
    text = console.export_text()
    assert all(name in text for name in ("atan(2)", "fast_sigmoid(25)", "sparse-loop", "1.0×"))


@pytest.mark.parametrize("provider", ["sparse-exact", "sparse-op", "sparse-loop"])
def test_convolutional_networks_are_snntorchs(provider: str) -> None:
    config = replace(MAPS, window=None)
    assert make_problem(config).rates == pytest.approx([0.06] * 3, rel=0.4)
    loss, expected = gradients(config, "snntorch")
    got_loss, got = gradients(config, provider)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert [g.shape for g in got] == [g.shape for g in expected]
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("provider", ["norse", "spikingjelly"])
def test_convolutional_networks_are_those_of_the_other_libraries(provider: str) -> None:
    config = replace(MAPS, reset="zero")
    loss, _ = gradients(config, "snntorch")
    assert gradients(config, provider)[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("provider", ["events", "dense", "auto"])
@pytest.mark.parametrize("layer", ["6C3p1-MP2", "6C5"])
def test_the_paths_of_a_convolution_agree(layer: str, provider: str) -> None:
    config = replace(MAPS, op="layer", layers=(layer,), window=None)
    _, expected = gradients(config, "snntorch")
    _, got = gradients(config, provider)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_convolutional_networks_as_rows_and_the_sweep_of_their_layers() -> None:
    pytest.importorskip("snntorch")
    console = Console(record=True, width=200, file=io.StringIO())
    options = replace(OPTIONS, providers=("sparse", "snntorch"))
    rows = run_conv("tutorial", options, console, steps=10, configs=[MAPS, replace(MAPS, steps=20)])
    assert [r["shape"]["T"] for r in rows] == [10, 10]  # equal ones once
    neurons = 6 * 6 * 6 + 8 * 4 * 4 + 5
    assert rows[1]["saved_bytes_per_neuron_step"] == pytest.approx(
        rows[1]["saved_bytes"] / (neurons * 10 * 3), abs=1e-3
    )
    options = replace(OPTIONS, providers=("events", "dense", "auto"), batch=2)
    rows += run_conv_sweep(options, console, [0.05, 0.5], [((2, 8, 8), "4C3-MP2"), ((3, 6, 6), "5C3")], 6)
    json.dumps(rows)
    text = console.export_text()
    assert all(name in text for name in ("2×12×12-6C3p1-MP2-8C3-5", "3×6×6-5C3"))
    assert len(re.findall(r"The dense product wins|Events win", text)) == 2


def test_peak_memory_of_a_convolutional_network() -> None:
    pytest.importorskip("snntorch")
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's high-water mark of resident memory")
    config = Config(op="layer", inputs=(1, 30, 30), layers=("16C3p1",), steps=50, batch=16)
    peak = peak_bytes(config, "snntorch", 1)
    assert peak is not None
    assert 50e6 < peak < 900e6  # 11.5 million neuron-steps


def test_networks_of_recordings(tmp_path: Path) -> None:
    for part, labels in (("Train", (3, 7)), ("Test", (1,))):
        for label in labels:
            file = tmp_path / part / str(label) / "00001.bin"
            file.parent.mkdir(parents=True)
            # x, y, polarity and 23 bits of microseconds: an event at (4, 5) after 2 ms
            file.write_bytes(bytes([4, 5, 0x80, 0x07, 0xD0]))
    config = replace(MAPS, inputs=(2, 34, 34), layers=("2C5", 10), steps=5, batch=2, root=str(tmp_path))
    problem = make_problem(config)
    assert problem.x.shape == (5, 2, 2, 34, 34)
    assert problem.x.nonzero()[:, 0].tolist() == [2, 2]
    assert sorted(problem.target.tolist()) == [3, 7]
    with pytest.raises(ConfigError, match=r"are \(2, 34, 34\)"):
        replace(MAPS, root=str(tmp_path))


@pytest.mark.parametrize("layer", ["12C", "C5", "12C5-AP2", "0C5", "12C5-MP0", 0, "ten"])
def test_layers_that_are_none(layer: int | str) -> None:
    with pytest.raises(ConfigError, match="64C3p1-MP2"):
        Layer.parse(layer)


def test_convolutional_networks_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        Config(inputs=(1, 4, 4), layers=("12C5", 10))
    with pytest.raises(ConfigError, match="does not fit"):
        Config(inputs=700, layers=("12C5", 10))
    with pytest.raises(ConfigError, match="known: conv, tutorial"):
        run_conv("resnet", OPTIONS, QUIET)
    assert all(config.neurons[-1] == (10,) for each in CONVOLUTIONAL.values() for config in each)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--network vgg9 --protocol s3gd", "network of its own"),
        ("--network conv --sweep size", "linear layers"),
        ("--root somewhere", "n-mnist alone"),
    ],
)
def test_networks_that_cannot_be_asked_for(arguments: str, message: str) -> None:
    shown = CliRunner().invoke(app, ["bench", *arguments.split()], env={"COLUMNS": "200"})
    assert shown.exit_code != 0
    assert message in " ".join(shown.output.split())
