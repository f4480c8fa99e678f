"""One training: Adam on the published losses, a checkpoint after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..data import SpikeData, SpikeDataset, loader
from .checkpoint import Checkpoint, about, check_same, load, put_into, save
from .files import write_csv, write_lines
from .losses import loss, scores
from .network import make_network
from .settings import Settings

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Trial:
    """A network to train: settings, sparse or with the exact gradient, and the seed of weights and batches."""

    settings: Settings
    sparse: bool
    seed: int

    @property
    def name(self) -> str:
        """Name of the trial's folder, different for each trial of a study."""
        s = self.settings
        window = f"sparse-b{s.threshold:g}" if self.sparse else "dense"
        guard = f"-guard{s.min_active:g}" if self.sparse and s.min_active else ""
        return f"{window}{guard}-n{s.hidden}-l{s.layers}-seed{self.seed}"


class Training:
    """A trial that has run for :attr:`epoch` epochs; what was done before is read from ``folder``.

    Args:
        trial: what to train.
        data: training and test set.
        folder: where ``checkpoint.pt``, ``epochs.jsonl`` and ``epochs.csv`` go.
        device: of the network.

    Raises:
        ConfigError: ``folder`` holds another training.
        InputError: its checkpoint cannot be read, or is of another network.
    """

    def __init__(self, trial: Trial, data: SpikeData, folder: Path, device: str = "cpu") -> None:
        self.trial, self.data, self.folder, self.device = trial, data, folder, device
        self.about = about(trial.settings, trial.sparse, trial.seed, len(data.train))
        self.net = make_network(data.features, data.classes, trial.settings, trial.seed).to(device)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=trial.settings.learning_rate, betas=(0.9, 0.999), fused=True
        )
        self.order = torch.Generator().manual_seed(trial.seed)
        self.history: list[dict[str, Any]] = []
        if self.path.is_file():
            found = load(self.path)
            check_same(self.path, found, self.about)
            put_into(self.path, found, self.net, self.optimizer, self.order)
            self.history = found.history
            if epochs_done(folder) < self.epoch:  # killed after the checkpoint, before the logs
                write_logs(folder, self.history)

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def left(self) -> int:
        """Epochs to do."""
        return max(0, self.trial.settings.epochs - self.epoch)

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return len(self._batches(self.order))

    def run(
        self,
        batch_done: Callable[[], None] = lambda: None,
        epoch_done: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """Train to the last epoch. A kill loses the epoch it falls in, which the next call repeats in the same way."""
        while self.left:
            row = self._train_epoch(batch_done)
            row["test_accuracy"], row["test_loss"] = self.evaluate(self.data.test)
            self.history.append(row)
            self._save()
            epoch_done(row)

    def _train_epoch(self, batch_done: Callable[[], None]) -> dict[str, Any]:
        settings, start = self.trial.settings, perf_counter()
        losses, hits, seen = [], [], 0
        active: list[list[float]] = []
        rates: list[list[float]] = []
        for x, y in self._batches(self.order):
            x, y = x.to(self.device), y.to(self.device)
            self.optimizer.zero_grad(set_to_none=True)
            out = self.net(x, sparse=self.trial.sparse)
            entropy, total = loss(out.mem, y, [s.counts() for s in out.spikes], settings)
            total.backward()
            self.optimizer.step()
            losses.append(entropy.detach())
            hits.append(_hits(out.mem, y, settings))
            seen += len(y)
            active.append([float(a) for a in out.active])
            rates.append([s.density for s in out.spikes])
            batch_done()
        seconds = perf_counter() - start
        return {
            "epoch": self.epoch + 1,
            "updates": (self.epoch + 1) * len(losses),
            "train_loss": float(torch.stack(losses).mean()),
            "train_accuracy": int(torch.stack(hits).sum()) / seen,
            "active": _means(active),
            "rate": _means(rates),
            "loss_by_update": [round(float(x), 5) for x in torch.stack(losses)],
            "active_by_update": [[round(a, 6) for a in row] for row in active],
            "seconds": round(seconds, 3),
        }

    def _batches(self, order: torch.Generator) -> Any:
        batch = min(self.trial.settings.batch, len(self.data.train))
        return loader(self.data.train, batch, shuffle=True, generator=order, drop_last=True)

    @torch.no_grad()
    def evaluate(self, dataset: SpikeDataset) -> tuple[float, float]:
        """Accuracy and cross entropy on all samples of a set."""
        correct, total = 0, 0.0
        for x, y in loader(dataset, min(EVALUATION_BATCH, self.trial.settings.batch)):
            x, y = x.to(self.device), y.to(self.device)
            mem = self.net(x).mem
            total += float(loss(mem, y, [], self.trial.settings)[0]) * len(y)
            correct += int(_hits(mem, y, self.trial.settings))
        return correct / len(dataset), total / len(dataset)

    def _save(self) -> None:
        state = self.net.state_dict(), self.optimizer.state_dict(), self.order.get_state()
        save(self.path, Checkpoint(self.about, *state, self.history))
        # made from the checkpoint's history: what a kill in between leaves behind is made up for when it is read
        write_logs(self.folder, self.history)


def epochs_done(folder: Path) -> int:
    """How far the training of a folder has come, by its log."""
    log = folder / "epochs.jsonl"
    return len(log.read_bytes().splitlines()) if log.is_file() else 0


def write_logs(folder: Path, history: list[dict[str, Any]]) -> None:
    """``epochs.jsonl``, one object an epoch, and ``epochs.csv``, the same without the values of single updates."""
    write_lines(folder / "epochs.jsonl", history)
    short = [{k: v for k, v in row.items() if not k.endswith("_by_update")} for row in history]
    write_csv(folder / "epochs.csv", short)


def _hits(mem: Tensor, y: Tensor, settings: Settings) -> Tensor:
    return (scores(mem.detach(), settings).argmax(1) == y).sum()


def _means(rows: list[list[float]]) -> list[float]:
    return [round(sum(column) / len(column), 6) for column in zip(*rows, strict=True)]
