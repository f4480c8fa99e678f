"""What a backend is, and what it is asked to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .convolution import Convolution
from .dynamics import NeuronSpec
from .equations import Equations
from .errors import NonFiniteError
from .spikes import Active, SpikeTrain
from .surrogates import Surrogate

CHUNK = 32  # steps between two checkpoints of the state; backward replays one chunk at a time

calls: Counter[tuple[str, str]] = Counter()
"""How often each backend ran, ``calls["cpu", "forward"]``, and how often ``min_active`` made a layer's call exact,
``calls["guard", "fc1→lif1"]``, which a device counts by itself and which is here once :mod:`tally
<snn_sparse_plugin.core.tally>` was asked. Tests use it to prove that the fast path ran."""


@dataclass
class LayerCall:
    """One call of the op, validated: all tensors on one device, one dtype, contiguous, features flattened. For a
    backend that :meth:`~Backend.takes_half` the input, ``weight`` and ``bias`` may be half, with all else in float32.

    The input is one of ``train`` (events) and ``dense`` (T, B, M: any numbers in any strides, for a backend that takes
    them), both with ``weight``, and ``current`` (T, B, N). A current that is the same at all steps has stride 0 over
    them. ``rec0`` (B, N) is the recurrent current of the first step, made from the initial spikes. ``params`` is
    (5, N), rows as in :data:`~snn_sparse_plugin.core.dynamics.PARAM_NAMES`.

    With :class:`~snn_sparse_plugin.core.equations.Equations` the rows of ``params`` are their parameters. ``v0``, and
    ``v`` of results and gradients, hold their K states, (K, B, N); there is no ``i0``. A neuron with C inputs has C·N
    currents, input by input: in ``current``, ``rec0`` and the rows of all weights.
    """

    spec: NeuronSpec | Equations
    surrogate: Surrogate
    threshold: float | None
    min_active: float
    T: int
    B: int
    N: int
    train: SpikeTrain | None
    current: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    rec_weight: Tensor | None
    rec_bias: Tensor | None
    rec0: Tensor | None
    v0: Tensor
    i0: Tensor | None
    params: Tensor
    want_spikes: bool = True  # dense (T, B, N)
    want_events: bool = False
    want_mem: bool = False
    needs_grad: bool = True
    params_grad: bool = False  # whether decays or thresholds want a gradient
    once: bool = False  # the current is one for all steps, and its gradient the sum over them, (1, B, N)
    name: str = "spiking_layer"  # how error messages call the layer
    save_active: bool = True  # False: keep checkpoints only, so that every saved shape is static
    dense: Tensor | None = None
    out_dtype: torch.dtype | None = None  # of spikes and membranes; None: that of the state
    rows: Tensor | None = None  # in a backward: Saved.rows of its forward

    @property
    def currents(self) -> int:
        """C·N, the number of input currents."""
        return len(self.spec.inputs) * self.N if isinstance(self.spec, Equations) else self.N

    def changed(self, **fields: Any) -> LayerCall:
        """A copy with these fields, in a tenth of the time of ``dataclasses.replace``."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **fields)
        return copy


def keeps_active(call: LayerCall) -> bool:
    """Whether the active neuron-steps are all that a gradient of the output needs.

    They are not where equations compute the output from more than the one spike that the window applies to.
    """
    return not isinstance(call.spec, Equations) or call.spec.program.direct


def is_finite(x: Tensor) -> bool:
    """Whether no number is NaN or infinite.

    The sum is tested first, at a fifth of the cost; only where it is not finite are the numbers tested one by one.
    """
    x = x.detach()
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def check_finite(call: LayerCall, v: Tensor, finite: Callable[[Tensor], bool] = is_finite) -> None:
    """Raise :class:`NonFiniteError` if the final membrane ``v`` or what it was made from is NaN or infinite.

    Parameters are tested as well: a weight whose input never spikes is never added, so the membrane would not show it.
    """
    weight = call.weight if call.current is None else None
    seen = (v, call.params, weight, call.bias, call.rec_weight)
    if all(tensor is None or finite(tensor) for tensor in seen):
        return
    named = {
        "the input current": call.current,
        "the input": call.dense if call.train is None else call.train.values,
        "the weight": call.weight,
        "the bias": call.bias,
        "the recurrent weight": call.rec_weight,
        "the initial state": call.v0,
        "a decay or threshold": call.params,
    }
    found = [label for label, x in named.items() if x is not None and not finite(x)]
    raise NonFiniteError(
        f"{call.name}: the membrane is NaN or infinite. "
        + (
            f"{found[0].capitalize()} has NaN or infinite values."
            if found
            else "It overflowed: inputs and weights are finite but too large."
        )
    )


