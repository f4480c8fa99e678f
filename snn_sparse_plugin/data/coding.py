"""Intensities as spike times."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.spikes import SpikeTrain, check_float


def latency(x: Tensor, tau: float = 20.0, floor: float = 0.2) -> Tensor:
    """Firing times ``tau * ln(x / (x - floor))`` of intensities, float64, in the unit of ``tau``; inf where silent."""
    bright = x.double().clamp(min=floor)
    return tau * torch.log(bright / (bright - floor))  # inf at the floor


def latency_spikes(x: Tensor, steps: int, *, tau: float = 20.0, floor: float = 0.2) -> SpikeTrain:
    """One spike per bright enough pixel, the brighter the earlier: at step ``tau * ln(x / (x - floor))``.

    The time an integrator of time constant ``tau`` needs to reach ``floor`` under the constant current ``x``
    [Perez-Nieves & Goodman 2021, Fashion-MNIST]. Pixels at or below ``floor``, and those later than the last
    step, stay silent.

    Args:
        x: intensities (B, N), floating, usually in [0, 1].
        steps: T, number of time steps.
        tau: time constant in steps.
        floor: smallest intensity that can fire, > 0.

    Returns:
        SpikeTrain (T, B, N).

    Raises:
        InputError: wrong shape, dtype, non-finite intensities, or options that are not positive.

    Example:
        >>> latency_spikes(torch.tensor([[1.0, 0.5, 0.1]]), steps=20).to_dense().nonzero().tolist()
        [[4, 0, 0], [10, 0, 1]]
    """
    check_float(x, "an image batch")
    if x.dim() != 2:
        raise InputError(
            f"latency_spikes takes intensities (B, N), got shape {tuple(x.shape)}; flatten the images."
        )
    if steps < 1 or not tau > 0 or not floor > 0:
        raise InputError(f"latency_spikes needs steps >= 1, tau > 0, floor > 0; got {steps}, {tau}, {floor}.")
    if not bool(torch.isfinite(x).all()):
        raise InputError("latency_spikes: the intensities have NaN or infinite values.")
    return single_spikes(latency(x.detach(), tau, floor).clamp(max=steps).long(), steps, x.dtype)


def single_spikes(times: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> SpikeTrain:
    """At most one spike per neuron, at the step given: whole numbers (B, N...); ``steps`` and above are silent.

    Example:
        >>> single_spikes(torch.tensor([[1, 9, 0]]), 3).to_dense().nonzero().tolist()
        [[0, 0, 2], [1, 0, 0]]
    """
    flat = times.flatten(1).long()
    sample, neuron = (flat < steps).nonzero(as_tuple=True)
    row = sample * steps + flat[sample, neuron]
    # nonzero lists the neurons of a sample in order, so a stable sort keeps them in order within a row
    order = torch.argsort(row, stable=True)
    indptr = torch.zeros(len(times) * steps + 1, dtype=torch.int32, device=times.device)
    indptr[1:] = torch.bincount(row, minlength=len(indptr) - 1).cumsum(0)
    shape = (steps, len(times), *times.shape[1:])
    return SpikeTrain(indptr, neuron[order].to(torch.int32), shape, dtype=dtype, check=False)
