"""One layer under a learner: its steps since the last chunk, and the traces of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedError
from ...core.precision import state_dtype
from .local import Part, joined
from .options import FiringRate
from .record import Record
from .returned import Returned
from .rule import RULES, ChunkRule, TextbookRule
from .scan import Filter, Jacobian, Steps
from .states import emptied, hidden
from .structure import Layer
from .synapses import Synapses
from .taps import Call, leaf, received, tracked
from .watch import Neuron


class Learner(Protocol):
    """What a layer asks of its learner."""

    names: dict[nn.Parameter, str]
    engine: str
    chunk: int
    trace_dtype: torch.dtype | None
    rate_reg: FiringRate | None

    def name_of(self, parameter: Tensor | None) -> str: ...

    def call_of(self, module: nn.Linear, x: Tensor) -> Call: ...

    def knows(self, layer: WatchedLayer) -> bool: ...

    def ran(self, layer: WatchedLayer, records: list[Record], fresh: bool) -> None: ...

    def receive(self, layer: WatchedLayer, record: Record, grad: Tensor) -> Tensor | None: ...

    def filter_of(self, layer: WatchedLayer, like: Tensor) -> Filter: ...

    def check_readout(self, local: Jacobian, states: int) -> None: ...


class WatchedLayer:
    """A hidden layer or the readout, with everything a learner keeps for it."""

    def __init__(self, layer: Layer, learner: Learner, readout: bool = False) -> None:
        self.name, self.module, self.layer, self.learner = layer.name, layer.module, layer, learner
        self.is_readout = readout
        self.neuron: Neuron | None = None
        self.weights: set[str] = set()
        self.open: list[Record] = []  # of the step under way
        self.pending: list[Record] = []  # of the chunk under way
        self.synapses: dict[str, Synapses] = {}
        self.reset()

    def reset(self) -> None:
        self.steps, self.ended = 0, False
        self.rule: ChunkRule | TextbookRule | None = None
        self.rate: Tensor | None = None
        self.states: list[int] = []
        self.hidden: tuple[Tensor, ...] = ()  # as the last step left it in the module
        self.spikes: Tensor | float = 0.0
        self.size = 1
        for synapses in self.synapses.values():
            synapses.reset()
            synapses.grad = None

    def takes_sequence(self) -> bool:
        return self.layer.adapter is not None and self.layer.adapter.takes_sequence(self.module)

    def learns(self) -> bool:
        return bool(self.weights)

    def guard(self, record: Record) -> None:
        """Raise unless the record is of the step under way: a gradient has arrived at it."""
        if not any(record is r for r in self.open):
            raise UnsupportedError(
                f"e-prop: the loss given to learner.step() refers to an earlier step of {self.name}. Give each step "
                "its own loss: no sums over time of outputs, losses or spikes. A loss of the time-summed output has "
                "another gradient: use eprop.detached(model) for it."
            )

    # --- watching ---

    def attach(self) -> Callable[..., Any]:
        if isinstance(self.module, nn.Linear):
            return self._linear_readout(self.module)
        learner = self.learner
        returned = Returned(self.layer, self.is_readout, self.guard, partial(learner.receive, self))
        known = partial(learner.knows, self)
        neuron = Neuron(self.layer, learner.names, returned, known, min(learner.chunk, 64))
        self.neuron = neuron

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return neuron.forward(x, *args, **kwargs)
            anew = emptied(self.hidden, hidden(self.module))
            records, out, fresh = neuron.steps(x, args, kwargs)
            self.learner.ran(self, records, fresh or anew)
            self.hidden = hidden(self.module)
            self.open.extend(records)
            return out

        return forward

    def _linear_readout(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        plain = module.forward

        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return plain(x)
            call = self.learner.call_of(module, x)
            graph = tracked(call, x)
            parts = [graph] if graph.dim() == 2 else list(graph.unbind(0))
            records = []
            for t, part in enumerate(parts):
                step = call if graph.dim() == 2 else call.at(t)
                records.append(Record({(0, 0): 1.0}, [step], part.detach(), 0, [part]))
            self.learner.ran(self, records, fresh=False)
            self.open.extend(records)

            def receive(grad: Tensor) -> None:
                grads = [grad] if graph.dim() == 2 else list(grad.unbind(0))
                for record, g in zip(records, grads, strict=True):
                    self.guard(record)
                    record.direct = g if record.direct is None else record.direct + g

            return leaf(graph, receive)

        return forward

    @torch.no_grad()
    def close(self, steps: int) -> None:
        """The step is over: its graph goes, its numbers stay until the chunk is processed."""
        regular = self.learner.rate_reg
        for record in self.open:
            record.below, record.spikes = [], None
            for call in record.calls:
                call.given = call.pre  # its graph goes
            if self.is_readout:
                continue
            self.count(record.z)
            if regular is not None:
                self.rate = regular.follow(self.rate, record.z)
                push = regular.c * (self.rate - regular.target)
                record.direct = push if record.direct is None else record.direct + push
        self.pending.extend(self.open)
        self.steps += steps
        self.open = []

    def count(self, z: Tensor) -> None:
        """Add spikes (…, B, N) to the tally."""
        self.spikes, self.size = self.spikes + z.sum(), z.shape[-1] * z.shape[-2]

    # --- the gradient ---

    def add(self, weight: Tensor, grad: Tensor, mask: Tensor | None) -> None:
        """A part of the gradient of a weight or bias that was found elsewhere."""
        name = self.learner.name_of(weight)
        self.synapses_of(name, grad.shape, mask).add(grad.clone(memory_format=torch.contiguous_format))

    @torch.no_grad()
    def process(self, carry: bool) -> None:
        """Add the gradient of the pending steps."""
        records, self.pending = self.pending, []
        if not records:
            return
        like = records[0].z
        like = like.to(state_dtype(like.dtype))
        if self.rule is None:
            self.rule = RULES[self.learner.engine](self.learner.filter_of(self, like))
        parts = [Part(1, r.local) for r in records if r.local is not None]
        if self.neuron is not None:
            parts = self.neuron.derivatives(records)
        found = joined(parts, like)
        if self.is_readout:
            self.learner.check_readout(found, records[0].states)
        self.states = sorted({*self.states, *(place - 1 for pair in found for place in pair if place > 0)})
        place = {0: 0} | {state + 1: k + 1 for k, state in enumerate(self.states)}
        local = {(place[row], place[column]): v for (row, column), v in found.items()}
        steps = Steps(local, len(self.states), self._filtered(records, like), _direct(records, like))
        self.rule.process(steps, self.states, list(self._inputs(records, like)), carry)
        if self.neuron is not None and self.neuron.kernel is not None:
            self.neuron.kernel.release()

    def _filtered(self, records: list[Record], like: Tensor) -> Tensor:
        """The learning signals that come through the readout, (K, B, N)."""
        out: Tensor | None = None
        carried: dict[tuple[int, int], list[tuple[int, Tensor, Call]]] = {}
        for t, record in enumerate(records):
            if record.filtered is not None:
                out = like.new_zeros(len(records), *like.shape) if out is None else out
                out[t] += record.filtered
            for above, call in record.carried:
                assert above.direct is not None
                carried.setdefault((id(call.weight), id(call.feedback)), []).append((t, above.direct, call))
        for group in carried.values():
            call = group[0][2]
            errors = torch.stack([error for _, error, _ in group])
            weight = call.weight if call.feedback is None else call.feedback
            back = (errors.flatten(0, 1) @ weight.detach().to(errors.dtype)).to(like.dtype)
            back = back.view(len(group), *like.shape)
            steps = [t for t, _, _ in group]
            if out is None and steps == [*range(len(records))]:
                out = back
                continue
            out = like.new_zeros(len(records), *like.shape) if out is None else out
            out.index_add_(0, torch.tensor(steps, device=like.device), back)
        return like.new_zeros(len(records), *like.shape) if out is None else out

    def _inputs(self, records: list[Record], like: Tensor) -> Iterator[tuple[Synapses, Tensor]]:
        """Weights and biases that learn, with what they received, (K, B, M); zeros in steps that did not use them."""
        trained = {name for parameter, name in self.learner.names.items() if parameter.requires_grad}
        weights: dict[str, dict[int, Call]] = {}
        biases: dict[str, dict[int, Call]] = {}
        for t, record in enumerate(records):
            for call in record.calls:
                weights.setdefault(call.name, {})[t] = call
                biases.setdefault(self.learner.name_of(call.bias), {})[t] = call
        steps = range(len(records))
        for name in [n for n in weights if n in trained]:
            calls = weights[name]
            call = next(iter(calls.values()))
            x = received([calls[t] for t in steps if t in calls]).to(like.dtype)
            if len(calls) < len(steps):
                x = x.new_zeros(len(steps), *x.shape[1:]).index_copy_(
                    0, torch.tensor([*calls]).to(x.device), x
                )
            yield self.synapses_of(name, call.weight.shape, call.mask), x
        for name in [n for n in biases if n in trained]:
            always = len(biases[name]) == len(steps)
            used = like.new_ones(1) if always else like.new_tensor([float(t in biases[name]) for t in steps])
            x = used[:, None, None].expand(len(steps), like.shape[0], 1)
            bias = next(iter(biases[name].values())).bias
            assert bias is not None
            yield self.synapses_of(name, (bias.numel(), 1), None), x
        for name, synapses in self.synapses.items():  # of earlier chunks: their traces go on
            if name not in weights and name not in biases:
                yield synapses, like.new_zeros(len(records), like.shape[0], synapses.shape[1])

    def synapses_of(self, name: str, shape: Any, mask: Tensor | None) -> Synapses:
        """What is kept of a weight or bias."""
        if name not in self.synapses:
            self.synapses[name] = Synapses(shape, mask, self.learner.trace_dtype)
        return self.synapses[name]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Names of parameters and what they gathered since the last time."""
        for name, synapses in self.synapses.items():
            if (grad := synapses.take()) is not None:
                yield name, grad

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        shared = self.rule.shared if isinstance(self.rule, ChunkRule) else None
        return {
            "steps": self.steps,
            "rate": None if self.rate is None else self.rate.clone(),
            "states": list(self.states),
            "shared": None if shared is None else {k: dict(v) for k, v in shared.items()},
            "weights": sorted(self.weights),
            "synapses": {name: _saved(s) for name, s in self.synapses.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.states = state["steps"], list(state["states"])
        self.rate = None if state["rate"] is None else state["rate"].clone()
        self.weights = set(state["weights"])
        self.synapses = {}
        for name, saved in state["synapses"].items():
            synapses = self.synapses_of(name, saved["shape"], None)
            synapses.exists, synapses.mask = saved["exists"], saved["mask"]
            synapses.grad = None if saved["grad"] is None else saved["grad"].clone()
            synapses.per_input = {k: v.clone() for k, v in saved["per_input"].items()}
            synapses.per_synapse = {k: v.clone() for k, v in saved["per_synapse"].items()}
            like = next(iter([*synapses.per_input.values(), *synapses.per_synapse.values()]), None)
            if like is not None and self.rule is None:
                self.rule = RULES[self.learner.engine](self.learner.filter_of(self, like))
        if isinstance(self.rule, ChunkRule):
            self.rule.shared = state["shared"]


def _direct(records: list[Record], like: Tensor) -> Tensor:
    """What acts on the spikes themselves, (K, B, N)."""
    found = [record.direct for record in records]
    zero = like.new_zeros(like.shape[-1]).expand(like.shape)
    if all(x is None for x in found):
        return zero.expand(len(found), *like.shape)
    return torch.stack([zero if x is None else x.to(like.dtype) for x in found])


def _saved(synapses: Synapses) -> dict[str, Any]:
    def copies(traces: dict[int, Tensor]) -> dict[int, Tensor]:
        return {k: v.clone() for k, v in traces.items()}

    return {
        "shape": synapses.shape,
        "exists": synapses.exists,
        "mask": synapses.mask,
        "grad": None if synapses.grad is None else synapses.grad.clone(),
        "per_input": copies(synapses.per_input),
        "per_synapse": copies(synapses.per_synapse),
    }
