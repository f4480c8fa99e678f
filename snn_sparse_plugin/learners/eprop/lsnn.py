"""LIF and adaptive LIF neurons of Bellec et al. (Nat. Commun. 11:3625, 2020), mixed in one recurrent layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.base import Neuron
from ...core.equations import Equations
from ...core.errors import ConfigError, InputError
from ...core.spikes import SpikeTrain
from ...core.surrogates import Surrogate
from ...ops.spiking_layer import spiking_layer

# the step of LSNN.forward, for the fused op
_EQUATIONS = Equations(
    """
    v = alpha * v + (x + rec) - v_th * detach(z)
    z = spike(((v - v_th) - beta * a) / v_th) * above(0.5 - r)
    a = rho * a + z
    r = detach(z) * refractory + (1 - detach(z)) * relu(r - 1)
    s = z
    """,
    ("v", "a", "r", "z"),
)


class LSNNState(NamedTuple):
    """State of :class:`LSNN` between steps, each (B, N).

    ``z`` are the last spikes, ``v`` the membrane, ``a`` the adaptation that the next step sees, ``r`` the steps of
    refractoriness left.
    """

    z: Tensor
    v: Tensor
    a: Tensor
    r: Tensor


class LSNN(nn.Module):
    """One step of a recurrent layer of LIF and adaptive LIF neurons::

        v_t = alpha v_{t-1} + W_in x_t + W_rec z_{t-1} - v_th z_{t-1}        (the reset is detached)
        z_t = H(v_t - v_th - beta a_t),  0 while refractory
        a_{t+1} = rho a_t + z_t
        dz/dv = gamma_pd / v_th max(0, 1 - |v_t - v_th - beta a_t| / v_th),  0 while refractory

    Args:
        input_size, hidden_size: M and N.
        adaptive: how many neurons adapt, as a share of N or a number; they are the last rows. The others are LIF.
        tau_m, tau_a: time constants of membrane and adaptation, in the unit of ``dt`` (ms).
        beta: threshold rise per unit of adaptation.
        v_th: threshold, in units of the membrane.
        refractory: time without spikes after a spike.
        dt: step.
        gamma_pd: height of the pseudo-derivative.
        recurrent: whether spikes feed back within the layer.
        autapses: whether a neuron may feed itself. Without, the diagonal of W_rec and its gradient are zero.
        input_mask, recurrent_mask: bool (N, M) and (N, N), True where a synapse exists. Other weights are zero and
            stay so, and e-prop keeps no traces for them.

    Raises:
        ConfigError: a parameter outside its range, or a mask of another shape.

    Example:
        >>> layer = LSNN(700, 256)
        >>> z, state = layer(torch.zeros(32, 700))
        >>> z.shape
        torch.Size([32, 256])
    """

    betas: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        adaptive: float | int = 0.5,
        *,
        tau_m: float = 20.0,
        tau_a: float = 2000.0,
        beta: float = 0.0174,
        v_th: float = 0.6,
        refractory: float = 5.0,
        dt: float = 1.0,
        gamma_pd: float = 0.3,
        recurrent: bool = True,
        autapses: bool = False,
        input_mask: Tensor | None = None,
        recurrent_mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"tau_m": tau_m, "tau_a": tau_a, "v_th": v_th, "dt": dt}.items():
            if not value > 0:
                raise ConfigError(f"LSNN({name}={value}): must be positive.")
        number = round(adaptive * hidden_size) if isinstance(adaptive, float) else adaptive
        if not 0 <= number <= hidden_size:
            raise ConfigError(f"LSNN(adaptive={adaptive}): more than the {hidden_size} neurons, or negative.")
        if refractory < 0:
            raise ConfigError(f"LSNN(refractory={refractory}): must not be negative.")
        self.input_size, self.hidden_size, self.adaptive = input_size, hidden_size, number
        self.tau_m, self.tau_a, self.beta, self.v_th, self.dt = tau_m, tau_a, beta, v_th, dt
        self.gamma_pd, self.recurrent, self.autapses = gamma_pd, recurrent, autapses
        self.refractory = round(refractory / dt)
        self.surrogate = Surrogate("triangle", (gamma_pd,))
        # Bellec et al. draw from N(0, 1 / fan-in)
        self.input_weights = nn.Parameter(torch.randn(hidden_size, input_size) / math.sqrt(input_size))
        weights = nn.Parameter(torch.randn(hidden_size, hidden_size) / math.sqrt(hidden_size))
        self.recurrent_weights = weights if recurrent else None
        if recurrent and not autapses:
            off_diagonal = ~torch.eye(hidden_size, dtype=torch.bool)
            recurrent_mask = off_diagonal if recurrent_mask is None else recurrent_mask & off_diagonal
        self.register_buffer("input_mask", input_mask, persistent=False)
        self.register_buffer("recurrent_mask", recurrent_mask if recurrent else None, persistent=False)
        adapts = torch.arange(hidden_size) >= hidden_size - number
        self.register_buffer("betas", beta * adapts.to(torch.get_default_dtype()), persistent=False)
        self._keep_masked()

    @property
    def alpha(self) -> float:
        """Decay of the membrane in one step."""
        return math.exp(-self.dt / self.tau_m)

    @property
    def rho(self) -> float:
        """Decay of the adaptation in one step."""
        return math.exp(-self.dt / self.tau_a)

    def initial_state(self, x: Tensor) -> LSNNState:
        """The state at rest, for an input (B, M)."""
        zeros = x.new_zeros(x.shape[0], self.hidden_size)
        return LSNNState(zeros, zeros, zeros, zeros)

    def forward(self, x: Tensor, state: LSNNState | None = None) -> tuple[Tensor, LSNNState]:
        """One step of inputs (B, M) -> spikes (B, N) and the state after it."""
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise InputError(f"LSNN expects one step (B, {self.input_size}), got {tuple(x.shape)}.")
        state = self.initial_state(x) if state is None else state
        z, v, a, r = state
        current = F.linear(x, self.input_weights)
        if self.recurrent_weights is not None:
            current = current + F.linear(z, self.recurrent_weights)
        v = self.alpha * v + current - self.v_th * z.detach()
        z = self.surrogate((v - self.v_th - self.betas * a) / self.v_th) * (r == 0).to(v.dtype)
        a = self.rho * a + z
        with torch.no_grad():
            r = torch.where(z > 0, float(self.refractory), (r - 1).clamp(min=0))
        return z, LSNNState(z, v, a, r)

    def neuron(self) -> Neuron:
        """The layer by its equations, as the fused op takes it."""
        return Neuron(
            _EQUATIONS,
            {
                "alpha": self.alpha,
                "rho": self.rho,
                "v_th": self.v_th,
                "beta": self.betas,
                "refractory": float(self.refractory),
            },
            self.surrogate,
            input_weight=self.input_weights,
            recurrent_weight=self.recurrent_weights,
        )

    def unroll(self, x: Tensor | SpikeTrain, state: LSNNState | None = None) -> tuple[Tensor, LSNNState]:
        """All steps of inputs (T, B, M) at once -> spikes (T, B, N) and the last state.

        It is :meth:`forward` in a loop, through the fused op and with its exact gradient: backward through time.

        Example:
            >>> z, state = LSNN(700, 256).unroll(torch.zeros(9, 32, 700))
            >>> z.shape
            torch.Size([9, 32, 256])
        """
        neuron = self.neuron()
        out = spiking_layer(
            x,
            self.input_weights,
            spec=neuron.spec,
            params=neuron.params,
            surrogate=neuron.surrogate,
            recurrent_weight=self.recurrent_weights,
            state=None if state is None else {**state._asdict(), "spikes": state.z},
            backprop_threshold=None,
        )
        return out.spikes, LSNNState(*(out.state[name] for name in LSNNState._fields))

    def extra_repr(self) -> str:
        return (
            f"input_size={self.input_size}, hidden_size={self.hidden_size}, adaptive={self.adaptive}, "
            f"tau_m={self.tau_m:g}, tau_a={self.tau_a:g}, beta={self.beta:g}, v_th={self.v_th:g}, "
            f"refractory={self.refractory}, recurrent={self.recurrent}"
        )

    def masks(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights with the mask of their synapses, where they have one."""
        pairs: Any = [
            (self.input_weights, self.input_mask),
            (self.recurrent_weights, self.recurrent_mask),
        ]
        return [(weight, mask) for weight, mask in pairs if weight is not None and mask is not None]

    def _keep_masked(self) -> None:
        for weight, mask in self.masks():
            if mask.dtype != torch.bool or mask.shape != weight.shape:
                raise ConfigError(
                    f"a mask must be bool of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}."
                )
            with torch.no_grad():
                weight.masked_fill_(~mask, 0.0)
            weight.register_hook(lambda grad, mask=mask: grad.masked_fill(~mask.to(grad.device), 0.0))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copied or unpickled parameter has lost its hooks
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_masked()
