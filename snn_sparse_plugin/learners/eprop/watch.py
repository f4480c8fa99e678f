"""One step of a neuron module as the rule needs it: states cut from the past, local derivatives, spikes with a tap.

Currents come from linear layers. Each call of one is remembered with its input; what a neuron makes of the sum is
differentiated elementwise, by autograd on (B, N) tensors, so any elementwise neuron with its own surrogate and
reset will do. Neurons of the libraries show their structure in the first step; those after it run without a graph, and
their derivatives are found for a whole chunk (``local.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.active import config_of
from ...core.errors import InputError, UnsupportedError
from .local import Inputs, Part, Plan, derivatives, replay, unchanged
from .record import Record
from .returned import Returned, flat
from .scan import Jacobian, on_cpu, on_triton
from .states import Original, SnnTorchState, TupleState
from .stepper import ByKernel
from .structure import Intercept, Layer
from .taps import Call, sources, tracked

log = logging.getLogger("snn_sparse_plugin")

State = SnnTorchState | TupleState


class Neuron:
    """Runs the steps of one neuron module.

    Args:
        parameters: names of the model's.
        returned: of a readout outputs keep their graph from the current on, instead of being tapped.
        known: whether it is known how errors come from the readout to the hidden layers; steps then need no graph.
        block_steps: of a block of derivatives that a kernel finds.
    """

    def __init__(
        self,
        layer: Layer,
        parameters: dict[nn.Parameter, str],
        returned: Returned,
        known: Callable[[], bool],
        block_steps: int,
    ) -> None:
        self.layer, self.parameters, self.returned, self.known = layer, parameters, returned, known
        self.readout, self.sequence = returned.readout, returned.sequence
        self.forward = layer.module.forward
        self.library = layer.adapter.name if layer.adapter is not None else ""
        self.original = Original(layer, self.forward, self.readout, self.sequence, self.library)
        self.plan: Plan | None = None
        self.kernel: ByKernel | None = None
        self.block_steps = block_steps
        self.masks: dict[str, Tensor | None] = {}
        self._check(layer.module)

    def _check(self, module: Any) -> None:
        name, kind = self.layer.name, type(module).__name__
        if self.library == "norse" and not hasattr(module, "state_fallback") and kind != "LILinearCell":
            raise UnsupportedError(
                f"e-prop: {name} is a {kind}, which it does not take; use eprop.detached(model)."
            )
        if getattr(module, "record_states", False):
            raise UnsupportedError(
                f"e-prop: {name} has record_states=True; it hands on the last state alone."
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
        record = Record(None, [call.at(t) for call in outside], x, 0)
        if self.later():
            found = self._by_kernel(record, x, args, kwargs)
            if found is not None:
                return found
            if self.plan is not None and self.known():
                return self._without_graph(record, x, args, kwargs)
        with torch.enable_grad():
            current = x.detach().requires_grad_()
            # of linear layers inside the neuron: their current with its graph, and cut from it
            inner: list[tuple[Tensor, Tensor]] = []

            def linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                call = self._inside(given, x, current, weight, bias)
                graph = tracked(call, call.given)
                record.calls.append(call)
                inner.append((graph, graph.detach().requires_grad_()))
                if self.readout:
                    inner[-1] = (graph, self.returned.current(graph, record))
                return inner[-1][1]

            feeds_itself = self.readout and not self.has_inner
            tapped = self.returned.current(x, record) if feeds_itself else current
            given = self._state(x, args, kwargs)
            state = given.at(
                tapped.unsqueeze(0) if self.sequence else tapped,
                [s.clone().requires_grad_() for s in given.leaves],
            )
            with Intercept(linear):
                out = state.call()
            z, after = state.outputs(out)
            leaves = [tapped] if feeds_itself else [*(cut for _, cut in inner), current]
            outer = tapped if feeds_itself else current
            record.local = self._local([z, *after], leaves, outer, state)
        record.z, record.states = flat(z, self.sequence).detach(), len(after)
        record.below = [graph for graph, _ in inner] or [x]
        record.below = [graph for graph in record.below if graph.requires_grad]
        out = self.returned.only_output(out, z) if self.readout else self.returned.tapped(out, z, record)
        state.detach()
        return record, out, state.fresh

    def _try_kernel(self, x: Tensor, state: State) -> ByKernel:
        """A kernel for this neuron, if it makes the same of this step as the module."""
        kernel = ByKernel(self.layer, self.readout, state.names, self.block_steps)
        stepper = kernel.stepper_for(state.leaves[-1]) if state.leaves else None
        if stepper is not None and stepper.takes(x, state.leaves):
            neuron, current, rec = stepper.neuron, x.detach(), None
            with torch.no_grad(), unchanged(self.layer.module):
                given = state.at(
                    current.unsqueeze(0) if self.sequence else current, [s.clone() for s in state.leaves]
                )
                z, after = given.outputs(given.call())
                if neuron.input_weight is not None:
                    current = F.linear(current, neuron.input_weight, neuron.input_bias)
                if neuron.recurrent_weight is not None:
                    spikes = state.leaves[stepper.spikes]
                    rec = F.linear(spikes, neuron.recurrent_weight, neuron.recurrent_bias)
            _, output, states, _ = stepper.step(current, rec, state.leaves)
            stepper.release()
            made = [flat(part, self.sequence) for part in (z, *after)]
            for own, theirs in zip((output, *states), made, strict=True):
                if own.dtype != theirs.dtype or not torch.equal(own, theirs):
                    kernel.refuse("its first step gave something else there")
        if kernel.why_not:
            log.debug("e-prop: %s takes derivatives by autograd: %s", self.layer.name, kernel.why_not)
        return kernel

    def _by_kernel(
        self, record: Record, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Record, Any, bool] | None:
        """A step of a neuron that a kernel knows; None where it does not."""
        if not _plain(x) or (self.kernel is not None and self.kernel.neuron is None):
            return None
        state = self._state(x, args, kwargs)
        if self.kernel is None:
            self.kernel = self._try_kernel(x, state)
        stepper = self.kernel.stepper_for(state.leaves[-1]) if state.leaves else None
        if stepper is None or not stepper.takes(x, state.leaves):
            return None
        neuron, without_graph = stepper.neuron, not self.readout and self.known()

        def product(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            call = self._inside(given, x, x, weight, bias)
            record.calls.append(call)
            if without_graph:
                return F.linear(call.pre, weight, bias).detach()
            record.below.append(tracked(call, call.given))
            return record.below[-1].detach()

        current, rec = x.detach(), None
        if neuron.input_weight is not None:
            current = product(x, neuron.input_weight, neuron.input_bias)
        elif self.problem is not None:
            raise self.problem
        else:
            record.below.append(x)
        if neuron.recurrent_weight is not None:
            rec = product(state.leaves[stepper.spikes], neuron.recurrent_weight, neuron.recurrent_bias)
        spikes, z, after, record.place = stepper.step(current, rec, state.leaves)
        record.z, record.states = z, len(after)
        record.below = [graph for graph in record.below if graph.requires_grad]
        if self.sequence:  # of one step
            spikes = spikes.unsqueeze(0)
            z = spikes if not self.readout else z.unsqueeze(0)
        out = state.returned(z if self.library != "snntorch" else spikes, after)
        if self.readout:
            record.at_output = True
            return record, self.returned.output(out, z, spikes, stepper, record), state.fresh
        out = self.returned.leaves(out, z, record) if without_graph else self.returned.tapped(out, z, record)
        return record, out, state.fresh

    def _without_graph(
        self, record: Record, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Record, Any, bool]:
        """A further step of a neuron whose structure is known."""
        assert self.plan is not None
        if self.problem is not None and self.plan.current == self.plan.currents - 1:
            raise self.problem  # it takes the current from outside
        inner: list[Tensor] = []
        feeds_itself = self.readout and not self.has_inner
        current = self.returned.current_alone(x, record) if feeds_itself else x.detach()

        def linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            call = self._inside(given, x, current, weight, bias)
            record.calls.append(call)
            if not self.readout:
                inner.append(F.linear(call.pre, weight, bias))
                return inner[-1]
            graph = tracked(call, call.given)
            record.below.append(graph)
            inner.append(self.returned.current_alone(graph, record))
            return inner[-1]

        # the mode costs microseconds for each of the neuron's operations
        watched = Intercept(linear) if self.has_inner else nullcontext()
        with torch.set_grad_enabled(self.readout):
            state = self._state(x, args, kwargs)
            state.x = current.unsqueeze(0) if self.sequence else current
            with watched:
                out = state.call()
        z, after = state.outputs(out)
        record.z, record.states = flat(z, self.sequence).detach(), len(after)
        record.inputs = Inputs(current.detach(), [c.detach() for c in inner], state)
        if not self.readout:
            out = self.returned.leaves(out, z, record)
        elif feeds_itself:
            record.below = [x]
        record.below = [graph for graph in record.below if graph.requires_grad]
        if self.readout:
            state.detach()
        return record, out, state.fresh

    def _state(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        run = SnnTorchState if self.library == "snntorch" else TupleState
        return run(self.original, x.unsqueeze(0) if self.sequence else x, args, kwargs)

    def _inside(self, given: Tensor, x: Tensor, current: Tensor, weight: Tensor, bias: Tensor | None) -> Call:
        """A linear layer inside the neuron is called, with its current or with something else."""
        name = self.parameters.get(weight)  # type: ignore[call-overload]
        if name is None:
            raise UnsupportedError(f"e-prop: {self.layer.name} multiplies by a weight that is no parameter.")
        if name not in self.masks:
            self.masks[name] = _mask(self.layer.module, weight)
        if given is current or given._base is current:
            given = x if given.shape == x.shape else x.view_as(given)
        else:
            given = given.detach()
        return Call(name, weight, bias, self.masks[name], given)

    def later(self) -> bool:
        """Whether steps may leave autograd alone: the surrogate is the neuron's own, not one that is cut."""
        return config_of(self.layer.module) is None

    def derivatives(self, records: list[Record]) -> list[Part]:
        """Local derivatives of steps, in consecutive parts."""
        parts: list[Part] = []
        for how, group in groupby(records, _how):
            steps = list(group)
            if isinstance(how, tuple):
                first = steps[0].place
                assert first is not None
                parts.append(first.part(len(steps)))
            elif how == "later":
                assert self.plan is not None
                inputs = [r.inputs for r in steps if r.inputs is not None]
                z = [r.z for r in steps]
                name, module = self.layer.name, self.layer.module
                parts.extend(replay(name, module, self.plan, inputs, z, self.sequence))
            else:
                for record in steps:
                    local = (record.local or {}).items()
                    parts.append(Part(1, {k: v[None] if isinstance(v, Tensor) else v for k, v in local}))
        return parts

    @cached_property
    def has_inner(self) -> bool:
        """Whether linear layers inside the module take its input."""
        module = self.layer.module
        return "input_weights" in module._parameters or any(
            isinstance(m, nn.Linear) for m in module.children()
        )

    def _local(self, rows: list[Tensor], currents: list[Tensor], outer: Tensor, state: State) -> Jacobian:
        found = derivatives(rows, [*currents, *state.leaves])
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
            if row - 1 in state.aliases or (column < n and column != first):
                continue
            local[row, 0 if column < n else column - n + 1] = flat(g, self.sequence)
        if _of_a_library(self.layer.module):
            self.plan = Plan(first, n, frozenset(local), len(rows) - 1)
        return local


def _plain(x: Tensor) -> bool:
    """Whether a current has the dtype of the states that come of it."""
    return (on_cpu(x) or on_triton(x)) and not torch.is_autocast_enabled(x.device.type)


def _how(record: Record) -> Any:
    """How the derivatives of a step are found: at once, later, or in which block of a kernel's."""
    if record.place is not None:
        return id(record.place.stepper), id(record.place.block)
    return "later" if record.local is None else "at once"


def _of_a_library(module: nn.Module) -> bool:
    """Whether a neuron is elementwise and not random because of its class."""
    own = __name__.rpartition(".")[0]
    return type(module).__module__.startswith(("snntorch.", "norse.", own))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and bool(torch.equal(a.flatten(), b.flatten()))


def _mask(module: nn.Module, weight: Tensor) -> Tensor | None:
    """Which synapses of a weight exist, where the module says so."""
    for name in ("input", "recurrent"):
        if getattr(module, f"{name}_weights", None) is weight:
            mask = getattr(module, f"{name}_mask", None)
            if mask is None and name == "recurrent" and getattr(module, "autapses", True) is False:
                mask = ~torch.eye(len(weight), dtype=torch.bool, device=weight.device)
            return mask
    return None
