"""What the tutorials share: ``--mode``, the digits, and a last line of numbers.

``--mode upstream`` needs nothing but the library itself; ``swapped`` imports the sparse face instead, ``sparse`` runs
the same code inside ``sparse_mode()``, and ``exact`` in the same with upstream's whole gradient.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

FACES = {"snntorch": "snn_sparse_plugin.snntorch", "norse.torch": "snn_sparse_plugin.norse"}


def arguments(about: str | None, *, epochs: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--mode", choices=("upstream", "swapped", "sparse", "exact"), default="upstream")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--root", help="folder of the data that the tutorial does not bring along")
    args = parser.parse_args()
    torch.manual_seed(0)
    return args


def library(name: str, mode: str) -> Any:
    """The library as a tutorial imports it."""
    return import_module(FACES[name] if mode == "swapped" else name)


def sparse(mode: str) -> AbstractContextManager[Any]:
    """What goes around the training."""
    if mode not in ("sparse", "exact"):
        return nullcontext()
    options = {"backprop_threshold": None} if mode == "exact" else {}
    return import_module("snn_sparse_plugin").sparse_mode(**options)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 8x8 digits in [0, 1]: training images (1437, 1, 8, 8) and labels, test images and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(found.target)[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def batches(count: int, size: int) -> list[Tensor]:
    return [b for b in torch.randperm(count).split(size) if len(b) == size]


class Clock:
    """Seconds of training, without the first two steps: kernels are loaded, sparse mode finds out what pays.

    ``early``: the loss of the second step, before rounding has grown to other spikes.
    """

    def __init__(self) -> None:
        self.steps, self.start, self.early = 0, 0.0, float("nan")
        self.seconds: float | None = None

    def tick(self, loss: Any) -> None:
        """A step has been made."""
        self.steps += 1
        if self.steps == 2:
            self.early, self.start = float(torch.as_tensor(loss).detach()), time.perf_counter()

    def stop(self) -> None:
        """Training has ended."""
        self.seconds = time.perf_counter() - self.start if self.start else 0.0


def report(loss: Any, score: float, clock: Clock, *, unit: str = "accuracy in %") -> None:
    """The last line: losses, score and seconds."""
    if clock.seconds is None:
        clock.stop()
    numbers = {"early": clock.early, "loss": float(torch.as_tensor(loss).detach()), "score": score}
    print(json.dumps({**numbers, "unit": unit, "seconds": clock.seconds}))
