"""The command line, as a user or a script calls it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from snn_sparse_plugin import SparseConfig, __version__
from snn_sparse_plugin.backends import LayerCall, LayerResult
from snn_sparse_plugin.core import registry
from snn_sparse_plugin.interfaces.cli import app
from snn_sparse_plugin.ops.spiking_layer.reference import ReferenceBackend

runner = CliRunner()


def add_backend(monkeypatch: pytest.MonkeyPatch, name: str, value: str, instance: object = None) -> None:
    plugin = registry.Plugin("backends", name, value, "toy", "1.0", _instance=instance)
    monkeypatch.setitem(registry.plugins("backends"), name, plugin)


class SilentBackend(ReferenceBackend):
    """Loses the last spike of every neuron."""

    name = "silent"

    def spiking_layer(self, call: LayerCall) -> LayerResult:
        found = super().spiking_layer(call)
        if found.spikes is not None:
            found.spikes[-1] = 0
        return found


class RefusingBackend(ReferenceBackend):
    name = "refusing"

    def supports(self, op: str, **_: object) -> tuple[bool, str]:
        return False, "only on Sundays"


def test_doctor_reports_and_checks_every_backend() -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    states = {b["name"]: b["state"] for b in found["backends"]}
    assert set(states) >= {"cpu", "triton", "torch_sparse", "reference"}
    assert states["reference"] == "ok"
    assert states["cpu"] == "ok", found["backends"]
    (check,) = (
        c for b in found["backends"] if b["name"] == "cpu" for c in b["checks"] if c["device"] == "cpu"
    )
    assert check["differing_spikes"] == 0
    assert check["gradient_error"] <= 1e-5
    assert found["versions"]["torch"]
    assert found["caches"]["cpu"]["files"] > 0
    assert {"h5py", "tonic", "torchvision"} <= set(found["optional"])
    assert result.exit_code == (0 if found["ok"] else 1)


def test_doctor_draws_tables() -> None:
    result = runner.invoke(app, ["doctor"])
    assert "spikes equal" in " ".join(result.stdout.split())
    assert "snn-sparse-plugin" in result.stdout


WIDTHS = [60, 80, 120, 200]


def shown_at(width: int, *arguments: str) -> str:
    result = runner.invoke(app, arguments, env={"COLUMNS": str(width)}, terminal_width=width)
    assert result.exit_code == 0, result.output
    return result.stdout


def is_whole(text: str, wide: str) -> bool:
    """Whether every word is one of the wider output; an English word alone may be broken, at its hyphen."""
    words, known = text.split(), set(wide.split())
    for word, following in zip(words, [*words[1:], ""], strict=True):
        broken = word.endswith("-") and not word.startswith(("-", "snn-")) and word + following in known
        rest = any(known_word.endswith(f"-{word}") for known_word in known)
        if not (word in known or broken or rest):
            return False
    return "…" not in text and "..." not in text.replace("[ARGS]...", "")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_breaks_a_word_or_a_command(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(monkeypatch, "refusing", "toy:Refusing", RefusingBackend())
    for command in ("plugins", "doctor"):
        shown = runner.invoke(app, [command], env={"COLUMNS": str(width)}).stdout
        assert "…" not in shown
        if registry.load("backends", "torch_sparse").available()[0] is False:
            assert "pip install --no-build-isolation torch-scatter torch-sparse" in shown
    assert "pytorch-lightning" in shown
    assert "refusing: cpu: only on Sundays" in shown


@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_breaks_the_table_of_neurons(width: int) -> None:
    shown = shown_at(width, "supported")
    assert is_whole(shown, shown_at(500, "supported"))
    assert max(map(len, shown.splitlines())) <= width


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command, as the words that call it."""
    command = command or typer.main.get_command(app)
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=lambda path: " ".join(path) or "snn-sparse")
def test_no_width_breaks_the_help_of_a_command(path: tuple[str, ...]) -> None:
    wide = shown_at(200, *path, "--help")
    for width in WIDTHS:
        shown = shown_at(width, *path, "--help")
        assert is_whole(shown, wide), shown
        assert max(map(len, shown.splitlines())) <= width


