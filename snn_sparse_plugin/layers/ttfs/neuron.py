"""The time-to-first-spike layer: an activation that travels as at most one spike per neuron."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.config import current_config
from ...core.errors import ConfigError, InputError
from ...core.precision import state_dtype
from ...ops.ttfs import (
    MAX_WINDOW,
    ROUNDINGS,
    check_pre_activation,
    get_kernel,
    spike_table,
    ttfs,
    under_torch_func,
)

_RANGE = 64.0  # e-foldings a kernel may fall within its window: e^-64 is far from float32's smallest number


class TTFS(nn.Module):
    """Time-to-first-spike activation, in place of ``nn.ReLU``.

    A value x becomes the first step t of a window at which it reaches the falling threshold
    ``eps_t = exp(-(t - t_d) / tau)``, and is read as ``eps_t``; smaller ones than the last threshold do not fire and
    are 0. Gradients pass straight through the rounding of t (Park & Yoon, arXiv 2106.02568). The cost of training
    does not depend on the number of steps; :func:`to_snn` gives the network that spikes at these times.

    Args:
        window: T, steps in the window, 2…255.
        tau: time constant in steps, > 0. It is kept above ``tau_floor``, at which the kernel would fall by e^-64,
            by a softplus.
        t_d: delay in steps: ``exp(t_d / tau)`` is the largest value that a spike can stand for.
        train_kernel: whether tau and t_d are parameters.
        rounding: ``"ceil"``: the threshold is the value; ``"nearest"``, ``"floor"``: it runs half a step or a step
            ahead.
        kernel: ``"exp"``, ``"power-of-two"``, ``"linear"``, or one given to :func:`register_kernel`.
        backend: a backend by name; ``""`` takes that of the active sparse mode.

    Shape:
        any, floating, in and out. NaN stays NaN.

    Raises:
        ConfigError: an option outside its range.

    Example:
        >>> TTFS(window=32)(torch.tensor([2.0, 0.5, 0.01, -1.0])).detach()
        tensor([1.0000, 0.4966, 0.0000, 0.0000])
    """

    relax_probability: Tensor
    tau_raw: Tensor
    tau_fixed: Tensor
    t_d: Tensor

    def __init__(
        self,
        window: int = 32,
        tau: float = 10.0,
        t_d: float = 0.0,
        train_kernel: bool = True,
        rounding: str = "ceil",
        kernel: str = "exp",
        *,
        backend: str = "",
    ) -> None:
        super().__init__()
        if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= MAX_WINDOW:
            raise ConfigError(
                f"window must be a whole number of steps from 2 to {MAX_WINDOW}, got {window!r}."
            )
        if not (isinstance(tau, int | float) and math.isfinite(tau) and tau > 0):
            raise ConfigError(f"tau must be a finite number of steps > 0, got {tau!r}.")
        if not (isinstance(t_d, int | float) and math.isfinite(t_d)):
            raise ConfigError(f"t_d must be a finite number of steps, got {t_d!r}.")
        if rounding not in ROUNDINGS:
            raise ConfigError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}.")
        rate = get_kernel(kernel).rate
        self.window, self.rounding, self.kernel, self.backend = window, rounding, kernel, backend
        self.tau_init, self.t_d_init = float(tau), float(t_d)
        self.tau_floor = (rate or 1.0) * (window - 1) / _RANGE
        if tau <= self.tau_floor:
            raise ConfigError(
                f"tau = {tau} falls by more than e^{_RANGE:.0f} within {window} steps: take tau > {self.tau_floor:.3g}."
            )
        if rate == 0 and tau <= window - 1 - t_d:
            raise ConfigError(
                f"a linear kernel with tau = {tau}, t_d = {t_d} is negative before step {window}: "
                f"take tau > {window - 1 - t_d:g}."
            )
        self.train_kernel = train_kernel
        above = tau - self.tau_floor
        raw = torch.tensor(above + math.log(-math.expm1(-above)))  # softplus(raw) = above
        if train_kernel:
            self.tau_raw = nn.Parameter(raw)
            self.t_d = nn.Parameter(torch.tensor(float(t_d)))
        else:
            self.register_buffer("tau_fixed", torch.tensor(float(tau)))
            self.register_buffer("t_d", torch.tensor(float(t_d)))
        self.register_buffer("relax_probability", torch.zeros(()))
        # the same number where it can be read without waiting for a device; a graph reads the flag alone, so that it
        # is not compiled anew for every number
        self._relax, self._relaxing = 0.0, False

    @property
    def tau(self) -> Tensor:
        """The time constant in steps, 0-dimensional, positive."""
        if not self.train_kernel:
            return self.tau_fixed
        return F.softplus(self.tau_raw) + self.tau_floor

    @property
    def drifted(self) -> bool:
        """Whether training has brought tau within a tenth of its floor: few values then have different spike times."""
        return self.train_kernel and float(self.tau.detach()) < 1.1 * self.tau_floor

    def table(self, dtype: torch.dtype | None = None) -> Tensor:
        """Thresholds and values of every step, (2, window), falling; what layer and simulator both compare with."""
        return self._table(self.tau, dtype or self.t_d.dtype)

    def _table(self, tau: Tensor, dtype: torch.dtype) -> Tensor:
        kernel = get_kernel(self.kernel)
        return spike_table(kernel, self.window, tau, self.t_d, rounding=self.rounding, dtype=dtype)

    @property
    def x_M(self) -> float:
        """The largest value that a spike can stand for."""
        return float(self.table()[1, 0])

    @property
    def x_m(self) -> float:
        """The smallest value that fires."""
        return float(self.table()[0, -1])

    def set_relaxation(self, probability: float) -> None:
        """How often a training step uses plain ReLU instead; see :class:`RelaxationSchedule`."""
        if not 0 <= probability <= 1:
            raise ConfigError(f"a probability lies in [0, 1], got {probability!r}.")
        self._relax, self._relaxing = float(probability), probability > 0
        self.relax_probability.fill_(self._relax)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.relax_probability.device.type != "meta":
            self._relax = float(self.relax_probability)
            self._relaxing = self._relax > 0

    def forward(self, x: Tensor) -> Tensor:
        check_pre_activation(x)
        compiling = torch.compiler.is_compiling()
        relaxed = self.training and self._relaxing
        if relaxed and not compiling and torch.rand(()) < self._relax:
            return F.relu(x)
        tau, t_d = self.tau, self.t_d
        dtype = state_dtype(x.dtype)
        out, _ = ttfs(x, self._table(tau, dtype), tau, t_d, kernel=self.kernel, backend=self.backend)
        if relaxed and compiling:  # a graph cannot branch on a random number
            draw = torch.rand((), device=x.device)
            out = torch.where(draw < self.relax_probability, F.relu(x), out)
        return out

    def extra_repr(self) -> str:
        kernel = "" if self.kernel == "exp" else f", kernel={self.kernel!r}"
        rounding = "" if self.rounding == "ceil" else f", rounding={self.rounding!r}"
        fixed = "" if self.train_kernel else ", train_kernel=False"
        if self.t_d.device.type == "meta":
            return f"window={self.window}{fixed}{rounding}{kernel}"
        tau, t_d = float(self.tau.detach()), float(self.t_d.detach())
        return f"window={self.window}, tau={tau:.4g}, t_d={t_d:.4g}{fixed}{rounding}{kernel}"


class TTFSEncoder(TTFS):
    """Intensities in [0, 1] as spike times, by the rule of :class:`TTFS`: the first layer of a network.

    Args: as :class:`TTFS`; the kernel is not trained unless asked for.

    Raises:
        InputError: intensities outside [0, 1] or NaN. On a GPU looked for under ``sparse_mode(check=True)`` only, and
            under ``torch.compile`` and ``torch.func`` not at all.

    Example:
        >>> TTFSEncoder(window=32)(torch.tensor([1.0, 0.5, 0.0]))
        tensor([1.0000, 0.4966, 0.0000])
    """

    def __init__(
        self,
        window: int = 32,
        tau: float = 10.0,
        t_d: float = 0.0,
        train_kernel: bool = False,
        rounding: str = "ceil",
        kernel: str = "exp",
        *,
        backend: str = "",
    ) -> None:
        super().__init__(window, tau, t_d, train_kernel, rounding, kernel, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        check_pre_activation(x)
        check_intensities(x)
        return super().forward(x)


def check_intensities(x: Tensor, always: bool = False) -> None:
    """Raise :class:`InputError` unless every intensity lies in [0, 1]."""
    if torch.compiler.is_compiling() or under_torch_func() or not x.numel():
        return
    if not (always or x.device.type == "cpu" or current_config().check):
        return
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if math.isnan(low) or math.isnan(high):
        raise InputError("TTFSEncoder: the intensities have NaN values.")
    if low < 0 or high > 1:
        raise InputError(
            f"TTFSEncoder takes intensities in [0, 1], got {low:.4g}…{high:.4g}: scale the images, and do not "
            "normalise them by mean and deviation."
        )


class TTFSReadout(nn.Linear):
    """The output layer: no spikes, its membrane after the last window is read. An ``nn.Linear`` by another name.

    Example:
        >>> TTFSReadout(64, 10)
        TTFSReadout(in_features=64, out_features=10, bias=True)
    """


class TTFSMaxPool2d(nn.MaxPool2d):
    """Max pooling of spike times: the earliest spike passes. On decoded values that is the largest, as here.

    Example:
        >>> TTFSMaxPool2d(2)(torch.tensor([[[[0.9, 0.1], [0.0, 0.5]]]]))
        tensor([[[[0.9000]]]])
    """
