"""Surrogate derivatives sigma'(x), x = membrane - threshold, of snnTorch and Norse.

One table row per formula. The torch formula here is the specification; the numba and Triton backends hold the
same formulas, in the same order of operations as upstream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from . import host, registry, tally
from .errors import ConfigError, FusionError
from .host import waits

_Formula = Callable[..., Tensor]

AUTO_AREA = 0.05  # what "auto" may cut off, as a fraction of the surrogate's area


def _circ(x: Tensor, a: float) -> Tensor:
    squares = a**2 + x.pow(2)
    return (-(x.pow(2) / (2 * squares.pow(1.5))) + 1 / (2 * squares.sqrt())) * 2 * a


def _sigmoid(x: Tensor, k: float) -> Tensor:
    # symmetric in x: upstream's exp(-k x) overflows to NaN far below threshold, this form does not
    decay = torch.exp(-k * x.abs())
    return k * decay / (decay + 1) ** 2


# kind -> (code shared with the compiled backends, parameter names, formula)
_TABLE: dict[str, tuple[int, tuple[str, ...], _Formula]] = {
    "zero": (0, (), torch.zeros_like),
    "fast_sigmoid": (1, ("slope",), lambda x, k: 1 / (k * x.abs() + 1.0) ** 2),
    "atan": (2, ("alpha",), lambda x, a: a / 2 / (1 + (torch.pi / 2 * a * x).pow(2))),
    "sigmoid": (3, ("slope",), _sigmoid),
    "straight_through": (4, (), torch.ones_like),
    "triangular": (5, ("threshold",), lambda x, h: torch.where(x >= 0, -h, h).to(x.dtype)),
    "heaviside": (6, (), lambda x: (x > 0).to(x.dtype)),
    "spike_rate_escape": (7, ("beta", "slope"), lambda x, b, k: k * torch.exp(-b * (x - 1).abs())),
    "sparse_fast_sigmoid": (8, ("slope", "B"), lambda x, k, b: (x > b) / (k * x.abs() + 1.0) ** 2),
    "triangle": (9, ("alpha",), lambda x, a: a * torch.relu(1 - x.abs())),
    "tanh": (10, ("alpha",), lambda x, a: 1 - (x * a).tanh().pow(2)),
    "circ": (11, ("alpha",), _circ),
    "erfc": (12, ("alpha",), lambda x, a: 2 * torch.exp(-(a * x).pow(2)) / math.sqrt(math.pi)),
}
CUSTOM = 99
KINDS = tuple(_TABLE)


@dataclass(frozen=True)
class Surrogate:
    """A spike function: Heaviside forward (strict ``x > 0``), ``grad(x)`` backward. Picklable and hashable.

    Args:
        kind: a formula of snnTorch's, ``"fast_sigmoid"`` (slope), ``"atan"`` (alpha), ``"sigmoid"`` (slope),
            ``"straight_through"``, ``"triangular"`` (threshold), ``"heaviside"``,
            ``"spike_rate_escape"`` (beta, slope), ``"sparse_fast_sigmoid"`` (slope, B); of Norse's,
            ``"triangle"``, ``"tanh"``, ``"circ"``, ``"erfc"`` (alpha; its ``super`` is a fast sigmoid);
            ``"zero"``, no gradient; or ``"custom"``.
        params: the parameters of the formula, in this order.
        function: for ``"custom"``: any elementwise differentiable spike function of x; its own gradient is used.
        pure: for ``"custom"``: whether ``function`` depends on nothing but x. Such a function may be called at other
            times and with other shapes than upstream calls it: over all steps at once, in the backward, or to look at
            its gradient. One that is not is called by upstream alone.

    Raises:
        ConfigError: unknown kind or wrong number of parameters.

    Example:
        >>> Surrogate("fast_sigmoid", (100.0,)).auto_threshold()
        0.19
    """

    kind: str
    params: tuple[float, ...] = ()
    function: Callable[[Tensor], Tensor] | None = None
    pure: bool = True

    def __post_init__(self) -> None:
        if self.kind == "custom":
            if not callable(self.function):
                raise ConfigError("a custom surrogate needs function=, an elementwise spike function.")
            return
        if self.kind not in _TABLE:
            raise ConfigError(f"no surrogate {self.kind!r}; known: {', '.join(KINDS)}, custom.")
        names = _TABLE[self.kind][1]
        if len(self.params) != len(names):
            raise ConfigError(f"surrogate {self.kind!r} takes {names}, got {self.params}.")
        object.__setattr__(self, "params", tuple(float(p) for p in self.params))

    def __repr__(self) -> str:
        if self.kind == "custom":
            return f"Surrogate(custom: {getattr(self.function, '__qualname__', self.function)})"
        names = _TABLE[self.kind][1]
        return f"{self.kind}({', '.join(f'{n}={p:g}' for n, p in zip(names, self.params, strict=True))})"

    @property
    def code(self) -> int:
        """The number under which the compiled backends know the formula."""
        return CUSTOM if self.kind == "custom" else _TABLE[self.kind][0]

    @property
    def packed(self) -> tuple[float, float]:
        """The parameters, padded to the two slots of the compiled backends."""
        first, second, *_ = (*self.params, 0.0, 0.0)
        return first, second

    @cached_property
    def numbers(self) -> tuple[int, float, float]:
        """:attr:`code` and :attr:`packed`."""
        return self.code, *self.packed

    def grad(self, x: Tensor) -> Tensor:
        """sigma'(x), same shape and dtype as ``x``."""
        if self.kind != "custom":
            return _TABLE[self.kind][2](x, *self.params)
        assert self.function is not None
        again = torch.is_grad_enabled() and x.requires_grad  # the derivative is to be differentiated
        with torch.enable_grad():
            inner = x.view_as(x) if again else x.detach().requires_grad_()
            out = self.function(inner)
            if not out.requires_grad:
                return torch.zeros_like(x)
            (grad,) = torch.autograd.grad(
                out, inner, torch.ones_like(out), create_graph=again, allow_unused=True
            )
        return torch.zeros_like(x) if grad is None else grad

    def auto_threshold(self) -> float | None:
        """Smallest distance outside which at most 5 % of the area of sigma' lies; None if no window has that.

        Constant surrogates have infinite area, so no window is right for them: they stay exact. So does a function that
        is not pure, as nobody may call it to look at its gradient.
        """
        first, second = self.packed
        tail = AUTO_AREA
        if self.kind in ("zero", "straight_through", "triangular", "heaviside"):
            return None
        if self.kind == "custom":
            return _numeric_threshold(self.grad) if self.pure else None
        if min(self.params) <= 0:
            return None
        if self.kind == "fast_sigmoid":
            value = (1 / tail - 1) / first
        elif self.kind == "atan":
            value = math.tan(math.pi / 2 * (1 - tail)) * 2 / (math.pi * first)
        elif self.kind == "sigmoid":
            value = math.log(2 / tail - 1) / first
        elif self.kind == "spike_rate_escape":
            value = math.log((math.exp(first) + math.exp(-first)) / (2 * tail)) / first
        elif self.kind == "sparse_fast_sigmoid":
            value = ((1 + first * second) / tail - 1) / first
        elif self.kind == "triangle":
            value = 1 - math.sqrt(tail)
        elif self.kind == "tanh":
            value = math.atanh(1 - tail) / first
        elif self.kind == "circ":
            value = first * (1 - tail) / math.sqrt(1 - (1 - tail) ** 2)
        else:  # erfc
            value = 1.3859038243496777 / first  # erfinv(0.95)
        return float(f"{value:.6g}")

    def resolve(self, threshold: float | str | None) -> float | None:
        """A number (the window) or None (exact) for a ``backprop_threshold`` option."""
        return self.auto_threshold() if threshold == "auto" else threshold  # type: ignore[return-value]

    def __call__(self, x: Tensor) -> Tensor:
        """The spikes of ``x`` (same dtype), with this surrogate's gradient."""
        return _Spike.apply(x, self)