def test_doctor_finds_a_backend_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(monkeypatch, "silent", "toy:Silent", SilentBackend())
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    (row,) = (b for b in found["backends"] if b["name"] == "silent")
    assert not found["ok"]
    assert row["state"] == "failed"
    assert row["checks"][0]["differing_spikes"] > 0


def test_doctor_tells_why_a_backend_has_nothing_to_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(monkeypatch, "refusing", "toy:Refusing", RefusingBackend())
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    (row,) = (b for b in found["backends"] if b["name"] == "refusing")
    assert row["state"] == "idle"
    assert "only on Sundays" in row["reason"]


def test_a_broken_plugin_is_shown_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(monkeypatch, "broken", "no_such_module_anywhere:Backend")
    listing = runner.invoke(app, ["plugins", "--json"])
    assert listing.exit_code == 0
    rows = {(r["group"], r["name"]): r for r in json.loads(listing.stdout)}
    assert rows["backends", "broken"]["state"] == "broken"
    assert "no_such_module_anywhere" in rows["backends", "broken"]["reason"]
    assert rows["backends", "reference"]["state"] == "loaded"
    assert rows["adapters", "snntorch"]["version"]
    checked = runner.invoke(app, ["doctor", "--json"])
    assert checked.exit_code == 1
    (row,) = (b for b in json.loads(checked.stdout)["backends"] if b["name"] == "broken")
    assert row["state"] == "broken"


