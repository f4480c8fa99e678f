"""Steps of a described neuron through a compiled kernel, which also finds their local derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...adapters import Adapter
from ...adapters.base import Neuron
from ...core.jacobian import derivatives_of, fixed_values
from ...fusion.description import Description
from .described import described, equations, parameters, per_neuron
from .local import Part
from .scan import Jacobian, on_cpu, on_triton
from .structure import Layer


class Place:
    """Where the derivatives of one step stand."""

    __slots__ = ("block", "stepper", "t")

    def __init__(self, stepper: Stepper, block: Tensor, t: int) -> None:
        self.stepper, self.block, self.t = stepper, block, t

    def part(self, steps: int) -> Part:
        """Derivatives of this step and those after it."""
        return Part(steps, self.stepper.jacobian(self.block[:, self.t : self.t + steps]), symbolic=True)

    def local(self) -> Jacobian:
        """Derivatives of this step alone, a copy: (B, N) or numbers."""
        stepper = self.stepper
        return stepper.same | {pair: self.block[k, self.t].clone() for pair, k in stepper.varying.items()}

    def gain(self) -> Tensor | float:
        """The derivative of this step's output by its current, (B, N)."""
        k = self.stepper.varying.get((0, 0))
        return self.stepper.same.get((0, 0), 0.0) if k is None else self.block[k, self.t]


class Stepper:
    """One neuron as it is now: its program with parameters in place, for states of one shape and dtype.

    Args:
        neuron: from :func:`~.described.described`.
        names: of its states in the order of the module's, among them those that the equations do not know.
        readout: whether its output is its membrane.
        like: a state, (B, N).
        steps: how many steps a block of derivatives holds.

    Raises:
        RuntimeError: a parameter that is no number per neuron.
    """

    def __init__(self, neuron: Neuron, names: Sequence[str], readout: bool, like: Tensor, steps: int) -> None:
        self.neuron, self.names, self.steps = neuron, tuple(names), steps
        eq = equations(neuron)
        program = eq.program
        self.shape, self.dtype = like.shape, like.dtype
        first = program.spikes if program.spikes is not None else program.results[0]
        output = program.results[program.states.index(eq.membrane)] if readout else first
        d = derivatives_of(program, output)
        params = self.params = _packed(neuron, like)
        kept = sorted(set(d.varying.values()))
        # which of the module's states each state of the program is, and the places of entries with them
        self.leaf = [self._leaf(name) for name in program.states]
        place = [0] + [1 + k for k in self.leaf]
        # what each of the module's states is after a step: the spikes, or a state of the program
        self.after = [0] * len(self.names)
        for k, result in enumerate(program.results):
            self.after[self.leaf[k]] = 0 if result == program.spikes else 1 + k
        self.spikes = next((k for k, name in enumerate(self.names) if name in ("spk", "z")), -1)
        self.threshold = parameters(neuron).get("threshold", 0.0)
        self.output = 1 + program.states.index(eq.membrane) if readout else 0
        self.varying = {(place[r], place[c]): kept.index(k) for (r, c), k in d.varying.items()}
        self.same: Jacobian = {(place[r], place[c]): v for (r, c), v in d.numbers.items()}
        for (r, c), row in fixed_values(program, d, params).items():
            number = bool((row == row[0]).all())
            self.same[place[r], place[c]] = float(row[0]) if number else row.expand(self.shape)
        self._made = program, d, kept, params, neuron.surrogate
        self.entries = len(kept)
        self.block: Tensor | None = None
        self.filled = 0

    @cached_property
    def run(self) -> Callable[..., None]:
        """The kernel of one step."""
        program, d, kept, params, surrogate = self._made
        results = [program.results[0] if program.spikes is None else program.spikes, *program.results]
        # numba and Triton are imported where they run
        where = "triton_kernels" if on_triton(params) else "backends.cpu"
        kernels: Any = import_module(f"snn_sparse_plugin.{where}.eprop_step")
        return kernels.runner(program, d, results, kept, params, surrogate)  # type: ignore[no-any-return]

    @cached_property
    def run_chunk(self) -> Callable[..., None]:
        """The kernel of many steps of a spiking neuron; on a device alone."""
        kernels: Any = import_module("snn_sparse_plugin.triton_kernels.eprop_steps")
        return kernels.Chunk(*self._made)  # type: ignore[no-any-return]

    def jacobian(self, block: Tensor) -> Jacobian:
        """The derivatives of some steps, from a block (entries, K, B, N)."""
        shape = block.shape[1:]
        same = {pair: v.expand(shape) if isinstance(v, Tensor) else v for pair, v in self.same.items()}
        rows = block.unbind(0)  # one tensor for all places that it stands at
        return same | {pair: rows[k] for pair, k in self.varying.items()}

    def _leaf(self, name: str) -> int:
        if len(self.names) == 1:
            return 0
        # the canonical family knows only v and i
        for known in {"v": ("v", "mem"), "i": ("i", "syn")}.get(name, (name,)):
            if known in self.names:
                return self.names.index(known)
        raise RuntimeError(f"no state {name} among {self.names}")

    def step(
        self, x: Tensor, rec: Tensor | None, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor], Place]:
        """One step from the module's states -> spikes, output (of a readout its membrane), states, derivatives.

        ``x`` and ``rec`` (B, N): the current, and that of the recurrent weights.
        """
        before = torch.stack([leaves[k] for k in self.leaf])
        after = before.new_empty(1 + len(before), *self.shape)
        if self.block is None or self.filled == self.steps:
            self.block = before.new_empty(self.entries, self.steps, *self.shape)
            self.filled = 0
        t = self.filled
        self.filled = t + 1
        self.run(x, rec, before, after, self.block, t)
        # snnTorch detaches its states in place, which a view refuses
        made = [x.detach() for x in after.unbind(0)]
        return made[0], made[self.output], [made[k] for k in self.after], Place(self, self.block, t)

    def takes(self, x: Tensor, leaves: Sequence[Tensor]) -> bool:
        """Whether the module's input and states are of the shape and dtype that the kernel walks over."""
        weight = self.neuron.input_weight
        features = self.shape[1] if weight is None else weight.shape[1]
        return (x.shape, x.dtype) == ((self.shape[0], features), self.dtype) and all(
            (s.shape, s.dtype) == (self.shape, self.dtype) for s in leaves
        )

    def runs(self, neuron: Neuron) -> bool:
        """Whether another description is of the same neuron."""
        before = self.neuron
        return (
            (before.spec, before.surrogate) == (neuron.spec, neuron.surrogate)
            and before.input_weight is neuron.input_weight
            and before.input_bias is neuron.input_bias
            and before.recurrent_weight is neuron.recurrent_weight
            and before.recurrent_bias is neuron.recurrent_bias
            and torch.equal(self.params, _packed(neuron, self.params))
        )

    def release(self) -> None:
        """The derivatives so far have been used; others may take their place."""
        self.filled = 0