def _numeric_threshold(grad: Callable[[Tensor], Tensor]) -> float | None:
    x = torch.linspace(-20, 20, 8001, dtype=torch.float64)
    try:
        area = grad(x).abs()
    except Exception:  # a user's function may refuse 1-D or float64 input
        return None
    if not torch.isfinite(area).all() or area.sum() == 0 or max(area[0], area[-1]) > 1e-2 * area.max():
        return None
    distance, order = x.abs().sort()
    inside = area[order].cumsum(0) / area.sum()
    return float(f"{distance[(inside < 1 - AUTO_AREA).sum()].item():.3g}")


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.grad(x), None


def once(grad: Tensor, what: str) -> Tensor:
    """``grad``, made so that differentiating it again raises :class:`FusionError`, not gives zero."""
    return _Once.apply(grad, torch.zeros((), device=grad.device, requires_grad=True), what)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor, what: str) -> Tensor:
        ctx.what = what
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise FusionError(
            f"{ctx.what} was made with create_graph=True and cannot be differentiated: only what lies inside the "
            f"window was kept of its forward. Use the exact gradient for derivatives of second order: "
            f"sparse_mode(backprop_threshold=None), where time fusion may stay on or be off (fuse_time=False)."
        )


class _MaskedSpike(torch.autograd.Function):
    """Upstream's spikes, the surrogate's gradient at active elements only.

    On a device nothing may be read: it counts by itself how often the guard steps in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        surrogate: Surrogate,
        threshold: float,
        min_active: float,
        sequence: bool,
        ran: tally.Record,
    ) -> Tensor:
        ctx.surrogate, ctx.ran, ctx.kernels = surrogate, ran, _kernels_for(x)
        ctx.exact, ctx.twice = False, min_active >= 1  # twice: differentiable again
        keep = None  # which elements pass a gradient; those of kernels are in ctx.passing
        if ctx.kernels is not None:
            S = x.numel() // x.shape[-1] if sequence else x.shape[0]
            spikes, ctx.passing, near, passing = ctx.kernels.fire(x, S, threshold, min_active)
            if x.dtype is not torch.float32:  # whose spikes have upstream's own dtype
                spikes = function(x)
            ctx.exact = passing == x.numel() > near
        else:
            spikes = function(x)
            close = x.abs() < threshold
            keep = _kept(close, min_active, sequence)
            if not waits(x):
                ctx.exact = bool(keep.all()) and not bool(close.all())
            elif min_active > 0:
                guard = partial(ctx.ran.count, "guard")
                ctx.ran.count_later(keep.all() & ~close.all(), "masked", guard)
        ran.count_soon("exact" if ctx.exact else "masked")
        if ctx.exact:
            ran.count_soon("guard")
        if tally.watchers.blocks.get():
            tally.show(spikes, _mask(ctx, keep, x), _steps(x, sequence))
        ctx.save_for_backward(x, None if ctx.exact else keep)
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, keep) = grads, ctx.saved_tensors
        again = torch.is_grad_enabled()
        if ctx.exact:
            out = (grad * ctx.surrogate.grad(x)).to(x.dtype)
            return out, None, None, None, None, None, None
        ctx.ran.count_soon("backward")
        if ctx.kernels is not None and not again and grad.dtype == x.dtype:
            out = ctx.kernels.passed(grad, x, ctx.passing, ctx.surrogate)
        else:
            at = x if ctx.twice else x.detach()
            out = torch.where(_mask(ctx, keep, x), grad * ctx.surrogate.grad(at), 0).to(x.dtype)
        if again and not ctx.twice:
            out = once(out, "the gradient of spikes inside a window")
        return out, None, None, None, None, None, None


def _mask(ctx: Any, keep: Tensor | None, x: Tensor) -> Tensor:
    """Which elements of ``x`` pass a gradient, as a tensor."""
    return torch.from_numpy(ctx.passing).view(x.shape) if keep is None else keep


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """``function.apply`` without what that does for ``torch.func``, where none of its transforms is active."""
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)  # type: ignore[no-any-return]


apply_masked = plain_apply(_MaskedSpike)


def _kernels_for(x: Tensor) -> Any:
    """The compiled kernels for a step; None where torch's operators make it."""
    if torch._C._is_tracing():  # sizes are tensors then
        return None
    device = x.device.type  # waits, written out
    fits = device in host.HOSTS and x.dtype in _COMPILED and x.dim() > 1 and x.is_contiguous() and x.numel()
    return registry.conversions(device) if fits else None


