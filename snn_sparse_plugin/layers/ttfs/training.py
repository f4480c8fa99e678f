"""How TTFS networks are trained: stochastic relaxation, kernel and spike regularisation (Park & Yoon, 2106.02568)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.errors import ConfigError
from .neuron import TTFS, TTFSEncoder

FORMS = ("paper", "gaussian")


class _Paired(_BatchNorm):
    _partner: tuple[TTFS, ...] = ()

    def feeds(self, neuron: TTFS) -> Any:
        """Say which layer this normalisation feeds, where the order of the modules does not; returns itself."""
        self._partner = (neuron,)  # in a tuple, so that it does not become a child
        return self


class TTFSBatchNorm1d(_Paired, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose scale and shift :func:`spike_regularization` acts on."""


class TTFSBatchNorm2d(_Paired, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose scale and shift :func:`spike_regularization` acts on.

    It belongs to the next :class:`TTFS` in the order of ``model.modules()``; ``norm.feeds(neuron)`` says otherwise.

    Example:
        >>> neuron = TTFS()
        >>> norm = TTFSBatchNorm2d(8).feeds(neuron)
    """


def hidden_layers(model: nn.Module) -> list[tuple[str, TTFS]]:
    """The TTFS layers of a model but for encoders, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, TTFS) and not isinstance(module, TTFSEncoder)
    ]


def warn_of_drift(name: str, layer: TTFS) -> None:
    """Warn that training has brought tau close to its floor."""
    warnings.warn(
        f"{name or 'TTFS'}: tau has fallen to {float(layer.tau.detach()):.3g}, its floor is "
        f"{layer.tau_floor:.3g} steps; add kernel_regularization or lower the learning rate of tau_raw.",
        stacklevel=3,
    )


def kernel_parameters(model: nn.Module) -> dict[str, tuple[float, float]]:
    """(tau, t_d) in steps of every TTFS layer but encoders, by name: one a epoch is what ``plot.ttfs_kernels`` draws.

    Example:
        >>> kernel_parameters(nn.Sequential(nn.Linear(4, 4), TTFS(tau=5.0)))
        {'1': (5.0, 0.0)}
    """
    return {
        name: (float(layer.tau.detach()), float(layer.t_d.detach())) for name, layer in hidden_layers(model)
    }


class RelaxationSchedule:
    """Stochastic relaxation: in epoch e each layer is a plain ReLU in a share ``1 - e / target`` of training steps.

    Call :meth:`step` at the end of every epoch. The probability of each layer is part of the model's
    ``state_dict``, the epoch of the schedule's own.

    Args:
        model: holds :class:`TTFS` layers.
        target: the epoch from which on every step is TTFS, >= 0.

    Raises:
        ConfigError: a negative target, or a model without TTFS layers.

    Example:
        >>> schedule = RelaxationSchedule(nn.Sequential(nn.Linear(4, 4), TTFS()), target=10)
        >>> schedule.step()
        >>> schedule.probability
        0.9
    """

    def __init__(self, model: nn.Module, target: int) -> None:
        if isinstance(target, bool) or not isinstance(target, int) or target < 0:
            raise ConfigError(f"target must be a number of epochs >= 0, got {target!r}.")
        self.layers = hidden_layers(model)
        if not self.layers:
            raise ConfigError("RelaxationSchedule: the model has no TTFS layer.")
        self.target, self.epoch = target, 0
        self._warned: set[str] = set()
        self._apply()

    @property
    def probability(self) -> float:
        return max(0.0, 1 - self.epoch / self.target) if self.target else 0.0

    def step(self) -> None:
        """An epoch has ended. Also warns, once per layer, where training drives tau to its floor."""
        self.epoch += 1
        self._apply()
        for name, layer in self.layers:
            if layer.drifted and name not in self._warned:
                self._warned.add(name)
                warn_of_drift(name, layer)

    def _apply(self) -> None:
        for _, layer in self.layers:
            layer.set_relaxation(self.probability)

    def __repr__(self) -> str:
        return f"RelaxationSchedule(epoch={self.epoch}, target={self.target}, probability={self.probability:.3g})"

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "target": self.target, "probability": self.probability}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.target = state["epoch"], state["target"]
        self._apply()