def _packed(neuron: Neuron, like: Tensor) -> Tensor:
    """The parameters in the order of the program's, (P, N)."""
    values = parameters(neuron)
    rows = [per_neuron(values[name], like) for name in equations(neuron).program.params]
    return torch.stack(rows) if rows else like.new_empty(0, like.shape[-1])


class ByKernel:
    """A module that runs through a :class:`Stepper`, as long as it is what its description says.

    Args:
        readout: whether its output is its membrane.
        names: of its states.
        steps: of a block of derivatives.
    """

    def __init__(self, layer: Layer, readout: bool, names: Sequence[str], steps: int) -> None:
        self.layer, self.readout, self.names, self.steps = layer, readout, names, steps
        self.stepper: Stepper | None = None
        self._describe()

    def _describe(self) -> None:
        module, adapter = self.layer.module, self.layer.adapter
        found = described(module, adapter, self.readout)
        self.why_not = found if isinstance(found, str) else ""
        self.neuron = None if isinstance(found, str) else found
        self.description = Description(adapter or Adapter(), module)
        if self.stepper is not None and (self.neuron is None or not self.stepper.runs(self.neuron)):
            self.stepper = None

    def stepper_for(self, like: Tensor) -> Stepper | None:
        """What runs steps of states (B, N) like this one now; None where autograd has to."""
        if not self.description.holds(self.layer.module) or self.description.changed_in_place():
            self._describe()
        if self.neuron is None or not (on_cpu(like) or on_triton(like)):
            return None
        if self.stepper is None or (self.stepper.shape, self.stepper.dtype) != (like.shape, like.dtype):
            try:
                self.stepper = Stepper(self.neuron, self.names, self.readout, like, self.steps)
            except RuntimeError as error:
                self.neuron, self.why_not = None, str(error)
        return self.stepper

    def refuse(self, why: str) -> None:
        """Leave the module to autograd."""
        self.neuron, self.stepper, self.why_not = None, None, why

    def release(self) -> None:
        """The derivatives so far have been used."""
        if self.stepper is not None:
            self.stepper.release()