_COMPILED = torch.float32, torch.float64


def blocked_spike(
    x: Tensor,
    function: Callable[[Tensor], Tensor],
    threshold: float | None,
    min_active: float,
    sequence: bool = False,
) -> Tensor:
    """:func:`masked_spike` with upstream's own gradient, blocked where no neuron is active: all shapes static."""
    if threshold is None:
        return function(x)
    return _blocked(x, function, _kept(x.detach().abs() < threshold, min_active, sequence))


def _blocked(x: Tensor, function: Callable[[Tensor], Tensor], keep: Tensor) -> Tensor:
    return function(torch.where(keep, x, x.detach()))


def _kept(near: Tensor, min_active: float, sequence: bool) -> Tensor:
    """Which elements keep their gradient: those near threshold, and whole neurons that the window would silence.

    A neuron is active in a fraction of its samples (dimension 0), in a sequence of its steps and samples (all but the
    last dimension); without samples the layer counts as one.
    """
    if near.dim() < 2:
        return near | (near.sum() < min_active * near.numel())
    own = near.flatten(0, -2) if sequence else near
    return near | (own.sum(0) < min_active * own.shape[0])


def _steps(x: Tensor, sequence: bool) -> int:
    return x.shape[0] if sequence else 1


def masked_spike(
    x: Tensor,
    function: Callable[[Tensor], Tensor],
    surrogate: Surrogate,
    threshold: float | None,
    min_active: float,
    sequence: bool = False,
) -> Tensor:
    """``function(x)`` with its gradient set to zero where ``|x| >= threshold`` [Perez-Nieves & Goodman, Def. 2].

    Args:
        x: membrane minus threshold, any shape.
        function: upstream's spike function, whose dtype and values the spikes have.
        surrogate: the surrogate recognised from ``function``; its gradient is evaluated at active elements only.
        threshold: the window B_th; None is exact and returns ``function(x)`` itself.
        min_active: a neuron that is active in a smaller fraction of the samples (dimension 0) keeps its gradient.
        sequence: x holds all steps (T, B, N), and a neuron's fraction is that of its steps and samples.
    """
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    if threshold is None or not wants_grad or surrogate.kind == "zero":
        # spikes of a disabled surrogate stay outside the graph, as upstream's
        tally.current().count("exact" if wants_grad else "no_grad")
        spikes = function(x)
        share = 1.0 if wants_grad and surrogate.kind != "zero" else math.nan
        tally.show(spikes, share, _steps(x, sequence))
        return spikes
    if surrogate.kind == "custom":  # its gradient may depend on where an element stands
        tally.current().count("masked")
        keep = _kept(x.detach().abs() < threshold, min_active, sequence)
        spikes = _blocked(x, function, keep)
        tally.show(spikes, keep, _steps(x, sequence))
        return spikes
    return apply_masked(x, function, surrogate, threshold, min_active, sequence, tally.current())
