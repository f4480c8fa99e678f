"""One step of a neuron module as the rule needs it: states cut from the past, local derivatives, spikes with a tap.

Currents come from linear layers. Each call of one is remembered with its input; what a neuron makes of the sum is
differentiated elementwise, by autograd on (B, N) tensors, so any elementwise neuron with its own surrogate and
reset will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ...errors import InputError, UnsupportedError
from .rule import Jacobian
from .structure import Intercept, Layer


@dataclass(eq=False)
class Call:
    """One call of a linear layer: the parameters (None where not trained) and what they received, (…, M)."""

    name: str
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    pre: Tensor
    feedback: Tensor | None = None  # takes the place of the weight on the way back

    def at(self, t: int | None) -> Call:
        """The call of one step of a sequence."""
        return self if t is None else Call(self.name, self.weight, self.bias, self.mask, self.pre[t])


class Linear(Function):
    """``F.linear`` whose gradient reaches the input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        ctx.call, ctx.weight = call, weight
        ctx.set_materialize_grads(False)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weight = ctx.weight if ctx.call.feedback is None else ctx.call.feedback
        return grads[0] @ weight.to(grads[0].dtype), None, None, None, None


class Tap(Function):
    """Passes a tensor on and hands its gradient to ``receive``, whose result goes on to the currents below."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, receive: Callable[[Tensor], Tensor | None], *below: Tensor
    ) -> Tensor:
        ctx.receive, ctx.below = receive, len(below)
        ctx.set_materialize_grads(False)  # what a tap keeps for itself does not arrive as zeros further down
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        passed = None if grads[0] is None else ctx.receive(grads[0])
        return None, None, None, *(passed,) * ctx.below


def anchor(like: Tensor) -> Tensor:
    """A leaf that makes autograd record what hangs on it."""
    return torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)


def tracked(call: Call, x: Tensor) -> Tensor:
    bias = None if call.bias is None else call.bias.detach()
    with torch.enable_grad():
        return Linear.apply(x, anchor(x), call.weight.detach(), bias, call)


def sources(current: Tensor, name: str) -> list[Call]:
    """The linear layers whose sum ``current`` is.

    Raises:
        UnsupportedError: something else stands between them and the neuron.
    """
    found: list[Call] = []
    waiting: list[Any] = [current.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None:
            continue
        if isinstance(node, Linear._backward_cls):  # type: ignore[attr-defined]
            found.append(node.call)  # type: ignore[attr-defined]
        elif node.name() == "AddBackward0" and node._saved_alpha == 1:
            waiting.extend(after for after, _ in node.next_functions)
        else:
            raise UnsupportedError(
                f"e-prop: the current of {name} must be a Linear's output or a sum of such, but "
                f"{node.name()} stands before it. Move it, or train with eprop.detached(model)."
            )
    return found


@dataclass(eq=False)
class Record:
    """One step of one layer."""

    local: Jacobian
    calls: list[Call]
    z: Tensor
    states: int
    below: list[Tensor] = field(default_factory=list)  # its currents, with their graph to the layers below
    filtered: Tensor | None = None
    direct: Tensor | None = None


def derivatives(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Jacobian:
    """Elementwise derivatives of every output by every input, by (row, column)."""
    found: Jacobian = {}
    if not inputs:
        return found
    for row, out in enumerate(outputs):
        if out.requires_grad:
            columns = torch.autograd.grad(
                out, inputs, torch.ones_like(out), retain_graph=True, allow_unused=True
            )
            found |= {(row, k): g for k, g in enumerate(columns) if g is not None}
    return found


class Neuron:
    """Runs the steps of one neuron module.

    Args:
        readout: outputs keep their graph from the current on, instead of being tapped.
    """

    def __init__(self, layer: Layer, parameters: dict[nn.Parameter, str], readout: bool = False) -> None:
        self.layer, self.parameters, self.readout = layer, parameters, readout
        self.forward = layer.module.forward
        self.library = layer.adapter.name if layer.adapter is not None else ""
        self.sequence = layer.adapter is not None and layer.adapter.takes_sequence(layer.module)
        self._check(layer.module)

    def _check(self, module: Any) -> None:
        name, kind = self.layer.name, type(module).__name__
        if self.library == "norse" and not hasattr(module, "state_fallback") and kind != "LILinearCell":
            raise UnsupportedError(
                f"e-prop: {name} is a {kind}, which it does not take; use eprop.detached(model)."
            )
        if self.library == "snntorch":
            if getattr(module, "inhibition", False):
                raise UnsupportedError(f"e-prop: {name} has inhibition=True, which couples its neurons.")
            inner = getattr(module, "recurrent", None)
            if inner is not None and not isinstance(inner, nn.Linear):
                raise UnsupportedError(
                    f"e-prop: the recurrence of {name} is a {type(inner).__name__}, not a Linear: "
                    "use all_to_all=True, or eprop.detached(model)."
                )

    def steps(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Record], Any, bool]:
        """All steps of a call -> their records, what the call returns, and whether its state began anew."""
        if not isinstance(x, Tensor) or x.dim() != 2 + self.sequence:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            form = "(T, B, N)" if self.sequence else "(B, N)"
            raise InputError(f"e-prop: {self.layer.name} expects a current {form}, got {shape}.")
        outside: list[Call] = []
        self.problem: UnsupportedError | None = None
        try:
            outside = sources(x, self.layer.name)
        except UnsupportedError as error:  # no matter if linear layers inside the neuron take x
            self.problem = error
        if not self.sequence:
            record, out, fresh = self._step(x, outside, None, args, kwargs)
            return [record], out, fresh
        state = kwargs.get("state", args[0] if args else None)
        records, outs, began = [], [], False
        for t in range(x.shape[0]):
            record, (out, state), fresh = self._step(x[t], outside, t, (state,), {})
            began |= fresh
            records.append(record)
            outs.append(out)
        if not outs:
            raise InputError(f"e-prop: {self.layer.name} got a sequence of no steps.")
        return records, (torch.cat(outs), state), began

    def _step(
        self, x: Tensor, outside: list[Call], t: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Record, Any, bool]:
        record = Record({}, [call.at(t) for call in outside], x, 0)
        with torch.enable_grad():
            current = x.detach().requires_grad_()
            inner: list[
                tuple[Tensor, Tensor]
            ] = []  # of linear layers inside the neuron: current with and without graph

            def linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                name = self.parameters.get(weight)  # type: ignore[call-overload]
                if name is None:
                    raise UnsupportedError(
                        f"e-prop: {self.layer.name} multiplies by a weight that is no parameter."
                    )
                outer = given is current or given._base is current
                given = x.view_as(given) if outer else given.detach()
                call = Call(name, weight, bias, _mask(self.layer.module, weight), given.detach())
                graph = tracked(call, given)
                record.calls.append(call)
                inner.append((graph, graph.detach().requires_grad_()))
                if self.readout:
                    inner[-1] = (graph, self._read(graph, record))
                return inner[-1][1]

            feeds_itself = self.readout and not self._has_inner()
            tapped = self._read(x, record) if feeds_itself else current
            run = _SnnTorchState if self.library == "snntorch" else _TupleState
            state = run(self, tapped if not self.sequence else tapped.unsqueeze(0), args, kwargs)
            with Intercept(linear):
                out = state.call()
            z, after = state.outputs(out)
            leaves = [*(leaf for _, leaf in inner), current]
            leaves = [tapped] if feeds_itself else leaves
            rows = [z, *after]
            found = self._local(
                rows, leaves, leaves[-1] if feeds_itself else current, state.leaves, state.aliases
            )
        record.local, record.z, record.states = found, _flat(z, self.sequence).detach(), len(after)
        record.below = [graph for graph, _ in inner] or [x]
        record.below = [graph for graph in record.below if graph.requires_grad]
        if not self.readout:
            out = self._tapped(out, z, record)
        state.detach()
        return record, out, state.fresh

    def _has_inner(self) -> bool:
        module = self.layer.module
        return "input_weights" in module._parameters or any(
            isinstance(m, nn.Linear) for m in module.children()
        )

    def _read(self, current: Tensor, record: Record) -> Tensor:
        """The readout's current, cut from its graph: its gradient is kept, and sent down later by the feedback."""

        def receive(grad: Tensor) -> None:
            self.guard(record)
            record.direct = grad if record.direct is None else record.direct + grad

        return Tap.apply(current.detach(), anchor(current), receive)

    def _tapped(self, out: Any, z: Tensor, record: Record) -> Any:
        def receive(grad: Tensor) -> Tensor | None:
            return self.receive(record, _flat(grad, self.sequence))

        def refuse(grad: Tensor) -> None:
            raise UnsupportedError(
                f"e-prop: the loss uses the state of hidden layer {self.layer.name}; it may use its spikes and the "
                "readout. Use eprop.detached(model)."
            )

        tapped = Tap.apply(z.detach(), anchor(z), receive, *record.below)

        def replace(x: Tensor) -> Tensor:
            if x is z:
                return tapped
            return Tap.apply(x.detach(), anchor(x), refuse) if x.is_floating_point() else x

        return tree_map_only(Tensor, replace, out)

    def _local(
        self,
        rows: list[Tensor],
        currents: list[Tensor],
        outer: Tensor,
        states: list[Tensor],
        aliases: set[int],
    ) -> Jacobian:
        found = derivatives(rows, [*currents, *states])
        n = len(currents)
        used = [k for k in range(n) if any(column == k for _, column in found)]
        if not used:
            raise UnsupportedError(f"e-prop: the spikes of {self.layer.name} do not depend on its current.")
        if self.problem is not None and any(currents[k] is outer for k in used):
            raise self.problem
        first = used[0]
        for row in range(len(rows)):
            for k in used[1:]:
                a, b = found.get((row, first)), found.get((row, k))
                if (a is None) != (b is None) or (a is not None and b is not None and not _same(a, b)):
                    raise UnsupportedError(
                        f"e-prop: the currents into {self.layer.name} do not simply add up; use eprop.detached(model)."
                    )
        local: Jacobian = {}
        for (row, column), g in found.items():
            if row - 1 in aliases or (column < n and column != first):
                continue
            local[row, 0 if column < n else column - n + 1] = _flat(g, self.sequence)
        return local

    # set by the learner
    guard: Callable[[Record], None]
    receive: Callable[[Record, Tensor], Tensor | None]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and bool(torch.equal(a.flatten(), b.flatten()))


