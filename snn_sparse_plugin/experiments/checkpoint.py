"""Checkpoints from which a killed training goes on as if nothing had happened."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..files import write_atomic
from .settings import Settings

_FREE = ("epochs",)  # what may differ when a training goes on: it can be made longer


class Checkpoint(NamedTuple):
    """Everything a training needs after an epoch.

    ``about``: what is trained. ``order``: state of the generator that shuffles. ``history``: one dict per epoch.
    """

    about: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    order: Tensor
    history: list[dict[str, Any]]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write it whole: a reader finds the last one or this one, whenever the writer is killed."""
    write_atomic(path, lambda file: torch.save(checkpoint._asdict(), file))


def load(path: Path) -> Checkpoint:
    """Read one; only tensors and plain data are loaded (``weights_only``), no code.

    Raises:
        InputError: the file is no checkpoint.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(**found)
    except (TypeError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not a checkpoint of this experiment: {error}. Delete it to train anew."
        ) from error


def check_same(path: Path, checkpoint: Checkpoint, about: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` where the checkpoint is of another training than ``about``."""
    for name in sorted({*checkpoint.about, *about}):
        was, now = checkpoint.about.get(name), about.get(name)
        if name not in _FREE and was != now:
            raise ConfigError(
                f"{path} is of a training with {name} = {was}, this one has {now}: "
                f"give another --out, or delete the folder."
            )


def about(settings: Settings, sparse: bool, seed: int, samples: int) -> dict[str, Any]:
    """What must be equal for a training to go on."""
    plain = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return plain | {"sparse": sparse, "seed": seed, "samples": samples}