def kernel_regularization(model: nn.Module) -> Tensor:
    """TR: ``Σ_layers (tau - tau_0)² + (t_d - t_d0)²`` against the values the layers were made with; a scalar.

    Example:
        >>> float(kernel_regularization(nn.Sequential(TTFS(tau=10.0))).detach()) < 1e-9
        True
    """
    total: Tensor | None = None
    for module in model.modules():
        if isinstance(module, TTFS) and module.train_kernel:
            term = (module.tau - module.tau_init) ** 2 + (module.t_d - module.t_d_init) ** 2
            total = term if total is None else total + term
    return _zero(model) if total is None else total


def spike_regularization(model: nn.Module, form: str = "paper") -> Tensor:
    """TB: how likely neurons behind a batch normalisation fire, from its scale g and shift s; a scalar.

    With the layer's smallest firing value x_m, summed over channels and layers:

        paper      -(x_m - s + s³(g²/6 + g/2 + 1/2) - x_m s²/2 - x_m² s g/2 - x_m³ g²/6)
        gaussian   1 - Phi((x_m - s) / |g|), the share of normal pre-activations that fire

    The paper's polynomial is an expansion around s = 0: beyond s of about 1 it rewards larger shifts, the Gaussian
    does not. The gradient reaches g and s alone.

    Raises:
        ConfigError: another form, or no batch normalisation with scale and shift before any TTFS layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), TTFSBatchNorm1d(3), TTFS())
        >>> 0 < float(spike_regularization(model, "gaussian").detach()) < 3
        True
    """
    if form not in FORMS:
        raise ConfigError(f"spike_regularization has the forms {', '.join(FORMS)}, got {form!r}.")
    total: Tensor | None = None
    for norm, neuron in _pairs(model):
        g, s = norm.weight, norm.bias
        x_m = neuron.table(g.dtype)[0, -1].detach()
        if form == "paper":
            cubic = s**3 * (g**2 / 6 + g / 2 + 0.5)
            mixed = x_m * s**2 / 2 + x_m**2 * s * g / 2 + x_m**3 * g**2 / 6
            term = -(x_m - s + cubic - mixed).sum()
        else:
            width = g.abs().clamp(min=torch.finfo(g.dtype).tiny ** 0.5)
            term = (0.5 * torch.erfc((x_m - s) / width / math.sqrt(2))).sum()
        total = term if total is None else total + term
    if total is None:
        raise ConfigError(
            "spike_regularization: no batch normalisation with scale and shift comes before a TTFS layer."
        )
    return total


def _pairs(model: nn.Module) -> Iterator[tuple[_BatchNorm, TTFS]]:
    last: _BatchNorm | None = None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            last = module if module.affine else None
            if last is not None and isinstance(module, _Paired) and module._partner:
                yield last, module._partner[0]
                last = None
        elif isinstance(module, TTFS):
            if last is not None:
                yield last, module
            last = None
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            last = None


def _zero(model: nn.Module) -> Tensor:
    parameter = next(model.parameters(), torch.zeros(()))
    return parameter.new_zeros(())


def ttfs_loss(
    logits: Tensor,
    target: Tensor,
    model: nn.Module,
    *,
    tr: float = 0.0,
    tb: float = 0.0,
    form: str = "paper",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy + ``tr`` · :func:`kernel_regularization` + ``tb`` · :func:`spike_regularization`; a scalar.

    Args:
        logits: (B, classes), the membrane of the readout.
        target: (B,), int64.
        model: the network that made them.
        tr, tb: weights, >= 0; at 0 a term is not computed.
        form: of the spike regularisation.
        label_smoothing: of the cross entropy.

    Raises:
        ConfigError: a negative weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), TTFSBatchNorm1d(3), TTFS(), nn.Linear(3, 2))
        >>> loss = ttfs_loss(model(torch.rand(8, 4)), torch.zeros(8).long(), model, tr=1e-3, tb=0.01)
        >>> loss.shape
        torch.Size([])
    """
    if tr < 0 or tb < 0:
        raise ConfigError(f"regularisation weights are >= 0, got tr={tr}, tb={tb}.")
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    if tr:
        loss = loss + tr * kernel_regularization(model)
    if tb:
        loss = loss + tb * spike_regularization(model, form)
    return loss