class Saved(NamedTuple):
    """What a forward keeps for its backward.

    Either the active list (``active``, ``u`` = membrane - threshold there) with the output events, or
    checkpoints of the state every :data:`CHUNK` steps, from which the backward replays.
    ``threshold`` is the window that was used: None when the call ran exact. Where ``near`` is given it is the window
    that was asked for, and the backward decides on the device whether it holds: where ``near`` reaches
    :func:`enough`.
    """

    threshold: float | None
    active: Active | None = None
    u: Tensor | None = None
    v_checkpoints: Tensor | None = None  # (ceil(T / CHUNK), B, N)
    i_checkpoints: Tensor | None = None
    needs_current: bool = True  # False: the backward never reads the input current, so it is not kept
    mem: Tensor | None = None  # (T, B, N), kept where input events outnumber it: no replay then
    near: Tensor | None = None  # 0-dim int64 on the device: how many neuron-steps lie inside the window
    words: Tensor | None = None  # LayerResult.words again, for a backward that is called with no events
    rows: Tensor | None = None  # of the transposed weight, where a backend makes them and reads them again
    adds_rows: bool | None = (
        None  # how a dense input was multiplied: a replay sums in the same order, to the bit
    )


def enough(call: LayerCall) -> float:
    """How many neuron-steps have to lie inside the window for it to hold."""
    return call.min_active * call.T * call.B * call.N


class LayerResult(NamedTuple):
    """What a forward gives; where events are wanted, ``events`` or ``words`` (see :mod:`snn_sparse_plugin.core.bits`).

    ``active_fraction`` is a 0-dim tensor on the device where a number would have to be waited for.
    """

    spikes: Tensor | None  # (T, B, N)
    events: tuple[Tensor, Tensor] | None  # indptr, indices
    mem: Tensor | None  # (T, B, N)
    v: Tensor  # (B, N)
    i: Tensor | None
    saved: Saved | None
    active_fraction: float | Tensor
    words: Tensor | None = None  # (T, B, ceil(N / 32)) int32


def events_of(
    result: LayerResult,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    carrier: Tensor | None,
    active: Active | None,
) -> SpikeTrain:
    """The spikes of a backend that was asked for events."""
    if result.words is not None:
        return SpikeTrain.from_words(result.words, shape, dtype=dtype, carrier=carrier)
    assert result.events is not None
    return SpikeTrain._of_events(result.events, shape, dtype, carrier, active)


def enter(call: LayerCall, before: LayerResult) -> None:
    """What a layer emitted enters the next one."""
    active = None if before.saved is None else before.saved.active
    shape = call.T, call.B, call.weight.shape[1]  # type: ignore[union-attr]
    call.train = events_of(before, shape, call.v0.dtype, None, active)


class OutputGrads(NamedTuple):
    """Gradients that arrive: at the active entries (in list order), or dense; None where nothing arrives."""

    active: Tensor | None
    spikes: Tensor | None  # (T, B, N), as a ProductGrad only for a backend that takes_products
    mem: Tensor | None
    v: Tensor | None
    i: Tensor | None


class InputGrads(NamedTuple):
    """Gradients that leave. ``input`` is one number per active entry of the input train, or dense: (T, B, N), maybe as
    a :class:`~snn_sparse_plugin.backends.product.ProductGrad`, or with ``LayerCall.once`` the sum over the steps
    (1, B, N)."""

    input: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    rec_weight: Tensor | None = None
    rec_bias: Tensor | None = None
    rec0: Tensor | None = None
    v0: Tensor | None = None
    i0: Tensor | None = None
    params: Tensor | None = None


class Needs(NamedTuple):
    """Which fields of :class:`InputGrads` are wanted."""

    input: bool
    weight: bool
    bias: bool
    rec_weight: bool
    rec_bias: bool
    rec0: bool
    v0: bool
    i0: bool
    params: bool


class LayerBackward(NamedTuple):
    """What the backward of a layer is given but for the gradients that arrive."""

    call: LayerCall
    saved: Saved
    events: tuple[Tensor, Tensor] | None
    needs: Needs


def passed_on(saved: Saved, grad: Tensor) -> OutputGrads:
    """What arrives at a layer of whose events alone there is a gradient, that of another layer's input."""
    if saved.active is not None:
        return OutputGrads(grad.contiguous(), None, None, None, None)
    return OutputGrads(None, grad, None, None, None)


class TtfsBackward(NamedTuple):
    """What the backward of a time-to-first-spike layer is given; ``grad``, ``x``, ``times`` and ``out`` are dense with
    the same strides, ``tau`` and ``t_d`` 0-dimensional."""

    grad: Tensor
    x: Tensor
    times: Tensor  # uint8
    table: Tensor  # (2, window): thresholds, values, in the dtype that is computed in
    out: Tensor  # takes the gradient of x
    tau: Tensor
    t_d: Tensor
    rate: float  # of the exponential kernel; 0 is the linear one
    params: bool  # whether tau and t_d want a gradient


