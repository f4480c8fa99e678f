"""Batch norm by running statistics behind a convolution: a scale and a shift of each channel.

They are applied to what the convolution made, as torch does, and not put into the weights: so spikes stay bit-equal to
upstream's wherever the convolution's sums are exact, whatever the statistics. In the backward they are in the weights.
Maps that torch convolves are torch's to normalise, too: on a device it rounds in another order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import InputError

Factors = tuple[Tensor, Tensor]
"""Scale and shift, (C',) each."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Norm(NamedTuple):
    """The arguments of a batch norm in eval mode. Tensors, or placeholders of a recorded call."""

    mean: Any
    var: Any
    weight: Any
    bias: Any
    eps: float

    def factors(self) -> Factors:
        """As torch rounds them: what its batch norm makes of 1, without a mean, and of 0."""
        like = self.mean.new_zeros(1, len(self.mean))
        scale = F.batch_norm(like + 1, like[0], self.var, self.weight, None, eps=self.eps)
        shift = F.batch_norm(like, self.mean, self.var, self.weight, self.bias, eps=self.eps)
        return scale[0], shift[0]

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor) -> Norm:
        """The batch norm that has these factors."""
        return cls(torch.zeros_like(shift), torch.ones_like(scale), scale, shift, 0.0)

    def of_maps(self, x: Tensor) -> Tensor:
        """Of maps (rows, C', *map), by torch's batch norm."""
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=self.eps)


def norm_of(given: Any, dims: int, name: str) -> Norm | None:
    """A batch norm given as a module of torch's, as :class:`Norm` or not at all.

    Raises:
        InputError: another module, one of another number of dimensions, or in train mode or without running statistics.
    """
    if given is None or isinstance(given, Norm):
        return given
    if not isinstance(given, NORMS[dims - 1]):
        raise InputError(f"{name}: norm is a BatchNorm{dims}d of torch's, got {given!r}.")
    if given.training or given.running_mean is None:
        raise InputError(
            f"{name}: {given!r} normalises each batch by its own statistics; in eval mode and with running "
            f"statistics it can stand here, else call it on the current of all steps."
        )
    return Norm(given.running_mean, given.running_var, given.weight, given.bias, given.eps)


def check_norm(norm: Norm | None, weight: Tensor, name: str) -> None:
    """Whether it is one of the channels of a convolution with this weight.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    if norm is None:
        return
    for label, x in (("mean", norm.mean), ("var", norm.var), ("weight", norm.weight), ("bias", norm.bias)):
        if x is not None and (x.shape, x.dtype, x.device) != (weight.shape[:1], weight.dtype, weight.device):
            raise InputError(
                f"{name}: {label} of the batch norm is {x.dtype} of shape {tuple(x.shape)} on {x.device}, the "
                f"convolution has {len(weight)} channels of {weight.dtype} on {weight.device}."
            )


def of_channels(factor: Tensor, like: Tensor) -> Tensor:
    """A factor of each channel, to be multiplied with a weight (C', ...)."""
    return factor.view(-1, *[1] * (like.dim() - 1))


def apart(
    g_weight: Tensor | None, g_bias: Tensor | None, weight: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and scale from those of the scaled weight and of the shift: a convolution is linear, so
    what its output would be multiplied with is the product of weights and their gradient."""
    if g_weight is None:
        return None, None if g_bias is None else g_bias * scale, None
    of_scale = (weight * g_weight).flatten(1).sum(1)
    if bias is not None and g_bias is not None:
        of_scale += bias * g_bias
    return g_weight * of_channels(scale, weight), None if g_bias is None else g_bias * scale, of_scale
