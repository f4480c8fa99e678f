"""A study at work: its data, its networks and their training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data import SpikeData, check_files, load_spikes
from .network import Network, make_network
from .settings import ConvSettings, Settings
from .study import Study
from .training import Training, Trial


@dataclass
class Session:
    """A study with its data, which are loaded when first needed."""

    study: Study
    console: Console

    @cached_property
    def data(self) -> SpikeData:
        s = self.study
        # polarities are channels of a convolution
        merge = False if s.settings.data == "n-mnist" and isinstance(s.settings, ConvSettings) else None
        self.log(f"reading {s.settings.data}")
        with self.console.status(f"reading {s.settings.data}"):
            return load_spikes(
                s.settings.data,
                s.root,
                steps=s.settings.T,
                dt=s.settings.dt,
                limit=s.samples or None,
                merge_polarity=merge,
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
            disable=not self.console.is_terminal,
        )

    def log(self, line: str) -> None:
        """A line for each step of the work where no bar shows it."""
        if not self.console.is_terminal:
            self.console.print(line, highlight=False, soft_wrap=True)

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
        net = make_network(data.features, data.classes, settings, seed).to(device)
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
