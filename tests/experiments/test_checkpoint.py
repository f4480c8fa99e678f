"""Checkpoints and results that are damaged or of something else, and disks without room: one line, nothing lost."""

import errno
import io
import json
import os

import pytest
import torch
from file_fuzz import small_study, write_checkpoint
from rich.console import Console

from snn_sparse_plugin import ConfigError, InputError
from snn_sparse_plugin.core.errors import FileError
from snn_sparse_plugin.experiments.files import only_one
from snn_sparse_plugin.experiments.parts import PARTS
from snn_sparse_plugin.experiments.report import write_report
from snn_sparse_plugin.experiments.settings import Settings
from snn_sparse_plugin.experiments.study import Study
from snn_sparse_plugin.experiments.training import Training, Trial


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder)
    return (folder / "checkpoint.pt").read_bytes()


@pytest.fixture
def training(tmp_path, whole):
    """Makes the training again, from a checkpoint that a function has changed."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(whole)
    trial, data = small_study()

    def again(change):
        found = torch.load(path, weights_only=True)
        change(found)
        torch.save(found, path)
        return Training(trial, data, tmp_path)

    return again


def of(entry, name, value):
    def change(found):
        if name in found[entry] or not isinstance(found[entry], dict):
            found[entry][name] = value(found[entry][name]) if callable(value) else value
        else:
            raise KeyError(name)

    return change


def dropped(*path):
    def change(found):
        for name in path[:-1]:
            found = found[name]
        del found[path[-1]]

    return change


def moments(change):
    return lambda found: change(found["optimizer"]["state"][0])


CHANGES = {
    "no model": dropped("model"),
    "another entry": lambda d: d.update(more=1),
    "a model that is a list": lambda d: d.update(model=[]),
    "a history that is a dict": lambda d: d.update(history={}),
    "a history of numbers": lambda d: d.update(history=[1]),
    "an epoch without its loss": dropped("history", 0, "train_loss"),
    "an epoch with something else": lambda d: d["history"][0].update(more=torch.ones(2)),
    "a loss that is text": lambda d: d["history"][0].update(train_loss="low"),
    "activities that are one number": lambda d: d["history"][0].update(active=0.5),
    "another epoch": lambda d: d["history"][0].update(epoch=5),
    "a missing weight": lambda d: d["model"].popitem(),
    "a weight by another name": lambda d: d["model"].update(more=torch.ones(1)),
    "a weight of another shape": lambda d: d["model"].update({k: v[:1] for k, v in d["model"].items()}),
    "a weight in double": lambda d: d["model"].update({k: v.double() for k, v in d["model"].items()}),
    "a weight that is a number": lambda d: d["model"].update(dict.fromkeys(d["model"], 1.0)),
    "no moments": moments(lambda m: m.clear()),
    "moments of another shape": moments(lambda m: m.update(exp_avg=m["exp_avg"][:1].clone())),
    "moments that are none": moments(lambda m: m.update(exp_avg_sq=None)),
    "moments of another dtype": moments(lambda m: m.update(exp_avg_sq=m["exp_avg_sq"].long())),
    "a step of two numbers": moments(lambda m: m.update(step=torch.ones(2))),
    "moments of fewer parameters": lambda d: d["optimizer"]["state"].pop(0),
    "another learning rate": lambda d: d["optimizer"]["param_groups"][0].update(lr=-1.0),
    "a group without parameters": dropped("optimizer", "param_groups", 0, "params"),
    "a group without a learning rate": dropped("optimizer", "param_groups", 0, "lr"),
    "two groups of parameters": lambda d: d["optimizer"]["param_groups"].append({}),
    "an optimizer of nothing": lambda d: d.update(optimizer={}),
    "a short random state": lambda d: d.update(order=d["order"][:9].clone()),
    "a random state of zeros": lambda d: d.update(order=torch.zeros_like(d["order"])),
    "a random state of floats": lambda d: d.update(order=d["order"].float()),
    "a random state that is text": lambda d: d.update(order="0"),
    "about with a tensor": lambda d: d["about"].update(T=torch.ones(3)),
    "about with a number for a name": lambda d: d["about"].update({3: 1}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(training, what):
    with pytest.raises(InputError) as error:
        training(CHANGES[what])
    (line,) = str(error.value).splitlines()
    assert "checkpoint.pt is not a checkpoint" in line
    assert line.endswith("Delete it to train anew.")


@pytest.mark.parametrize("content", ["half", "nothing", "text", "a pickle", "zeros"])
def test_a_checkpoint_that_is_no_file_of_torch(tmp_path, whole, content):
    data = {
        "half": whole[: len(whole) // 2],
        "nothing": b"",
        "text": b"epoch 1",
        "a pickle": b"\x80\x04K\x01.",
    }
    (tmp_path / "checkpoint.pt").write_bytes(data.get(content, bytes(len(whole))))
    trial, samples = small_study()
    with pytest.raises(InputError, match=r"checkpoint.pt is not a checkpoint.*Delete it"):
        Training(trial, samples, tmp_path)


def test_a_checkpoint_of_another_training_is_told_apart(training):
    with pytest.raises(ConfigError, match="is of a training with hidden = 7, this one has 5"):
        training(lambda d: d["about"].update(hidden=7))


def test_a_whole_one_goes_on(training):
    assert training(lambda found: None).epoch == 1


def test_a_disk_without_room_keeps_the_last_epoch(tmp_path, whole, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(whole)
    trial, data = small_study()
    longer = Trial(trial.settings.changed(epochs=2), trial.sparse, trial.seed)
    training = Training(longer, data, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())

    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(FileError, match=r"checkpoint.pt cannot be written \(No space left") as error:
            training.run()
    assert len(str(error.value).splitlines()) == 1
    assert path.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    again = Training(longer, data, tmp_path)  # as if it had been killed
    again.run()
    reference = Training(longer, data, tmp_path / "reference")
    reference.run()
    for name, value in reference.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])


def test_what_a_killed_writer_left_is_thrown_away(tmp_path):
    (tmp_path / "trials").mkdir()
    left = tmp_path / "trials" / ".checkpoint.pt.1234-5.part"
    left.write_text("half")
    (tmp_path / "kept.part").write_text("")
    with only_one(tmp_path):
        assert not left.exists()
    assert (tmp_path / "kept.part").exists()


# --- results ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"request": 1}',
        '{"request": {}, "conditions": [], "result": []}',
        "[" * 5000,
        "\x00\xff",
    ],
)
def test_results_that_are_none(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(InputError, match=r"train.json is not a part's results.*Delete it"):
        Study(Settings(data="digits"), tmp_path).results("train")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("result", [None, [], [{"sparse": True}], {"trials": 3}, "text"], ids=repr)
def test_a_report_of_damaged_results_names_their_file(tmp_path, part, result):
    pytest.importorskip("matplotlib")
    conditions = {"settings": {"data": "digits"}, "title": "digits"}
    content = {"request": {}, "conditions": conditions, "result": result}
    (tmp_path / f"{part}.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{part}.json is not a part's results"):
        write_report(Study(Settings(data="digits"), tmp_path), Console(file=io.StringIO()))
