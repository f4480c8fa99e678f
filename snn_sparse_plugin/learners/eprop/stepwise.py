"""The learner step by step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, InputError
from . import distributed
from .checks import check_call, check_shared, open_steps, unchanged
from .compiled import Network
from .feedback import Feedback
from .layer import WatchedLayer
from .options import FiringRate, check_options, infer_filter, one_pole, same_filter
from .record import Record
from .scan import NO_MEMORY, Filter, Jacobian
from .signals import Signals
from .structure import find, replaced
from .taps import Call, tracked

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on

log = logging.getLogger("snn_sparse_plugin")


class Stepwise:
    """Watches a model step by step, gathers learning signals, and writes gradients; see :class:`EProp`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        readout: nn.Module | None = None,
        kappa: float | Literal["auto"] = "auto",
        feedback: Literal["symmetric", "random", "adaptive"] | Tensor = "symmetric",
        engine: Literal["auto", "chunk", "offline", "step"] = "auto",
        chunk: int = 64,
        rate_reg: FiringRate | None = None,
        trace_dtype: torch.dtype | None = None,
        update: Literal["sequence", "chunk", "step"] = "sequence",
        neurons: Iterable[nn.Module] | None = None,
        feedback_decay: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        check_options(engine, update, chunk, kappa, rate_reg, trace_dtype, feedback_decay)
        self.wrapper, self.model = model, distributed.inner(model)
        self.kappa, self.rate_reg, self.update = kappa, rate_reg, update
        self.engine: str = "chunk" if engine == "auto" else engine
        self.chunk = 1 if update == "step" or self.engine == "step" else chunk
        self.trace_dtype = trace_dtype
        self.structure = find(self.model, readout, neurons)
        self.filter: Filter | None = None if kappa == "auto" else one_pole(kappa)
        self.names = {p: name for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.carriers = Feedback(feedback, feedback_decay, generator)
        self._stack: ExitStack | None = None
        self._told = False
        self._confirmed: Jacobian = {}  # derivatives of the readout that have been found to be the filter's
        self.last_state: Any = None  # of the model, after run()
        self.compiled: Network | None = None  # what run() keeps where kernels do the work
        self._spare: Network | None = None
        self.hidden = [WatchedLayer(x, self) for x in self.structure.hidden]
        self.readout = WatchedLayer(self.structure.readout, self, readout=True)
        self.signals = Signals(self.hidden, self.readout, self.names)
        self.reset()

    def __repr__(self) -> str:
        hidden = ", ".join(x.name for x in self.hidden)
        notes = f", approximation: {'; '.join(self.approximations)}" if self.approximations else ""
        where = f"hidden: {hidden}; readout: {self.readout.name}"
        return f"EProp({where}; engine={self.engine!r}, chunk={self.chunk}{notes})"

    @property
    def approximations(self) -> tuple[str, ...]:
        """What of the gradient is not exact, in words."""
        return self.signals.approximations

    @property
    def layers(self) -> list[WatchedLayer]:
        return [*self.hidden, self.readout]

    # --- attaching ---

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise ConfigError("this learner is attached already; use one per block.")
        with ExitStack() as stack:
            stack.enter_context(distributed.no_sync(self.wrapper))
            stack.enter_context(replaced(self._forwards()))
            self._stack = stack.pop_all()
        self.reset()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        assert self._stack is not None
        try:
            if kind is None:
                self.flush()
        finally:
            self._stack.close()
            self._stack = None
            self._drop()

    def _forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        inside = {m for x in self.layers for m in x.module.modules() if m is not x.module}
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and module not in inside and module is not self.readout.module:
                forwards[module] = self._linear(module)
        return forwards | {x.module: x.attach() for x in self.layers}

    def _linear(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        plain = module.forward

        def forward(x: Tensor) -> Tensor:
            return tracked(self.call_of(module, x), x) if torch.is_grad_enabled() else plain(x)

        return forward

    def call_of(self, module: nn.Linear, x: Tensor) -> Call:
        """What is remembered of a call of a Linear; one pruned by ``torch.nn.utils.prune`` has a mask."""
        name = self.name_of(module._parameters.get("weight_orig", module.weight))
        if not x.is_floating_point():
            raise InputError(f"{name or 'Linear'}: expected a floating input, got {x.dtype}.")
        return Call(name, module.weight, module.bias, module._buffers.get("weight_mask"), x)

    def _name_untrained(self) -> None:
        """Say once which parameters have no gradient at the end of a sequence, and never will."""
        if self._told or not self.readout.synapses:
            return
        self._told = True
        learned = {name for x in self.layers for name in x.synapses}
        names = [n for p, n in self.names.items() if p.requires_grad and p.grad is None and n not in learned]
        if names:
            log.warning(
                "e-prop trains weights and biases of the linear layers before neurons and readout; "
                "%s got no gradient",
                ", ".join(names),
            )

    # --- learning ---

    def reset(self) -> None:
        """Begin new sequences: traces, rates and gradients that were not flushed are forgotten."""
        self.steps_seen = 0
        self._batch: int | None = None
        self._versions: dict[str, int] | None = None
        self._spare = self.compiled or self._spare
        self.compiled = None
        self._drop()
        for layer in self.layers:
            layer.reset()
        self.carriers.follow(self.names)

    def _drop(self) -> None:
        for layer in self.layers:
            layer.open, layer.pending = [], []

    def step(self, loss: Tensor | None = None) -> bool:
        """End a time step with its loss; None where it has none.

        Args:
            loss: scalar, a function of this step's outputs alone: its readout and, if you like, hidden spikes.

        Returns:
            Whether gradients were written to ``.grad``, after which weights may change.

        Raises:
            UnsupportedError: the loss refers to an earlier step.
        """
        if self._stack is None:
            raise ConfigError("the learner is not attached: use it inside `with EProp(model) as learner:`.")
        steps = open_steps(self.layers)
        if loss is not None:
            self.signals.backward(loss, self.filter)
        for layer in self.layers:
            layer.close(steps)
        self.steps_seen += steps
        if self.engine != "offline" and len(self.readout.pending) >= self.chunk:
            self.process(carry=True)
            if self.update != "sequence":
                self.deliver()
                return True
        return False

    def flush(self) -> None:
        """Write the gradient of all steps so far to ``.grad``; traces stay, so that a sequence may go on."""
        if self.engine == "offline":
            self.process(carry=False)
            for layer in self.layers:
                layer.ended = True
        else:
            self.process(carry=True)
        self.deliver()
        self._name_untrained()

    def compile(self) -> Network:
        """Begin with the kernels of run(), in the memory of the sequence before."""
        self.compiled = Network(
            self.model,
            self.hidden,
            self.readout,
            memory=self.filter,
            feedback=self.carriers,
            names=self.names,
            rate_reg=self.rate_reg,
            carry=self.engine != "offline",
            spare=self._spare,
        )
        self._spare = None
        return self.compiled

    def block_size(self) -> int:
        """How many steps run() takes at a time."""
        return sys.maxsize if self.engine == "offline" else self.chunk

    # --- what layers ask ---

    def knows(self, layer: WatchedLayer) -> bool:
        """Whether the first steps have shown how errors come to a layer: its later steps need no graph then."""
        if self.engine == "step":
            return False
        if layer is self.readout:
            return self.kappa == "auto" and self.filter is not None
        return self.signals.indirect is not None and not self.signals.indirect

    def check_readout(self, local: Jacobian, states: int) -> None:
        """A readout whose memory was inferred still is that filter."""
        if self.kappa != "auto" or self.filter is None or not self._has_memory():
            return
        numbers = not any(isinstance(value, Tensor) for value in local.values())
        if numbers and local == self._confirmed:  # as in the chunk before
            return
        same_filter(local, states, self.readout.name, self.filter)
        self._confirmed = local if numbers else {}

    def _has_memory(self) -> bool:
        return not isinstance(self.readout.module, nn.Linear)

    def ran(self, layer: WatchedLayer, records: list[Record], fresh: bool) -> None:
        """A layer ran some steps: the checks that keep the sum exact."""
        check_call(layer, records, fresh, self._batch)
        self._batch = records[0].z.shape[0]
        self.check_versions()
        check_shared(layer, self.layers, records)
        if layer is self.readout and self.kappa == "auto" and self._has_memory():
            for record in records:
                if self.filter is None:
                    self.filter = infer_filter(record.jacobian(), record.states, layer.name)
        if layer is self.readout:
            for record in records:
                for call in record.calls:
                    call.feedback = self.carriers.of(call.weight, call.name)

    def check_versions(self) -> None:
        """Weights are those that the sequence began with."""
        self._versions = unchanged(self.names, self._versions)

    def receive(self, layer: WatchedLayer, record: Record, grad: Tensor) -> Tensor | None:
        """A learning signal arrives at the spikes of a hidden layer; returns what goes on below."""
        return self.signals.receive(layer, record, grad)

    def filter_of(self, layer: WatchedLayer, like: Tensor) -> Filter:
        """The memory behind a layer's outputs."""
        found = NO_MEMORY if layer is self.readout or self.filter is None else self.filter
        return Filter(found.A.to(like), found.b.to(like), found.out)

    # --- gradients ---

    def process(self, carry: bool) -> None:
        for layer in self.layers:
            kind = layer.pending[0].z.device.type if layer.pending else "cpu"
            with torch.autocast(kind, enabled=False):  # step() may be called inside autocast
                layer.process(carry)

    @torch.no_grad()
    def deliver(self) -> None:
        """Write what was gathered to ``.grad``."""
        by_name = {name: p for p, name in self.names.items()}
        found = [pair for layer in self.layers for pair in layer.gradients()]
        grads = distributed.averaged(self.wrapper, [g for _, g in found])
        for (name, _), grad in zip(found, grads, strict=True):
            parameter = by_name[name]
            grad = grad.to(parameter.dtype).view_as(parameter)
            for hook in (parameter._backward_hooks or {}).values():
                changed = hook(grad)
                grad = grad if changed is None else changed
            parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad
        if self.update != "sequence":
            self._versions = None  # from here on weights may be others

    def name_of(self, parameter: Tensor | None) -> str:
        """The name of a parameter of the model; of anything else ``""``."""
        return self.names.get(parameter, "")  # type: ignore[arg-type, call-overload]

    def spike_counts(self) -> dict[str, tuple[float, int]]:
        """Spikes of every hidden layer since :meth:`reset`, and its neurons times samples."""
        return {x.name: (float(x.spikes), x.size) for x in self.hidden}
