"""A study: the parts of the publication's section 3 on one data set, each done once and kept."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..bench.report import commit
from ..core.config import check_device
from ..core.errors import ConfigError
from ..core.version import VERSION
from ..data import SpikeData, check_files, load_spikes
from ..files import reading
from ..interfaces.doctor import installed
from .files import only_one, write_json
from .network import Network
from .settings import Settings
from .training import Training, Trial


@dataclass(frozen=True)
class Study:
    """What is studied, and where it goes.

    Args:
        settings: network and training.
        root: folder of the data's files.
        out: folder of logs, checkpoints, results and the report.
        seeds: of weights and batches, all different; each is trained sparse and dense.
        samples: training samples, 0 for all.
        title: the data's name in the report.
        sizes: N of the sweep over hidden size. ``thresholds``: B_th of that sweep. ``deep``: layers and N of the deep
            network. ``sweep_epochs``: how long the networks of the sweeps are trained.
        rounds: alternating rounds of a time, at most. ``budget``: seconds after which a row gets fewer of them.
        device, threads: where it runs; 0 threads leaves torch's choice.
    """

    settings: Settings
    out: Path
    root: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 0
    title: str | None = None
    sizes: tuple[int, ...] = (100, 200, 400, 600, 800, 1000)
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    deep: tuple[int, int] = (5, 300)
    sweep_epochs: int = 1
    rounds: int = 7
    budget: float = 20.0
    device: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if not self.seeds or not self.sizes or not self.thresholds:
            raise ConfigError("seeds, sizes and thresholds need at least one entry.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"each seed is one network, got seeds {', '.join(map(str, self.seeds))}.")
        if not all(threshold > 0 for threshold in self.thresholds):
            raise ConfigError(f"thresholds must be > 0, got {', '.join(map(str, self.thresholds))}.")
        if min(self.rounds, self.sweep_epochs, *self.sizes, *self.deep) < 1 or self.samples < 0:
            raise ConfigError("rounds, sweep epochs and sizes must be at least 1, samples at least 0.")
        check_device(self.device)

    def path(self, part: str) -> Path:
        """The file of a part's results."""
        return self.out / f"{part}.json"

    def results(self, part: str) -> dict[str, Any] | None:
        """What a part found, with the ``conditions`` it was done under, or None where it is not done."""
        path = self.path(part)
        if not path.is_file():
            return None
        with reading(path, "a part's results", "Delete it."):
            found = json.loads(path.read_text())
            if not isinstance(found["conditions"]["settings"]["data"], str):
                raise ValueError("its conditions are not those of a study")
            return {key: found[key] for key in ("request", "conditions", "result")}


