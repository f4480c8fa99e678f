"""One step of a neuron module as the rule needs it: states cut from the past, local derivatives, spikes with a tap.

Currents come from linear layers. Each call of one is remembered with its input; what a neuron makes of the sum is
differentiated elementwise, by autograd on (B, N) tensors, so any elementwise neuron with its own surrogate and
reset will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...errors import InputError, UnsupportedError
from .rule import Jacobian
from .states import SnnTorchState, TupleState
from .structure import Intercept, Layer
from .taps import Call, Tap, anchor, sources, tracked


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
            # of linear layers inside the neuron: their current with its graph, and cut from it
            inner: list[tuple[Tensor, Tensor]] = []

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
            run = SnnTorchState if self.library == "snntorch" else TupleState
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
