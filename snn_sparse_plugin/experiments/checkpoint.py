"""Checkpoints from which a killed training goes on as if nothing had happened."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..files import reading, write_atomic
from ..files.plain import load_plain
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
    """Write it whole: a reader finds the last one or this one, whenever the writer is killed.

    Raises:
        FileError: there is no room; the last one stays.
    """
    write_atomic(path, lambda file: torch.save(checkpoint._asdict(), file))


_KINDS = {"about": dict, "model": dict, "optimizer": dict, "order": Tensor, "history": list}
_ADVICE = "Delete it to train anew."


def load(path: Path) -> Checkpoint:
    """Read one; only tensors and plain data are loaded (``weights_only``), no code.

    Raises:
        InputError: the file is no checkpoint.
    """
    what = "a checkpoint of this experiment"
    found = load_plain(path, what, _ADVICE)
    with reading(path, what, _ADVICE):
        if set(found) != set(_KINDS):
            raise ValueError(f"it has the entries {', '.join(map(str, found))}, expected {', '.join(_KINDS)}")
        for name, kind in _KINDS.items():
            if not isinstance(found[name], kind):
                raise ValueError(f"{name} is {type(found[name]).__name__}, expected {kind.__name__}")
        for name, value in found["about"].items():
            if not isinstance(name, str) or not isinstance(value, str | int | float | None):
                raise ValueError(f"it is of a training with {name} = {type(value).__name__}")
        return Checkpoint(**found)


def put_into(
    path: Path, found: Checkpoint, net: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator
) -> None:
    """Give a training what a checkpoint holds.

    Raises:
        InputError: it is of another network or optimizer; nothing is changed then.
    """
    with reading(path, "a checkpoint of this training", _ADVICE):
        _check_model(net.state_dict(), found.model)
        _check_optimizer(optimizer, found.optimizer)
        torch.Generator().set_state(found.order)
        _check_history(found.history)
    net.load_state_dict(found.model)
    optimizer.load_state_dict(found.optimizer)
    order.set_state(found.order)


def _check_model(expected: dict[str, Tensor], found: dict[str, Any]) -> None:
    if set(found) != set(expected):
        raise ValueError(
            f"it has the parameters {', '.join(map(str, found))}, expected {', '.join(expected)}"
        )
    for name, like in expected.items():
        _check_tensor(name, found[name], like)


def _check_optimizer(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    groups, state = found["param_groups"], found["state"]
    for group, mine in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
        for name, value in mine.items():  # another version of torch may know other options than these
            lacks = name not in group and name in ("params", "lr", "betas", "eps", "weight_decay")
            if lacks or group.get(name, value) != value:
                raise ValueError(f"{name} of its optimizer is not {value!r}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if set(state) != set(range(len(parameters))):
        raise ValueError("its optimizer has seen other parameters")
    for k, moments in state.items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            like = torch.zeros(()) if name == "step" else parameters[k]
            _check_tensor(f"{name} of parameter {k}", moments[name], like)


def _check_tensor(name: str, found: Any, like: Tensor) -> None:
    if not isinstance(found, Tensor) or found.layout != torch.strided:
        raise ValueError(f"{name} is no tensor")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"{name} is {found.dtype} {tuple(found.shape)}, expected {like.dtype} {tuple(like.shape)}"
        )


# what an epoch of the history holds: numbers, a number for each layer or update, or both
_NUMBERS = ("epoch", "updates", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
_LISTS, _TABLES = ("active", "rate", "loss_by_update"), ("active_by_update",)


def _check_history(history: list[Any]) -> None:
    for k, row in enumerate(history, start=1):
        if set(row) != {*_NUMBERS, *_LISTS, *_TABLES}:
            raise ValueError(f"its history of epoch {k} has other entries")
        cells = [row[name] for name in _NUMBERS] + [x for name in _LISTS for x in row[name]]
        cells += [x for name in _TABLES for line in row[name] for x in line]
        if row["epoch"] != k or not all(type(x) in (int, float) for x in cells):
            raise ValueError(f"its history of epoch {k} holds something else")


def check_same(path: Path, checkpoint: Checkpoint, about: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` where the checkpoint is of another training than ``about``."""
    for name in sorted({*checkpoint.about, *about}):
        was, now = checkpoint.about.get(name), about.get(name)
        if name not in _FREE and was != now:
            raise ConfigError(
                f"{path} is of a training with {name} = {was!r}, this one has {now!r}: "
                f"give another --out, or delete the folder."
            )


def about(settings: Settings, sparse: bool, seed: int, samples: int) -> dict[str, Any]:
    """What must be equal for a training to go on."""
    plain = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return plain | {"sparse": sparse, "seed": seed, "samples": samples}
