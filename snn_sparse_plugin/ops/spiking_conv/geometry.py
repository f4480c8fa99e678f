"""What a call of a convolution says about shapes, checked and in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...core.convolution import Convolution, Pool
from ...core.errors import InputError

Size = int | Sequence[int]
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def pool_of(given: Any, dims: int) -> Pool | None:
    """A pool given as a module of torch's, as :class:`Pool` or not at all; None where there is none.

    Raises:
        InputError: another module, or a pool of another number of dimensions.
    """
    if given is None or isinstance(given, Pool):
        pool = given
    elif isinstance(given, _MAX[dims - 1]) and not given.return_indices:
        options: tuple[Any, ...] = (given.stride, given.padding, given.dilation, given.ceil_mode)
        pool = max_pool(dims, given.kernel_size, *options)
    elif isinstance(given, _AVERAGE[dims - 1]):
        options = (given.ceil_mode, given.count_include_pad, getattr(given, "divisor_override", None))
        pool = average_pool(dims, given.kernel_size, given.stride, given.padding, *options)
    else:
        raise InputError(
            f"pool is a MaxPool{dims}d, without return_indices, or an AvgPool{dims}d of torch's, got {given!r}."
        )
    if pool is not None and len(pool.kernel) != dims:
        raise InputError(f"a pool of {len(pool.kernel)} dimensions behind a convolution of {dims}.")
    return pool


def max_pool(
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pool | None:
    """The pool of ``F.max_pool1d``, ``2d`` or ``3d`` with these arguments; None for one that returns indices."""
    if return_indices:
        return None
    kernel = sizes(kernel_size, dims, "kernel_size")
    step = kernel if stride is None else sizes(stride, dims, "stride")
    return Pool(
        "max",
        kernel,
        step,
        sizes(padding, dims, "padding"),
        sizes(dilation, dims, "dilation"),
        bool(ceil_mode),
    )


def average_pool(
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Pool:
    """The pool of ``F.avg_pool1d``, ``2d`` or ``3d`` with these arguments."""
    kernel = sizes(kernel_size, dims, "kernel_size")
    step = kernel if stride is None or stride == () else sizes(stride, dims, "stride")
    return Pool(
        "avg",
        kernel,
        step,
        sizes(padding, dims, "padding"),
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad),
        divisor_override=divisor_override,
    )


def sizes(x: Any, dims: int, what: str) -> tuple[int, ...]:
    """One whole number for each dimension.

    Raises:
        InputError: another number of them.
    """
    found = (int(x),) if isinstance(x, int) else tuple(int(n) for n in x)
    if len(found) == 1:
        found *= dims
    if len(found) != dims:
        raise InputError(f"{what} has {len(found)} entries for a convolution of {dims} dimensions: {x!r}.")
    return found


def equal_padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...] | None:
    """How many zeros stand on either side; None where ``"same"`` puts more on one side than on the other."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding != "same":
        return sizes(padding, len(kernel), "padding")
    both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return None if any(n % 2 for n in both) else tuple(n // 2 for n in both)


def geometry(
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    pool: Any,
    name: str,
) -> Convolution:
    """The convolution of an input (T, B, C, *size), a Tensor or a SpikeTrain, with a weight (C', C / groups, *kernel).

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    if not isinstance(weight, Tensor) or not 3 <= weight.dim() <= 5:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(
            f"{name}: the weight of a convolution is (C', C / groups, *kernel) with one to three dimensions of a "
            f"kernel, got {shape}."
        )
    dims, kernel = weight.dim() - 2, tuple(weight.shape[2:])
    if len(x.shape) != dims + 3:
        raise InputError(
            f"{name}: a {dims}-dimensional convolution over all steps takes (T, B, C{', size' * dims}), "
            f"got {tuple(x.shape)}."
        )
    step, widen = sizes(stride, dims, "stride"), sizes(dilation, dims, "dilation")
    around = equal_padding(padding, kernel, widen)
    if around is None:
        raise InputError(
            f"{name}: padding='same' of an even kernel {kernel} puts one zero more at the end; pad with F.pad first."
        )
    C, size = x.shape[2], tuple(x.shape[3:])
    if weight.shape[1] * groups != C or weight.shape[0] % groups or groups < 1:
        raise InputError(
            f"{name}: an input of {C} channels, a weight {tuple(weight.shape)} and {groups} group(s) do not fit."
        )
    if any(n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, around, widen, kernel, strict=True)):
        raise InputError(
            f"{name}: the kernel {kernel} is larger than the padded map "
            f"{tuple(n + 2 * p for n, p in zip(size, around, strict=True))}."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise InputError(
            f"{name}: bias has shape {tuple(bias.shape)}, the weight has {weight.shape[0]} rows."
        )
    for label, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise InputError(
                f"{name}: {label} is {other.dtype} on {other.device}, the input {x.dtype} on {x.device}."
            )
    return Convolution(C, weight.shape[0], size, kernel, step, around, widen, groups, pool_of(pool, dims))
