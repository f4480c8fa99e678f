"""What keeps the gradient exact over a sequence, checked as its steps run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...core.errors import ConfigError, InputError, UnsupportedError
from .layer import WatchedLayer
from .record import Record


def open_steps(layers: Sequence[WatchedLayer]) -> int:
    """How many steps every layer has run since the last; raises where they differ."""
    readout = layers[-1]
    if not readout.open:
        raise ConfigError(
            f"learner.step() before the model ran a step: readout {readout.name} was not called."
        )
    counts = {x.name: len(x.open) for x in layers}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"every layer must run once per step; steps so far: {counts}.")
    return len(readout.open)


def check_call(layer: WatchedLayer, records: list[Record], fresh: bool, batch: int | None) -> None:
    """Check that the steps a layer has just run continue the sequence that its traces belong to.

    Args:
        fresh: whether its state began anew.
        batch: the number of samples that the sequence began with, None before.
    """
    if layer.open:
        raise UnsupportedError(
            f"e-prop: {layer.name} ran twice in one step. A module shared by two layers has no traces of its own "
            "for each; or learner.step(loss) was not called since (learner.step() where a step has no loss)."
        )
    if layer.ended:
        raise UnsupportedError('engine="offline" ends a sequence at flush(): call learner.reset().')
    B = records[0].z.shape[0]
    if batch is not None and batch != B:
        raise InputError(
            f"e-prop: {layer.name} got {B} samples, the sequence began with {batch}. Traces belong to "
            "samples: call learner.reset() between sequences."
        )
    if fresh and layer.steps:
        raise ConfigError(
            f"e-prop: the state of {layer.name} began anew after {layer.steps} steps, its traces did not. "
            "Call learner.reset() where a sequence begins."
        )


def check_shared(layer: WatchedLayer, layers: Sequence[WatchedLayer], records: list[Record]) -> None:
    """Every weight belongs to one layer and is used once per step; remembers those of this layer."""
    for record in records:
        names = [call.name for call in record.calls if call.name]
        if len(set(names)) == len(names) and layer.weights.issuperset(names):
            continue  # as in the step before
        others = {name for x in layers if x is not layer for name in x.weights}
        twice = [name for name in names if names.count(name) > 1 or name in others]
        if twice:
            raise UnsupportedError(
                f"e-prop: {twice[0]} is shared by two layers or used twice in a step; each needs its own traces."
            )
        layer.weights.update(names)


def unchanged(names: dict[nn.Parameter, str], before: dict[str, int] | None) -> dict[str, int]:
    """The versions of all parameters; raises if one was modified since ``before``."""
    now = {name: parameter._version for parameter, name in names.items()}
    changed = [name for name, version in now.items() if before is not None and before[name] != version]
    if changed:
        raise UnsupportedError(
            f"e-prop: {changed[0]} was modified within a sequence, so that its gradient would mix two networks. "
            'Step the optimizer after learner.flush() and call learner.reset(), or use update="chunk" and step it '
            "when learner.step() returns True."
        )
    return now