@dataclass
class Session:
    """A study at work: its data, loaded when first needed, and its progress bars."""

    study: Study
    console: Console

    @cached_property
    def data(self) -> SpikeData:
        s = self.study
        with self.console.status(f"reading {s.settings.data}"):
            return load_spikes(
                s.settings.data, s.root, steps=s.settings.T, dt=s.settings.dt, limit=s.samples or None
            )

    @cached_property
    def title(self) -> str:
        """The data's name; what has SHD's layout is called so only where the files are the official ones."""
        s = self.study
        if s.title is not None:
            return s.title
        if s.settings.data != "shd":
            return {"fashion-mnist": "Fashion-MNIST", "n-mnist": "N-MNIST"}.get(
                s.settings.data, s.settings.data
            )
        known = check_files("shd", s.root or ".")
        return (
            "SHD" if known and all(known.values()) else "Recordings in SHD's layout (not the official files)"
        )

    def progress(self) -> Progress:
        """A context with progress bars and the time left; a task takes a ``note``."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )

    def train(self, trials: Sequence[Trial], what: str) -> list[Training]:
        """Train what is not trained yet; finished trials are only read."""
        folder = self.study.out / "trials"
        trainings = [Training(t, self.data, folder / t.name, self.study.device) for t in trials]
        left = sum(t.left * t.batches for t in trainings)
        if not left:
            return trainings
        with self.progress() as bars:
            task = bars.add_task(what, total=left, note="")

            for training in trainings:
                bars.update(task, note=training.trial.name)
                training.run(partial(bars.advance, task), partial(self._tell, training.trial))
        return trainings

    def _tell(self, trial: Trial, row: dict[str, Any]) -> None:
        line = epoch_line(trial.name, row, trial.settings.epochs)
        self.console.print(line, highlight=False, soft_wrap=True)

    def network(self, settings: Settings, seed: int, weights_of: Trial | None = None) -> tuple[Network, int]:
        """A network with the weights of a trial as far as it is trained, else fresh ones; and its epochs."""
        data, device = self.data, self.study.device
        net = Network(data.features, data.classes, settings, seed).to(device)
        if weights_of is None:
            return net, 0
        training = Training(weights_of, data, self.study.out / "trials" / weights_of.name, device)
        net.load_state_dict(training.net.state_dict())
        return net, training.epoch

    def batch(self, seed: int = 0) -> tuple[Any, Any]:
        """A batch of training samples, the same at every call."""
        size = min(self.study.settings.batch, len(self.data.train))
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))
        x, y = self.data.train.batch(order[:size])
        return x.to(self.study.device), y.to(self.study.device)


def epoch_line(name: str, row: dict[str, Any], epochs: int) -> str:
    """An epoch in one line: loss, accuracy, and of each layer the active fraction and spikes."""
    layers = ", ".join(
        f"layer {k} active {100 * a:.2f} % spikes {100 * r:.2f} %"
        for k, (a, r) in enumerate(zip(row["active"], row["rate"], strict=True), start=1)
    )
    return (
        f"{name} epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, "
        f"test {100 * row['test_accuracy']:.2f} %, {layers}, {row['seconds']:.1f} s"
    )


def run_study(study: Study, parts: Sequence[str], console: Console) -> Path:
    """Do the parts that are not done, and write the report of all that are; returns its path.

    A part whose ``NAME.json`` is there under the same conditions is not done again.

    Raises:
        ConfigError: an unknown part, or a folder that holds another study or in which another process works.
        InputError, MissingDependencyError: from reading the data.
    """
    from .parts import PARTS
    from .report import write_report

    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"no part {part!r}; there are {', '.join(PARTS)}.")
    if study.threads:
        torch.set_num_threads(study.threads)
    session = Session(study, console)
    with only_one(study.out):
        for part in PARTS:
            found = study.results(part)
            if found is not None and found["conditions"]["settings"]["data"] != study.settings.data:
                other = found["conditions"]["settings"]["data"]
                raise ConfigError(f"{study.out} holds a study of {other}: give another --out.")
        for part in (p for p in PARTS if p in parts):
            wanted = json.loads(json.dumps(PARTS[part].request(study)))
            before = study.results(part)
            if before is not None and before["request"] == wanted:
                console.print(f"{part}: done before, {study.path(part)}", highlight=False, soft_wrap=True)
                continue
            console.print(f"{part}: {PARTS[part].about}", highlight=False)
            found = PARTS[part].run(session)
            conditions = _conditions(session)
            write_json(study.path(part), {"request": wanted, "conditions": conditions, "result": found})
        return write_report(study, console)


def _conditions(session: Session) -> dict[str, Any]:
    study, data = session.study, session.data
    gpu = torch.cuda.get_device_name(study.device) if study.device != "cpu" else None
    return {
        "title": session.title,
        "settings": study.settings.as_dict(),
        "samples": [len(data.train), len(data.test)],
        "input_density": data.train.density,
        "seeds": list(study.seeds),
        "device": gpu or _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "snn-sparse-plugin": VERSION,
            "torch": torch.__version__,
            "snntorch": installed("snntorch"),
        },
        "commit": commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