def test_plugins_draws_a_table() -> None:
    result = runner.invoke(app, ["plugins"])
    assert result.exit_code == 0
    assert "reference" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--data", "cifar"],
        ["bench", "--rounds", "0"],
        ["nothing"],
        ["bench", "--providers", "tensorflow"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def test_an_error_of_the_package_is_one_line(tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["demo", "--data", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "x.png")]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no mnist files in")
    assert "Traceback" not in result.output
    shown = runner.invoke(app, ["--debug", "demo", "--data", "mnist", "--root", str(tmp_path)])
    assert type(shown.exception).__name__ == "InputError"


@pytest.mark.parametrize("arguments", [["demo", "--out"], ["bench", "--rounds", "1", "--json"]], ids=" ".join)
def test_a_file_that_cannot_be_written_is_named_before_the_work(arguments: list[str], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "file"):
        result = runner.invoke(app, [*arguments, str(path)])
        assert result.exit_code == 2
        assert f"error: {path} cannot be written" in result.stderr


def test_an_error_of_a_script_is_the_scripts(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from snn_sparse_plugin import InputError\nraise InputError('of mine')\n")
    result = runner.invoke(app, ["run", str(script)])
    assert type(result.exception).__name__ == "InputError"
    assert result.exit_code == 1
    wrong = runner.invoke(app, ["run", "--threshold", "-1", str(script)])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: backprop_threshold")


@pytest.mark.parametrize(
    ("options", "window"),
    [
        (["--exact"], None),
        (["--threshold", "exact", "--exact"], None),
        (["--threshold", "0.3"], 0.3),
        (["--backprop-threshold", "0.3"], 0.3),
        (["--backprop_threshold=None"], None),
    ],
    ids=str,
)
def test_run_hands_its_options_to_the_mode_and_the_rest_to_the_script(
    options: list[str], window: float | None, tmp_path: Path
) -> None:
    script = tmp_path / "x.py"
    script.write_text(
        "import sys\nfrom snn_sparse_plugin.core.config import active_config\n"
        "print(active_config().backprop_threshold, sys.argv[1:])"
    )
    result = runner.invoke(app, ["run", "-q", *options, str(script), "--exact", "--epochs", "3", "-m"])
    assert result.stdout == f"{window} ['--exact', '--epochs', '3', '-m']\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--exct", "x.py"], "No such option.*--exct"),
        (["--thresold", "0.2", "x.py"], "No such option.*--thresold"),
        (["-q", "-x", "x.py"], "No such option.*-x"),
        (["--exact", "--threshold", "0.2", "x.py"], "contradict each other"),
        (["--threshold", "small", "x.py"], "--backprop-threshold takes auto, exact or a number"),
    ],
    ids=str,
)
def test_an_option_that_run_does_not_have_is_no_script(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("raise AssertionError('it ran')")
    result = runner.invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert re.search(words, " ".join(result.stderr.split()))  # the words are those of the installed click


def test_every_option_of_python_is_one_of_run(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text("from snn_sparse_plugin.core.config import active_config\nprint(active_config())")
    options = {
        "backprop_threshold": 0.3,
        "backend": "cpu",
        "min_active": 0.25,
        "fuse_time": False,
        "check": True,
        "max_steps": 7,
    }
    assert set(options) == {option.name for option in fields(SparseConfig)}
    words = ["--no-fuse-time", "--check"]
    for name, value in options.items():
        if not isinstance(value, bool):
            words += [f"--{name.replace('_', '-')}", str(value)]
    assert runner.invoke(app, ["run", "-q", *words, str(script)]).stdout == f"{SparseConfig(**options)}\n"


@pytest.mark.parametrize(
    "text", ["def f():\n    raise ValueError('mine')\nf()\n", "x = (\n", "import no_such_module_anywhere\n"]
)
def test_a_scripts_error_is_shown_as_python_shows_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    shown = [
        subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        for arguments in (
            (str(tmp_path / "x.py"),),
            ("-m", "snn_sparse_plugin", "run", "-q", str(tmp_path / "x.py")),
        )
    ]
    assert shown[0].stderr == shown[1].stderr
    assert shown[0].returncode == shown[1].returncode == 1


def test_a_mistyped_option_or_command_is_told_the_right_one() -> None:
    for arguments, meant in ((["benhc"], "bench"), (["bench", "--protcol", "x"], "--protocol")):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert meant in result.stderr


def test_completion_is_offered() -> None:
    assert "--install-completion" in runner.invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout


def test_the_interpreter_is_no_script() -> None:
    assert "Leave the name of the interpreter out." in runner.invoke(app, ["run", "python", "x.py"]).stderr


@pytest.mark.parametrize(("arguments", "name"), [(["nothing.py"], "script"), (["-m", "no.such"], "module")])
def test_a_script_that_does_not_exist(arguments: list[str], name: str) -> None:
    result = runner.invoke(app, ["run", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: there is no {name} {arguments[-1]!r}")


def test_version_and_help() -> None:
    assert (
        runner.invoke(app, ["--version"]).stdout.strip() == registry.plugins("backends")["reference"].version
    )
    listing = runner.invoke(app, ["--help"])
    assert all(command in listing.stdout for command in ("doctor", "plugins", "demo", "bench"))


def test_the_module_is_the_command_and_starts_light() -> None:
    code = (
        "import sys, snn_sparse_plugin.interfaces.cli\n"
        "heavy = {'snntorch', 'norse', 'triton', 'matplotlib', 'sklearn', 'spikingjelly'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = subprocess.run(
        [sys.executable, "-m", "snn_sparse_plugin", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == __version__


def test_a_base_install_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snn_sparse_plugin.interfaces.supported.loaded_adapters", list)
    result = runner.invoke(app, ["supported"])
    assert result.exit_code == 1
    assert "pip install snntorch norse" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["demo", "--data", "mnist"], ["experiment", "s3gd", "--data", "shd"]], ids=str
)
def test_data_that_is_not_there_says_how_to_fetch_it(arguments: list[str], tmp_path: Path) -> None:
    result = runner.invoke(app, [*arguments, "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"load_spikes({arguments[-1]!r}, DIR, download=True)" in " ".join(result.stderr.split())
