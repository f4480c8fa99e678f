"""Which stateless torch modules act on each sample by itself, and which leave spike events events."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters import has_hooks
from ..core.spikes import SpikeTrain

_PER_SAMPLE = (
    *(nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.LayerNorm, nn.GroupNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold),
)
# by spatial dimensions: these also take a single sample without a batch, which must not be taken for one
_SPATIAL = {
    1: (
        nn.Conv1d,
        nn.ConvTranspose1d,
        nn.MaxPool1d,
        nn.AvgPool1d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveMaxPool1d,
    ),
    2: (
        *(
            nn.Conv2d,
            nn.ConvTranspose2d,
            nn.MaxPool2d,
            nn.AvgPool2d,
            nn.AdaptiveAvgPool2d,
            nn.AdaptiveMaxPool2d,
        ),
        *(nn.ZeroPad2d, nn.ConstantPad2d, nn.PixelShuffle, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    ),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d),
}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def applies_per_sample(module: Any, dims: int) -> bool:
    """Whether one call on (T * B, ...) gives what T calls on (B, ...) give, for an input of ``dims`` dimensions."""
    return not has_hooks(module) and dims >= 3 and _keeps_apart(module, dims)


def may_mix(module: nn.Module) -> bool:
    """Whether a step of this module may look at several samples, or keep something for the next step."""
    if is_unchanged(module, (nn.Sequential,)):
        return any(may_mix(child) for child in module.children())
    return not is_unchanged(module, _DROPOUT) and not any(_keeps_apart(module, dims) for dims in range(3, 7))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is torch's own batch norm, in train mode or not."""
    return is_unchanged(module, _BATCH_NORM)


def draws(module: nn.Module) -> bool:
    """Whether the module is one of torch's dropouts in train mode, which draw new random numbers at every call."""
    return module.training and is_unchanged(module, _DROPOUT)


def _keeps_apart(module: Any, dims: int) -> bool:
    for spatial, classes in _SPATIAL.items():
        if is_unchanged(module, classes):
            return dims == spatial + 3
    if is_unchanged(module, _DROPOUT):
        return not module.training
    if is_unchanged(module, _BATCH_NORM):
        return not module.training and module.running_mean is not None
    if is_unchanged(module, (nn.Flatten,)):
        return module.start_dim >= 1
    if is_unchanged(module, (nn.Unflatten,)):
        return isinstance(module.dim, int) and module.dim >= 1
    if is_unchanged(module, (nn.LayerNorm,)):
        return len(module.normalized_shape) <= dims - 2
    return is_unchanged(module, _PER_SAMPLE)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes ``x @ weight.T + bias`` and nothing else; parametrized weights are fine."""
    return is_unchanged(module, (nn.Linear,)) and not has_hooks(module)


def keeps_events(
    module: nn.Module, train: SpikeTrain | None = None, per_step: bool = True
) -> SpikeTrain | bool:
    """Whether the module at most reshapes; with a train, the reshaped train (or False)."""
    still = is_unchanged(module, (nn.Identity,)) or (is_unchanged(module, _DROPOUT) and not module.training)
    if has_hooks(module) or not (still or is_unchanged(module, (nn.Flatten, nn.Unflatten))):
        return False
    if train is None or still:
        return True if train is None else train
    # what the module does to the shape, seen on a tensor without data
    outer = (3,) if per_step else (2, 3)
    shape = module(torch.empty(*outer, *train.shape[2:], device="meta")).shape
    if tuple(shape[: len(outer)]) != outer or len(shape) == len(outer):
        return False
    return train.view(*shape[len(outer) :])


def is_unchanged(module: nn.Module | None, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of one of these classes; a subclass counts if it did not touch forward, as torch's parametrized
    ones."""
    for cls in classes:
        if isinstance(module, cls):
            return type(module).forward is cls.forward and "forward" not in vars(module)
    return False
