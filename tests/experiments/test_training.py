"""Trainings that are killed and go on, and the command that runs a study."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import torch_threads
from rich.console import Console
from typer.testing import CliRunner

from snn_sparse_plugin.core.errors import ConfigError, InputError
from snn_sparse_plugin.data import load_spikes
from snn_sparse_plugin.experiments import (
    Study,
    Training,
    Trial,
    conv_settings_of,
    run_study,
    settings_of,
)
from snn_sparse_plugin.experiments.checkpoint import load
from snn_sparse_plugin.experiments.files import only_one, write_csv
from snn_sparse_plugin.experiments.parts import CONV_PARTS
from snn_sparse_plugin.experiments.session import Session
from snn_sparse_plugin.files import write_atomic
from snn_sparse_plugin.interfaces.cli import app

pytest.importorskip("sklearn")
runner = CliRunner()
SMALL = ["experiment", "s3gd", "--data", "digits", "--samples", "160", "--batch", "32", "--hidden", "20"]
SMALL += ["--threads", "1"]


def small(epochs=3, **changes):
    return settings_of("digits").changed(epochs=epochs, batch=32, hidden=20, **changes)


@pytest.fixture(scope="module")
def digits():
    return load_spikes("digits", limit=160)


@pytest.fixture
def one_thread():
    with torch_threads(1):
        yield


def weights(folder):
    return load(folder / "checkpoint.pt").model


def test_killed_training_ends_with_the_same_weights(digits, one_thread, tmp_path):
    """SIGKILL at two moments of a real process; what goes on ends bit-equal to what was never stopped."""
    trial = Trial(small(epochs=40), True, 0)
    whole = Training(trial, digits, tmp_path / "whole")
    whole.run()
    out = tmp_path / "killed"
    folder = out / "trials" / trial.name
    command = [sys.executable, "-m", "snn_sparse_plugin", *SMALL]
    command += ["--epochs", "40", "--seeds", "0", "--part", "train", "--out", str(out)]
    reached = [0]
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (folder / "epochs.jsonl").is_file() or _epochs(folder) <= reached[-1]:
            assert child.poll() is None, child.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.07)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        reached.append(len(load(folder / "checkpoint.pt").history))
    assert 0 < reached[1] < reached[2] < 40  # killed in the middle, and the second went on from the first
    rest = Training(trial, digits, folder)
    assert rest.epoch == reached[2]
    rest.run()
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(folder)[name]), name
    same = [{k: v for k, v in row.items() if k != "seconds"} for row in rest.history]
    assert same == [{k: v for k, v in row.items() if k != "seconds"} for row in whole.history]


def _epochs(folder):
    return len((folder / "epochs.jsonl").read_text().splitlines())


@pytest.mark.parametrize("sparse", [True, False])
def test_training_goes_on_from_a_checkpoint(digits, tmp_path, sparse):
    def training(epochs, folder):
        trial = Trial(small(epochs, learning_rate=0.01), sparse, 1)
        return Training(trial, digits, tmp_path / folder)

    whole = training(3, "whole")
    whole.run()
    training(1, "parts").run()
    longer = training(3, "parts")
    assert (longer.epoch, longer.left) == (1, 2)
    longer.run()
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, longer.net.state_dict()[name])
    assert whole.history[-1]["train_loss"] < whole.history[0]["train_loss"]
    log = tmp_path / "parts/epochs.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == longer.history
    log.write_text(
        "".join(f"{line}\n" for line in log.read_text().splitlines()[:-1])
    )  # killed before the log
    training(3, "parts")
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines
    header, *rows = (tmp_path / "parts/epochs.csv").read_text().splitlines()
    assert "active_1" in header
    assert "rate_2" in header
    assert len(rows) == 3


def test_checkpoint_of_another_training_or_of_something_else(digits, tmp_path):
    trial = Trial(small(1), True, 0)
    Training(trial, digits, tmp_path).run()
    with pytest.raises(ConfigError, match=r"learning_rate = 0.001, this one has 0.01"):
        Training(Trial(small(1, learning_rate=0.01), True, 0), digits, tmp_path)
    with pytest.raises(ConfigError, match="seed = 0, this one has 1"):
        Training(Trial(small(1), True, 1), digits, tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for wrong in (whole[:1000], b"", b"nonsense"):
        (tmp_path / "checkpoint.pt").write_bytes(wrong)
        with pytest.raises(InputError, match="not a checkpoint"):
            Training(trial, digits, tmp_path)
    torch.save({"model": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="not a checkpoint"):
        Training(trial, digits, tmp_path)
    torch.save(Evil(), tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="not a checkpoint"):
        Training(trial, digits, tmp_path)
    assert not Path("ran").exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_files_are_old_or_new(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fails(file):
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomic(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_csv(path, [{"a": 1, "b": [2, 3]}, {"a": 4, "b": [5, 6]}])
    assert path.read_text() == "a,b_1,b_2\n1,2,3\n4,5,6\n"


def test_command_makes_every_table_and_figure_once(tmp_path):
    pytest.importorskip("snntorch")
    pytest.importorskip("matplotlib")
    arguments = [*SMALL, "--out", str(tmp_path), "--epochs", "2", "--seeds", "0,1", "--sizes", "10,20"]
    arguments += ["--thresholds", "0.1,0.2", "--deep", "3,15", "--rounds", "1"]
    first = runner.invoke(app, [*arguments, "--part", "all"])
    assert first.exit_code == 0, first.output
    assert "sparse-b0.2-n20-l2-seed1 epoch 2/2" in first.output
    parts = ["train", "hidden", "threshold", "depth", "gradients", "speed", "epoch"]
    assert all((tmp_path / f"{part}.json").is_file() for part in parts)
    pictures = ["training", "hidden", "threshold", "depth", "gradients", "speed"]
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in pictures)
    report = (tmp_path / "report.md").read_text()
    assert all(f"({name}.png)" in report for name in pictures)
    for words in ("Sparse minus dense", "mean over all updates", "backward", "B_th", "3 hidden layers of 15"):
        assert words in report
    trained = json.loads((tmp_path / "train.json").read_text())["result"]
    assert [(t["sparse"], t["seed"]) for t in trained] == [(True, 0), (False, 0), (True, 1), (False, 1)]
    # the mean over all updates, as published, is that of the epochs' means: all have the same number of batches
    for t in (t for t in trained if t["sparse"]):
        for layer, mean in enumerate(t["active_mean"]):
            epochs = [row[layer] for row in t["history"]["active"]]
            assert mean == pytest.approx(sum(epochs) / 2, abs=2e-6)
    # a sweep finds a network that has trained for longer, and takes its first epoch
    swept = json.loads((tmp_path / "hidden.json").read_text())["result"]
    assert {t["epochs"] for t in swept} == {1}
    assert swept[2]["test_accuracy"] == trained[0]["history"]["test_accuracy"][0]

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".json", ".pt")}
    again = runner.invoke(app, [*arguments, "--part", "all"])
    assert again.exit_code == 0, again.output
    assert again.output.count("done before") == len(parts)
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    mixed = runner.invoke(app, ["experiment", "s3gd", "--data", "shd", "--root", ".", "--out", str(tmp_path)])
    assert mixed.exit_code == 2
    assert "holds a study of digits" in mixed.output
    # more epochs: the part is done again, and each training goes on
    longer = [*SMALL, "--out", str(tmp_path), "--epochs", "3", "--seeds", "0,1", "--part", "train"]
    more = runner.invoke(app, longer)
    assert more.exit_code == 0, more.output
    swept = json.loads((tmp_path / "threshold.json").read_text())["result"]
    assert [t["weights_epochs"] for t in swept[1:]] == [2, 2]  # the dense network had gone on in part train
    assert "network's as far as it was trained, 2 epochs." in report
    # every part but the training looks at the first seed alone
    conditions = [line for line in report.splitlines() if line.startswith("_digits: ")]
    assert [("seeds 0, 1." in line, ", 2 epochs" in line) for line in conditions] == [(True, True)] + 6 * [
        (False, False)
    ]
    assert all("seed 0." in line for line in conditions[1:])
    assert "\n\n\n" not in report
    assert "epoch 3/3" in more.output
    assert "epoch 1/3" not in more.output


def test_wrong_options(tmp_path):
    (tmp_path / "file").write_text("")
    for options, words in (
        (["--part", "nothing"], "no part 'nothing'"),
        (["--seeds", "a"], "--seeds takes numbers"),
        (["--deep", "5"], "--deep takes"),
        (["--threshold", "-1"], "must be > 0"),
        (["--device", "cuda:99"], "not available"),
        (["--data", "shd"], "--root"),
        (["--seeds", "1,2,1"], "each seed is one network"),
        (["--thresholds", "0.2,0"], "thresholds must be > 0"),
        (["--out", str(tmp_path / "file")], "cannot be written to"),
    ):
        result = runner.invoke(app, ["experiment", "s3gd", "--out", str(tmp_path), *options])
        assert result.exit_code == 2, result.output
        assert words in result.output
    for content in ("{", "[]", '{"result": 1}'):
        (tmp_path / "train.json").write_text(content)
        with pytest.raises(InputError, match="not a part's results"):
            run_study(Study(settings=small(), out=tmp_path), ["train"], None)


def test_one_process_at_a_time_in_a_folder(tmp_path):
    study = Study(settings=small(), out=tmp_path)
    inside = "import sys, time; from pathlib import Path; from snn_sparse_plugin.experiments.files import only_one\n"
    inside += "with only_one(Path(sys.argv[1])): print('inside', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", inside, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"inside\n"
        with pytest.raises(ConfigError, match="another process works in"):
            run_study(study, ["train"], None)
        other.kill()
    with only_one(tmp_path):  # a killed one leaves nothing behind
        pass


def test_convolutional_study_makes_its_tables(tmp_path):
    pytest.importorskip("snntorch")
    quick = ["experiment", "s3gd-conv", "--quick", "--seeds", "0", "--threads", "1", "--out", str(tmp_path)]
    made = runner.invoke(app, [*quick, "--layers", "2"], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    assert all((tmp_path / f"{part}.json").is_file() for part in CONV_PARTS)
    report = (tmp_path / "report.md").read_text()
    assert "2 layers of a convolution 3 × 3 to 4 channels" in report
    assert "## Layer 2 alone" in report
    assert "published" not in report.lower()
    grads = json.loads((tmp_path / "gradients.json").read_text())["result"]
    assert all(row["exact_error"] < 1e-4 for each in grads for row in each["rows"])
    again = runner.invoke(app, [*quick, "--layers", "2"])
    assert again.output.count("done before") == len(CONV_PARTS)
    other = runner.invoke(app, ["experiment", "s3gd", "--part", "train", "--out", str(tmp_path)])
    assert "another network" in " ".join(other.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "hidden"], "no part 'hidden'"),
        (["--kernel", "4"], "odd side"),
        (["--layers", "4"], "to nothing"),
    ],
)
def test_wrong_options_of_the_convolutional_study(tmp_path, options, message):
    result = runner.invoke(app, ["experiment", "s3gd-conv", "--quick", "--out", str(tmp_path), *options])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


def test_polarities_of_recordings_are_channels(tmp_path):
    for part in ("Train", "Test"):
        file = tmp_path / part / "3" / "00001.bin"
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes([4, 5, 0x80, 0x07, 0xD0]))
    study = Study(settings=conv_settings_of("n-mnist"), out=tmp_path / "out", root=tmp_path, seeds=(0,))
    session = Session(study, Console(quiet=True))
    net, _ = session.network(study.settings, 0)
    assert net.sizes == [(2, 34, 34), (12, 17, 17), (12, 8, 8)]
    x, _ = session.batch()
    assert net(x).mem.shape == (100, 1, 10)
