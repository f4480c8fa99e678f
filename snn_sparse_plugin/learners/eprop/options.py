"""Options of :class:`EProp`, and what depends on them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError
from .scan import Filter, Jacobian

ENGINES = ("auto", "chunk", "offline", "step")
UPDATES = ("sequence", "chunk", "step")


def check_option(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless an option of EProp has one of its values."""
    if value not in allowed:
        raise ConfigError(f"EProp({name}={value!r}): one of {', '.join(map(repr, allowed))}.")


def check_options(
    engine: Any, update: Any, chunk: Any, kappa: Any, rate_reg: Any, trace_dtype: Any, feedback_decay: Any
) -> None:
    """Raise :class:`ConfigError` for an option of EProp that cannot be meant."""
    check_option("engine", engine, ENGINES)
    check_option("update", update, UPDATES)
    if not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"EProp(chunk={chunk!r}): a chunk has at least one step.")
    if not (kappa == "auto" or isinstance(kappa, int | float)):
        raise ConfigError(f'EProp(kappa={kappa!r}): a decay per step, or "auto".')
    if rate_reg is not None and not isinstance(rate_reg, FiringRate):
        raise ConfigError(f"EProp(rate_reg={rate_reg!r}): a FiringRate, or None.")
    if trace_dtype is not None and not getattr(trace_dtype, "is_floating_point", False):
        raise ConfigError(f"EProp(trace_dtype={trace_dtype}): must be a floating dtype.")
    if not 0 <= feedback_decay < 1:
        raise ConfigError(f"EProp(feedback_decay={feedback_decay}): a share lost per update, in [0, 1).")
    if engine == "offline" and update != "sequence":
        raise ConfigError('EProp(engine="offline") knows gradients at the end only: use update="sequence".')


@dataclass(frozen=True)
class FiringRate:
    """Regularisation of firing rates: every step adds ``c (fbar_t - f*)`` to what acts on a neuron's spikes.

    Args:
        c: strength.
        target_hz: the rate f* that neurons are drawn to.
        tau: time constant of the running rate fbar, which begins each sequence at the target; unit of ``dt``.
        dt: step in ms.

    Example:
        >>> FiringRate(target_hz=10).target
        0.01
    """

    c: float = 1e-3
    target_hz: float = 10.0
    tau: float = 500.0
    dt: float = 1.0

    def __post_init__(self) -> None:
        if not (self.tau > 0 and self.dt > 0 and self.target_hz >= 0):
            raise ConfigError(f"{self}: tau and dt must be positive and target_hz not negative.")

    @property
    def target(self) -> float:
        """f* in spikes per step."""
        return self.target_hz * self.dt / 1000

    @property
    def decay(self) -> float:
        return math.exp(-self.dt / self.tau)

    def follow(self, rate: Tensor | None, z: Tensor) -> Tensor:
        """The running rate after spikes ``z``, both (B, N)."""
        before = torch.full_like(z, self.target) if rate is None else rate
        return self.decay * before + (1 - self.decay) * z


def infer_filter(local: Jacobian, states: int, name: str) -> Filter:
    """The readout's memory from the local derivatives of one of its steps.

    Raises:
        ConfigError: its units differ, or it is not a linear filter.
    """
    numbers = {}
    for place, g in local.items():
        if isinstance(g, Tensor) and not bool((g == g.flatten()[0]).all()):
            raise ConfigError(
                f"kappa cannot be inferred: the decays of readout {name} differ between its units, or change with its "
                "state. Give kappa=, or a readout without reset."
            )
        numbers[place] = float(g.flatten()[0] if isinstance(g, Tensor) else g)
    rows = [[numbers.get((row, column), 0.0) for column in range(states + 1)] for row in range(states + 1)]
    same = [k for k in range(states) if rows[k + 1] == rows[0]]
    if not same:
        raise ConfigError(
            f"kappa cannot be inferred: the output of readout {name} is none of its states. Give kappa=."
        )
    if rows[0][0] == 0:
        raise ConfigError(
            f"kappa cannot be inferred: readout {name} answers a current only in the step after it. Give the output of "
            "the same step to the loss, or use eprop.detached(model)."
        )
    table = torch.tensor(rows[1:], dtype=torch.float64)
    return Filter(table[:, 1:], table[:, 0], same[0])


def same_filter(local: Jacobian, states: int, name: str, expected: Filter) -> None:
    """Raise :class:`ConfigError` unless the readout still is the filter that was inferred."""
    found = infer_filter(local, states, name)
    if not (torch.equal(found.A, expected.A) and torch.equal(found.b, expected.b)):
        raise ConfigError(
            f"kappa cannot be inferred: readout {name} is not the same linear filter at every step. "
            "Give kappa=, or a readout without reset."
        )


def one_pole(kappa: float) -> Filter:
    """``r_t = kappa r_{t-1} + z_t``"""
    if not 0 <= kappa < 1:
        raise ConfigError(f"EProp(kappa={kappa}): a decay lies in [0, 1).")
    if kappa == 0:
        return Filter(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    return Filter(torch.tensor([[kappa]], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