class Backend:
    """Base class of a backend. Register a subclass under ``snn_sparse_plugin.backends``.

    ``priority``: higher is tried first by ``backend="auto"``; negative is never chosen automatically unless
    nothing else supports the call.
    """

    name = "unnamed"
    priority = 0
    equations = False
    """Whether it also runs neurons given by :class:`~snn_sparse_plugin.core.equations.Equations`."""
    takes_dense = False
    """Whether it is made for a device that Python should not wait for: it takes an input with a weight densely as it is
    (:attr:`LayerCall.dense`), without a look at how many of its numbers are zero, and events as bits."""
    takes_products = False
    """Whether its backward takes a gradient of spikes as a product that is not multiplied yet."""

    def takes_half(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it reads float16 or bfloat16 as it is, and writes it; it gets float32 copies else.

        States and parameters, and the table of ``ttfs``, are float32 in either case.
        """
        return False

    def available(self) -> tuple[bool, str]:
        """Whether it can run on this machine, and its version or the reason why not."""
        return True, ""

    def supports(
        self,
        op: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        spec: NeuronSpec | Equations,
        surrogate: Surrogate,
        recurrent: bool = False,
    ) -> tuple[bool, str]:
        """Whether it can run this call, and why not."""
        raise NotImplementedError

    def spiking_layer(self, call: LayerCall) -> LayerResult:
        """Forward of the op."""
        raise NotImplementedError

    def spiking_layers(self, calls: Sequence[LayerCall]) -> list[LayerResult]:
        """Forward of layers of which each takes the events that the one before emits; :func:`enter` puts them into its
        call."""
        results: list[LayerResult] = []
        for call in calls:
            if results:
                enter(call, results[-1])
            results.append(self.spiking_layer(call))
        return results

    def spiking_layer_backward(
        self,
        call: LayerCall,
        saved: Saved,
        events: tuple[Tensor, Tensor] | None,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        """Backward of the op."""
        raise NotImplementedError

    def spiking_layers_backward(
        self, layers: Sequence[LayerBackward], grads: OutputGrads
    ) -> list[InputGrads]:
        """Backward of layers of which each took the events of the one before, which nobody else has a gradient of;
        ``grads`` arrive at the last. Of the gradients of inputs only that of the first layer is asked for."""
        found = [InputGrads()] * len(layers)
        for k in range(len(layers) - 1, -1, -1):
            call, saved, events, needs = layers[k]
            found[k] = self.spiking_layer_backward(call, saved, events, grads, needs)
            if k < len(layers) - 1:
                found[k + 1] = found[k + 1]._replace(input=None)  # it has been used
            passed = found[k].input
            if k == 0 or passed is None:
                break
            grads = passed_on(layers[k - 1].saved, passed)
        return found


class Shares(NamedTuple):
    """How the gradient of an average-pool is shared out: the entry ``below`` (int32, several rows may name it) gets
    that of the entry ``above`` over ``divisor``."""

    below: Tensor
    above: Tensor
    divisor: Tensor


class PooledEvents(NamedTuple):
    """A pool of a train: its events, of an average with ``values``, and where the train has a list of active entries,
    the pool's own. Of a max-pool each with the position in that list of the one it passes its gradient to, ``sources``
    (int32), of an average with ``shares``."""

    indptr: Tensor
    indices: Tensor
    active: Active | None = None
    sources: Tensor | None = None
    values: Tensor | None = None
    shares: Shares | None = None


class RunsConvolutions(Protocol):
    """What a backend also needs to convolve events, the op ``"convolution"``; where there is none torch's product runs.

    Currents, ``nu`` and dense gradients of the input have all features in one dimension, (T, B, C · prod(size)).
    """

    name: str

    def prefers_events(self, conv: Convolution, density: float, masked: bool) -> bool:
        """Whether it is faster than torch's product on an input of this density; ``masked``: the input's gradient is
        wanted at its active entries alone."""

    def convolution(
        self,
        conv: Convolution,
        train: SpikeTrain,
        weight: Tensor,
        bias: Tensor | None,
        keep_winners: bool,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The current, and for the backward which elements a max-pool took, in a form of the backend's own.

        ``factors``: scale and shift (C',) of what the convolution makes, before the pool. The backward is given the
        weight with the scale in it, and none of its gradients knows of them.
        """

    def convolution_backward(
        self,
        conv: Convolution,
        train: SpikeTrain,
        weight: Tensor,
        nu: Tensor,
        winners: Tensor | None,
        *,
        weight_grad: bool,
        bias_grad: bool,
        input: str,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of weight, bias and input from that of the current. ``input``: ``"none"``, ``"active"``, one number
        for each active entry of the train, or ``"dense"``."""

    def pool(self, conv: Convolution, train: SpikeTrain) -> PooledEvents:
        """The pool of ``conv``, whose map is the train itself, for a max-pool a binary one."""

    def pool_backward(self, conv: Convolution, train: SpikeTrain, grad: Tensor) -> Tensor:
        """The gradient (T, B, N) of the train everywhere, from that of its pool."""


class RunsTtfs(Protocol):
    """What a backend also needs to run time-to-first-spike layers, the op ``"ttfs"``; others are not chosen for it."""

    def ttfs(self, x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
        """Encode and decode ``x`` into ``out`` and ``times``, all dense with the same strides."""

    def ttfs_backward(self, call: TtfsBackward) -> tuple[Tensor, Tensor]:
        """The gradient of x into ``call.out``; those of tau and t_d, which nobody reads without ``call.params``."""