def _flat(x: Tensor, sequence: bool) -> Tensor:
    return x[0] if sequence and x.dim() == 3 else x


def _mask(module: nn.Module, weight: Tensor) -> Tensor | None:
    """Which synapses of a weight exist, where the module says so."""
    for name in ("input", "recurrent"):
        if getattr(module, f"{name}_weights", None) is weight:
            mask = getattr(module, f"{name}_mask", None)
            if mask is None and name == "recurrent" and getattr(module, "autapses", True) is False:
                mask = ~torch.eye(len(weight), dtype=torch.bool, device=weight.device)
            return mask
    return None


# --- states: where a library keeps them ---

_SNNTORCH_STATES = {
    "Leaky": ("mem",),
    "Lapicque": ("mem",),
    "Synaptic": ("syn", "mem"),
    "Alpha": ("syn_exc", "syn_inh", "mem"),
    "RLeaky": ("spk", "mem"),
    "RSynaptic": ("spk", "syn", "mem"),
}


class _SnnTorchState:
    """In buffers of the module, and passed as arguments unless ``init_hidden``."""

    aliases: set[int]

    def __init__(self, neuron: Neuron, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.neuron, self.module, self.x = neuron, neuron.layer.module, x
        kinds = [names for kind, names in _SNNTORCH_STATES.items() if _is_a(self.module, kind)]
        if not kinds:
            raise UnsupportedError(
                f"e-prop: {neuron.layer.name} is a {type(self.module).__name__}; of snnTorch it takes "
                f"{', '.join(_SNNTORCH_STATES)}."
            )
        self.names = kinds[0]
        given = dict(zip(self.names, args, strict=False)) | kwargs
        values = [v if (v := given.get(n)) is not None else getattr(self.module, n) for n in self.names]
        # upstream starts from zeros where the shape differs
        missing = [v.shape != x.shape for v in values]
        self.fresh = any(missing)
        self.leaves = [
            (torch.zeros_like(x) if new else v.detach()).requires_grad_()
            for v, new in zip(values, missing, strict=True)
        ]
        self.aliases = {k for k, n in enumerate(self.names) if n == "spk"}

    def call(self) -> Any:
        if not self.module.init_hidden:
            return self.neuron.forward(self.x, *self.leaves)
        for name, leaf in zip(self.names, self.leaves, strict=True):
            setattr(self.module, name, leaf)
        return self.neuron.forward(self.x)

    def outputs(self, out: Any) -> tuple[Tensor, list[Tensor]]:
        after = [getattr(self.module, n) for n in self.names]
        z = after[-1] if self.neuron.readout else out[0] if isinstance(out, tuple) else out
        return z, after

    def detach(self) -> None:
        for name in self.names:
            setattr(self.module, name, getattr(self.module, name).detach())


def _is_a(module: nn.Module, kind: str) -> bool:
    return any(c.__name__ == kind and c.__module__.startswith("snntorch.") for c in type(module).__mro__)


class _TupleState:
    """Passed in and returned: Norse's and ours, and any ``forward(x, *state) -> (spikes, *state)``."""

    def __init__(self, neuron: Neuron, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.neuron, self.x = neuron, x
        state = (*args, *kwargs.values())
        self.fresh = all(s is None for s in state)
        if self.fresh:
            first = _initial(neuron, x)
            state = () if first is None else (first,)
        flat, self.spec = tree_flatten(state)
        self.places = [k for k, s in enumerate(flat) if isinstance(s, Tensor) and s.is_floating_point()]
        size = _size(neuron, x)
        for k in self.places:  # Norse starts from single numbers
            whole = flat[k].detach()
            whole = whole.expand(size) if whole.dim() < len(size) else whole
            flat[k] = whole.to(x.dtype, copy=True).requires_grad_()
        self.flat, self.leaves = flat, [flat[k] for k in self.places]
        self.aliases: set[int] = set()

    def call(self) -> Any:
        return self.neuron.forward(self.x, *tree_unflatten(self.flat, self.spec))

    def outputs(self, out: Any) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(out, tuple):
            raise UnsupportedError(f"e-prop: {self.neuron.layer.name} must return (spikes, state).")
        z, rest = out[0], out[1:]
        after = [s for s in tree_flatten(rest)[0] if isinstance(s, Tensor) and s.is_floating_point()]
        if self.leaves and len(after) != len(self.leaves):
            raise UnsupportedError(
                f"e-prop: {self.neuron.layer.name} takes {len(self.leaves)} states and returns {len(after)}."
            )
        self.aliases = {k for k, s in enumerate(after) if s is z and not self.neuron.readout}
        return z, after

    def detach(self) -> None:
        pass


def _initial(neuron: Neuron, x: Tensor) -> Any:
    module: Any = neuron.layer.module
    if hasattr(module, "state_fallback"):
        return module.state_fallback(x)
    if neuron.library == "norse":  # LILinearCell makes its state inside forward
        v = torch.zeros(_size(neuron, x), dtype=x.dtype, device=x.device) + module.p.v_leak.detach()
        return import_module("norse.torch").LIState(v=v, i=torch.zeros_like(v))
    if hasattr(module, "initial_state"):
        return module.initial_state(x)
    if type(module).__name__ == "LeakyReadout":
        return x.new_zeros(x.shape[0], module.linear.out_features)
    return None


def _size(neuron: Neuron, x: Tensor) -> tuple[int, ...]:
    """(B, N) of the neuron's states, without the time of a sequence."""
    hidden = getattr(neuron.layer.module, "hidden_size", None)
    shape = x.shape[1:] if neuron.sequence else x.shape
    return (*shape[:-1], shape[-1] if hidden is None else int(hidden))
