"""What a spiking network has to be before anything is indexed with it: by hand, from a file, or from :func:`to_snn`.

:func:`check_stage` looks at shapes and sizes only, so that every simulation can afford it; values are looked at once,
where they come from a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...ops.ttfs import MAX_WINDOW
from .stages import Pair, Pool, Stage

_FAR = 64  # padding that is always taken; more makes neurons that no spike reaches, in any number
_MOST = 2**31 - 1  # neurons of a layer and steps in its memory: what int32 counts


def check_network(encoder: Any, stages: Any, input_shape: Any) -> None:
    """Everything but values: the layers one by one, and that each takes what the one before it passes on.

    Raises:
        InputError: what does not fit, by layer.
    """
    check_order(encoder, stages)
    _sizes("the network's input", input_shape)
    arriving = tuple(input_shape)
    for stage in stages:
        arriving = check_stage(stage, arriving, encoder)


def check_order(encoder: Any, stages: Any) -> None:
    """Raise :class:`InputError` unless there are layers with names of their own, and only the last one is a readout."""
    _table("the encoder", encoder)
    if not isinstance(stages, list) or not stages or not all(isinstance(s, Stage) for s in stages):
        raise InputError("a spiking network has a list of one stage or more.")
    names = [stage.name for stage in stages]
    if not all(isinstance(name, str) for name in names) or len({"input", *names}) <= len(names):
        raise InputError(f"layers have names of their own, other than 'input', got {_shown(names)}.")
    for stage in stages[:-1]:
        if stage.table is None:
            raise InputError(
                f"layer {_shown(stage.name)} has no thresholds, and only the last layer is read as membrane."
            )


def check_stage(stage: Stage, arriving: Sequence[int], like: Tensor) -> tuple[int, ...]:
    """Shapes, dtypes and sizes of a layer that takes spikes of ``arriving``; returns the shape that it passes on.

    ``like`` has the dtype and the device of all tensors of the network.

    Raises:
        InputError: what does not fit, and in which layer.
    """
    name = f"layer {_shown(stage.name)}"
    _sizes(f"{name}: in_shape", stage.in_shape)
    _sizes(f"{name}: out_shape", stage.out_shape)
    for what in ("stride", "dilation", "padding"):
        _pair(f"{name}: {what}", getattr(stage, what), 0 if what == "padding" else 1)
    if math.prod(arriving) != math.prod(stage.in_shape):
        raise InputError(f"{name} takes spikes {tuple(stage.in_shape)}, and {tuple(arriving)} arrive.")
    _tensor(f"{name}: weight", stage.weight, like)
    pooled = tuple(stage.in_shape)
    for k, pool in enumerate(_pools(name, stage.before)):
        if pool.kind == "avg" and k < len(stage.before) - 1:
            raise InputError(f"{name}: an average pooling is the last one before the synapses.")
        pooled = _behind(name, pool, pooled)
    expected = _convolved(name, stage, pooled) if stage.conv else _multiplied(name, stage, pooled)
    if tuple(stage.out_shape) != expected:
        raise InputError(f"{name}: out_shape is {tuple(stage.out_shape)}, and its weight gives {expected}.")
    if stage.bias is not None:
        _tensor(f"{name}: bias", stage.bias, like)
        if stage.bias.shape != stage.weight.shape[:1]:
            raise InputError(f"{name}: bias is {tuple(stage.bias.shape)}, expected ({len(stage.weight)},).")
    if stage.table is not None:
        _table(f"{name}: table", stage.table, like)
    if not isinstance(stage.flatten_after, bool):
        raise InputError(f"{name}: flatten_after is True or False, got {_shown(stage.flatten_after)}.")
    passed = expected
    for pool in _pools(name, stage.after):
        if pool.kind != "max":
            raise InputError(f"{name}: only a max pooling can follow the neurons, got {pool.kind!r}.")
        passed = _behind(name, pool, passed)
    return (math.prod(passed),) if stage.flatten_after else passed


def check_arriving(times: Any, values: Any) -> None:
    """Raise :class:`InputError` unless spike times (B, …) are uint8 and ``values`` are those of at most 255 steps."""
    if not isinstance(times, Tensor) or times.dtype != torch.uint8 or times.dim() < 2:
        what = f"{times.dtype} {tuple(times.shape)}" if isinstance(times, Tensor) else type(times).__name__
        raise InputError(f"spike times are uint8 (B, N…), got {what}.")
    if values.dim() != 1 or not 1 <= len(values) <= MAX_WINDOW or values.device != times.device:
        raise InputError(
            f"spikes have values by step, (1…{MAX_WINDOW},) on {times.device}, got {tuple(values.shape)} on "
            f"{values.device}."
        )


def check_values(encoder: Tensor, stages: Sequence[Stage]) -> None:
    """Raise :class:`InputError` where weights are not finite, or thresholds and values do not fall to above 0."""
    tensors = [("the encoder", encoder)]
    for stage in stages:
        parts = (("weight", stage.weight), ("bias", stage.bias), ("table", stage.table))
        tensors += [
            (f"layer {_shown(stage.name)}: {what}", tensor) for what, tensor in parts if tensor is not None
        ]
    for what, tensor in tensors:
        # a view of a few numbers can have any shape
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{what} repeats its numbers, expected one for each element.")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{what} has NaN or infinite values.")
    for what, table in tensors:
        if what.endswith(("encoder", "table")) and not bool((table > 0).all() and (table.diff() <= 0).all()):
            raise InputError(f"{what}: thresholds and values fall from step to step, and stay above 0.")


def _shown(value: Any) -> str:
    """A wrong value in one short line; a file may hold anything."""
    return type(value).__name__ if isinstance(value, Tensor) else " ".join(repr(value)[:80].split())


def _tensor(what: str, tensor: Any, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise InputError(f"{what} is a dense tensor, got {type(tensor).__name__}.")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise InputError(
            f"{what} is {tensor.dtype} on {tensor.device}, and the network's encoder is {like.dtype} on {like.device}."
        )


def _table(what: str, table: Any, like: Tensor | None = None) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.is_meta:
        raise InputError(
            f"{what} holds thresholds and values, floating (2, window), got {type(table).__name__}."
        )
    _tensor(what, table, table if like is None else like)
    if table.dim() != 2 or len(table) != 2 or not 2 <= table.shape[1] <= MAX_WINDOW:
        raise InputError(f"{what} is {tuple(table.shape)}, expected (2, window), 2…{MAX_WINDOW} steps.")


def _sizes(what: str, shape: Any) -> None:
    fits = isinstance(shape, (tuple, list)) and all(_whole(n, 1) for n in shape) and len(shape)
    if not fits or math.prod(shape) > _MOST:
        raise InputError(f"{what} is a shape of 1 to {_MOST} neurons, got {_shown(shape)}.")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _pair(what: str, pair: Any, least: int) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(_whole(n, least) for n in pair):
        raise InputError(f"{what} is a pair of whole numbers from {least} on, got {_shown(pair)}.")


def _pools(name: str, pools: Any) -> list[Pool]:
    if not isinstance(pools, list) or not all(isinstance(p, Pool) for p in pools):
        raise InputError(f"{name}: poolings are a list of Pool, got {_shown(pools)}.")
    for pool in pools:
        for what in ("kernel", "stride", "dilation", "padding"):
            _pair(f"{name}: {what} of a pooling", getattr(pool, what), 0 if what == "padding" else 1)
        if pool.kind == "avg":
            fits = tuple(pool.stride) == tuple(pool.kernel) and tuple(pool.padding) == (0, 0)
            fits = fits and tuple(pool.dilation) == (1, 1) and not pool.ceil
        else:
            fits = pool.kind == "max" and all(
                2 * p <= k for p, k in zip(pool.padding, pool.kernel, strict=True)
            )
        if not fits or not isinstance(pool.ceil, bool):
            raise InputError(
                f"{name}: a pooling is max, padded by half its kernel at most, or avg of windows side by side; "
                f"got {_shown(pool)}."
            )
    return pools


def _behind(name: str, pool: Pool, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape behind a pooling."""
    if len(shape) not in (2, 3):
        raise InputError(f"{name}: a pooling takes images, got neurons of shape {shape}.")
    axes = zip(shape[-2:], pool.kernel, pool.stride, pool.padding, pool.dilation, strict=True)
    return shape[:-2] + tuple(_windows(name, *axis, pool.ceil) for axis in axes)


def _windows(
    name: str, size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False
) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:  # as torch: no window begins behind the end
        count -= 1
    if count < 1:
        raise InputError(
            f"{name}: a window of {kernel} (dilation {dilation}) does not fit into {size} neurons."
        )
    return count


def _convolved(name: str, stage: Stage, arriving: tuple[int, ...]) -> tuple[int, ...]:
    out, per_group, *kernel = stage.weight.shape
    if not _whole(stage.groups, 1) or out % stage.groups:
        raise InputError(
            f"{name}: groups is {_shown(stage.groups)}, expected a divisor of its {out} channels."
        )
    if len(arriving) != 3 or arriving[0] != per_group * stage.groups or not stage.weight.numel():
        raise InputError(
            f"{name}: weight {tuple(stage.weight.shape)} in {stage.groups} groups takes (channels, rows, columns) of "
            f"{per_group * stage.groups} channels, got {arriving}."
        )
    pairs: tuple[Pair, ...] = (tuple(kernel), stage.stride, stage.padding, stage.dilation)  # type: ignore[assignment]
    axes = list(zip(arriving[1:], *pairs, strict=True))
    for size, taps, _, padding, dilation in axes:
        if padding > max(_FAR, size + dilation * (taps - 1)):
            raise InputError(
                f"{name}: a padding of {padding} is wider than its {size} neurons and the kernel together."
            )
    return (out, *(_windows(name, *axis) for axis in axes))


def _multiplied(name: str, stage: Stage, arriving: tuple[int, ...]) -> tuple[int, ...]:
    if stage.weight.dim() != 2 or not stage.weight.numel() or stage.weight.shape[1] != math.prod(arriving):
        raise InputError(
            f"{name}: weight is {tuple(stage.weight.shape)}, expected (neurons, {math.prod(arriving)}) for the spikes "
            f"{arriving} that reach it."
        )
    return (stage.weight.shape[0],)
