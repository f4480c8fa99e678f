"""The learner: watches a model step by step, gathers learning signals, and writes gradients."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError, InputError, UnsupportedError
from . import distributed
from .checks import check_call, check_shared, open_steps, unchanged
from .compiled import Network
from .feedback import Feedback
from .layer import WatchedLayer
from .options import ENGINES, UPDATES, FiringRate, check_option, infer_filter, one_pole, same_filter
from .scan import NO_MEMORY, Filter, Jacobian
from .sequence import RunResult, run
from .structure import Layer, find, replaced
from .taps import Call, tracked
from .watch import Record

log = logging.getLogger("snn_sparse_plugin")


class EProp:
    """Trains the linear layers of a spiking model online by e-prop: exact, with memory that does not grow with time.

    Inside the block an unmodified snnTorch or Norse model is called step by step as usual, and :meth:`step` takes
    the loss of each step. No graph is kept from one step to the next. :meth:`flush` writes ``.grad``, so that
    optimizers, schedulers, clipping and gradient scaling work as ever. Under ``torch.no_grad()`` the model runs as
    it is and nothing is learned.

    What it computes, and what it does not, is written in ``docs/eprop.md``; for a loss that is a sum over steps the
    gradient equals that of ordinary backward under :func:`detached`.

    Args:
        model: any module; its hidden layers are Linear layers followed by spiking neurons, or recurrent neurons with
            weights of their own. A model wrapped in ``DistributedDataParallel`` averages gradients once per flush.
        readout: the readout, found if not given: a leaky integrator, a Linear, or snnTorch's last neuron.
        kappa: decay of the readout in one step; ``"auto"`` infers it, also for readouts with a synapse.
        feedback: ``"symmetric"`` (the readout's weights carry errors back), ``"random"`` (fixed random weights
            instead), ``"adaptive"`` (random at first, then changed as the readout's weights are, both with the decay
            ``feedback_decay`` per update: Kolen & Pollack), or a tensor in the shape of the readout's weight.
        engine: ``"chunk"`` (exact; the default, ``"auto"``), ``"offline"`` (exact; the whole sequence is one chunk, no
            traces, memory grows with time) or ``"step"`` (the textbook rule; slow, for reference).
        chunk: steps per chunk. Memory grows with it, and the time for traces falls.
        rate_reg: :class:`FiringRate` regularisation of the hidden layers, or None.
        trace_dtype: dtype in which traces per synapse are kept between chunks; None: that of the weights.
        update: when gradients reach ``.grad``: at :meth:`flush` (``"sequence"``), also after each ``"chunk"``, or after
            each ``"step"``. Only then may weights change within a sequence.
        neurons: the hidden neuron modules, if they should not be found: any elementwise ``forward(current, *state)
            -> (spikes, *state)``.
        feedback_decay: see ``feedback``.
        generator: draws random feedback.

    Raises:
        ConfigError: an unknown option, no hidden neuron, no readable readout.
        UnsupportedError: while running: something e-prop cannot do exactly; the message says what and what can.

    Example:
        >>> from snn_sparse_plugin.learners import eprop
        >>> net = eprop.LSNNNetwork(3, 5, 2)
        >>> with eprop.EProp(net) as learner:
        ...     state = None
        ...     for x in torch.ones(7, 1, 3):
        ...         y, state = net(x, state)
        ...         _ = learner.step(y.square().sum())
        ...     learner.flush()
        >>> net.layers[0].input_weights.grad.shape
        torch.Size([5, 3])
    """

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
        check_option("engine", engine, ENGINES)
        check_option("update", update, UPDATES)
        if not isinstance(chunk, int) or chunk < 1:
            raise ConfigError(f"EProp(chunk={chunk!r}): a chunk has at least one step.")
        if trace_dtype is not None and not trace_dtype.is_floating_point:
            raise ConfigError(f"EProp(trace_dtype={trace_dtype}): must be a floating dtype.")
        if engine == "offline" and update != "sequence":
            raise ConfigError(
                'EProp(engine="offline") knows gradients at the end only: use update="sequence".'
            )
        self.wrapper, self.model = model, distributed.inner(model)
        self.kappa, self.rate_reg, self.update = kappa, rate_reg, update
        self.engine = "chunk" if engine == "auto" else engine
        self.chunk = 1 if update == "step" or self.engine == "step" else chunk
        self.trace_dtype = trace_dtype
        self.structure = find(self.model, readout, neurons)
        self._filter: Filter | None = None if kappa == "auto" else one_pole(kappa)
        self._names = {p: name for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.carriers = Feedback(feedback, feedback_decay, generator)
        self._stack: ExitStack | None = None
        self._told = False
        self._passing, self._phase = False, ""
        self.last_state: Any = None  # of the model, after run()
        self.approximations: tuple[str, ...] = ()
        self._indirect: set[str] | None = None
        self.compiled: Network | None = None  # what run() keeps where kernels do the work
        self._spare: Network | None = None
        self.hidden = [WatchedLayer(x, self) for x in self.structure.hidden]
        self.readout = WatchedLayer(self.structure.readout, self, readout=True)
        self.reset()

    def __repr__(self) -> str:
        hidden = ", ".join(x.name for x in self.hidden)
        notes = f", approximation: {'; '.join(self.approximations)}" if self.approximations else ""
        where = f"hidden: {hidden}; readout: {self.readout.name}"
        return f"EProp({where}; engine={self.engine!r}, chunk={self.chunk}{notes})"

    @property
    def layers(self) -> list[WatchedLayer]:
        return [*self.hidden, self.readout]

    # --- attaching ---

    def __enter__(self) -> EProp:
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
        names = [n for p, n in self._names.items() if p.requires_grad and p.grad is None and n not in learned]
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
        self.carriers.follow(self._names)

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
            self._backward(loss)
        for layer in self.layers:
            layer.close(steps)
        self.steps_seen += steps
        if self.engine != "offline" and len(self.readout.pending) >= self.chunk:
            self._process(carry=True)
            if self.update != "sequence":
                self.deliver()
                return True
        return False

    def flush(self) -> None:
        """Write the gradient of all steps so far to ``.grad``; traces stay, so that a sequence may go on."""
        if self.engine == "offline":
            self._process(carry=False)
            for layer in self.layers:
                layer.ended = True
        else:
            self._process(carry=True)
        self.deliver()
        self._name_untrained()

    def run(
        self,
        x: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        targets: Any = None,
        *,
        per_step: bool = False,
        fresh: bool = True,
        state: Any = None,
        on_update: Callable[[], Any] | None = None,
        keep_outputs: bool = False,
    ) -> RunResult:
        """Run a whole sequence and flush.

        Args:
            x: (T, B, …), dense or a ``SpikeTrain``; or an iterable of blocks (K, B, …), each alone or with its targets
                as a pair, for inputs longer than memory.
            loss_fn: ``loss_fn(output, target)`` of one step, a scalar; the gradient is that of its sum over steps.
            targets: passed to every step, or with ``per_step`` its t-th entry to step t.
            fresh: False goes on where the last run ended.
            state: of the model before the first step, for models that take ``(x, state)``.
            on_update: called whenever gradients were written before the end (``update="chunk"``, ``"step"``), e.g.
                to step an optimizer and zero gradients.
            keep_outputs: also return all outputs, stacked.
        """
        return run(
            self, x, loss_fn, targets,
            per_step=per_step, fresh=fresh, state=state, on_update=on_update, keep_outputs=keep_outputs,
        )  # fmt: skip

    def compile(self) -> Network:
        """Begin with the kernels of run(), in the memory of the sequence before."""
        self.compiled, self._spare = Network(self, self._spare), None
        return self.compiled

    def block_size(self) -> int:
        """How many steps run() takes at a time."""
        return sys.maxsize if self.engine == "offline" else self.chunk

    # --- the parts of a step ---

    def _backward(self, loss: Tensor) -> None:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"learner.step(loss): the loss must be one number, got {shape}.")
        if not loss.requires_grad:
            raise UnsupportedError(
                "learner.step(loss): the loss does not depend on this step's outputs. Where a step has no loss, call "
                "learner.step()."
            )
        self._phase = "direct"
        loss.backward()
        self._phase = "filtered"
        roots, signals = [], []
        for record in self.readout.open:
            if record.direct is not None:
                scale = self._scale(record)
                if isinstance(scale, float) and scale == 0:
                    raise UnsupportedError(
                        f"e-prop: readout {self.readout.name} answers a current only in the step after it; use "
                        "eprop.detached(model)."
                    )
                if scale is not None:
                    record.direct = record.direct / scale
                for below in record.below:
                    roots.append(below)
                    signals.append(record.direct)
        if not roots or self._carry_later():
            return
        learning = [x for x in self.hidden if x.learns()]
        again = self._indirect is None or bool(self._indirect)
        others = self._others() if self._indirect is None else {}
        torch.autograd.backward(roots, signals, retain_graph=again)
        reached = [name for name, before in others.items() if self._others()[name] != before]
        if reached:
            raise UnsupportedError(
                f"e-prop: {reached[0]} stands between a hidden layer and the readout, where only Linear layers learn. "
                "Freeze it, or use eprop.detached(model)."
            )
        if self._indirect is None:
            self._indirect = {x.name for x in learning if all(r.filtered is None for r in x.open)}
            if self._indirect:
                self.approximations = (
                    f"{', '.join(sorted(self._indirect))} learn from what reaches them through the layers above within "
                    "a step",
                )
                log.warning("e-prop: %s; the memory of those layers is left out", self.approximations[0])
        if self._indirect:
            self._passing = True
            try:
                torch.autograd.backward(roots, signals)
            finally:
                self._passing = False

    def _scale(self, record: Record) -> float | Tensor | None:
        """What the readout's output is per unit of its current; None: one."""
        if record.local is None:
            assert self._filter is not None
            scale = float(self._filter.b[self._filter.out])
        else:
            found = record.local.get((0, 0), 0.0)
            if isinstance(found, Tensor):
                return found
            scale = found
        return None if scale == 1 else scale

    def _carry_later(self) -> bool:
        """Leave the way from readout to spikes to the end of the chunk, where it is known: weights and nothing else."""
        hidden = {id(r.spikes): r for x in self.hidden for r in x.open if r.spikes is not None}
        records = [r for r in self.readout.open if r.direct is not None]
        pairs = [(r, call, hidden.get(id(call.given))) for r in records for call in r.calls]
        if not all(target is not None and call.name for _, call, target in pairs):
            return False
        for record, call, target in pairs:
            target.carried.append((record, call))  # type: ignore[union-attr]
        return True

    def knows(self, layer: WatchedLayer) -> bool:
        """Whether the first steps have shown how errors come to a layer: its later steps need no graph then."""
        if self.engine == "step":
            return False
        if layer is self.readout:
            return self.kappa == "auto" and self._filter is not None
        return self._indirect is not None and not self._indirect

    def check_readout(self, local: Jacobian, states: int) -> None:
        """A readout whose memory was inferred still is that filter."""
        if self.kappa == "auto" and self._filter is not None and self._has_memory():
            same_filter(local, states, self.readout.name, self._filter)

    def _others(self) -> dict[str, tuple[int, int] | None]:
        """Parameters that no layer learns, with a mark that changes with their gradient."""
        biases = {self.name_of(c.bias) for x in self.layers for r in x.open for c in r.calls}
        learned = biases.union(*(x.weights for x in self.layers))
        return {
            name: None if p.grad is None else (id(p.grad), p.grad._version)
            for p, name in self._names.items()
            if p.requires_grad and name not in learned
        }

    def _has_memory(self) -> bool:
        return not isinstance(self.readout.module, nn.Linear)

    def receive(self, layer: WatchedLayer, record: Record, grad: Tensor) -> Tensor | None:
        """A learning signal arrives at the spikes of a hidden layer; returns what goes on below."""
        if self._passing and not any(record is r for r in layer.open):
            return None  # what feeds back into a layer above came a step before
        layer.guard(record)
        if self._phase == "direct":
            record.direct = grad if record.direct is None else record.direct + grad
        elif not self._passing or layer.name in (self._indirect or ()):
            record.filtered = grad if record.filtered is None else record.filtered + grad
        return (
            grad * record.local[0, 0] if self._passing and record.local and (0, 0) in record.local else None
        )

    def ran(self, layer: WatchedLayer, records: list[Record], fresh: bool) -> None:
        """A layer ran some steps: the checks that keep the sum exact."""
        check_call(layer, records, fresh, self._batch)
        self._batch = records[0].z.shape[0]
        self.check_versions()
        check_shared(layer, self.layers, records)
        if layer is self.readout and self.kappa == "auto" and self._has_memory():
            for record in records:
                if self._filter is None:
                    self._filter = infer_filter(record.local or {}, record.states, layer.name)
        if layer is self.readout:
            for record in records:
                for call in record.calls:
                    call.feedback = self.carriers.of(call.weight, call.name)

    def check_versions(self) -> None:
        """Weights are those that the sequence began with."""
        self._versions = unchanged(self._names, self._versions)

    def filter_of(self, layer: WatchedLayer, like: Tensor) -> Filter:
        """The memory behind a layer's outputs."""
        found = NO_MEMORY if layer is self.readout or self._filter is None else self._filter
        return Filter(found.A.to(like), found.b.to(like), found.out)

    # --- gradients ---

    def _process(self, carry: bool) -> None:
        for layer in self.layers:
            kind = layer.pending[0].z.device.type if layer.pending else "cpu"
            with torch.autocast(kind, enabled=False):  # step() may be called inside autocast
                layer.process(carry)

    @torch.no_grad()
    def deliver(self) -> None:
        """Write what was gathered to ``.grad``."""
        by_name = {name: p for p, name in self._names.items()}
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

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Traces, rates, feedback and gradients not flushed yet; also hidden states that modules keep inside.

        A chunk that is under way is closed for it, which changes sums by rounding only.
        """
        if any(x.open for x in self.layers):
            raise ConfigError("state_dict() in the middle of a step: call it after learner.step().")
        if self.engine == "offline" and self.readout.pending:
            raise UnsupportedError('engine="offline" has no state within a sequence; use engine="chunk".')
        self._process(carry=True)
        return {
            "steps_seen": self.steps_seen,
            "batch": self._batch,
            "filter": self._filter,
            "indirect": self._indirect,
            "feedback": self.carriers.state_dict(),
            "layers": {x.name: x.state_dict() for x in self.layers},
            "compiled": [
                {k: v.clone() for k, v in part.items()}
                for part in ([] if self.compiled is None else self.compiled.tensors())
            ],
            "buffers": {f"{layer.name}.{k}": v.detach().clone() for layer, k, v in self._hidden_buffers()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. The model's weights, and states you pass, are yours to restore.

        Raises:
            ConfigError: a state of another model.
        """
        names = {x.name for x in self.layers}
        if state.get("layers", {}).keys() != names:
            raise ConfigError(
                f"this state belongs to layers {sorted(state.get('layers', {}))}, the model has {sorted(names)}."
            )
        self.reset()
        self.steps_seen, self._batch = state["steps_seen"], state["batch"]
        self._filter, self._indirect = state["filter"], state["indirect"]
        self.carriers.load_state_dict(state["feedback"])
        for layer in self.layers:
            layer.load_state_dict(state["layers"][layer.name])
        if state["compiled"]:
            self.compile().restore(state["compiled"])
        modules = dict(self.model.named_modules())
        for name, value in state["buffers"].items():
            owner, _, buffer = name.rpartition(".")
            setattr(modules[owner], buffer, value.clone())

    def name_of(self, parameter: Tensor | None) -> str:
        """The name of a parameter of the model; of anything else ``""``."""
        return self._names.get(parameter, "")  # type: ignore[arg-type, call-overload]

    def _hidden_buffers(self) -> Iterator[tuple[Layer, str, Tensor]]:
        # snnTorch keeps hidden states in buffers that its own state_dict leaves out
        for layer in [*self.structure.hidden, self.structure.readout]:
            if getattr(layer.module, "init_hidden", False):
                for name in ("mem", "syn", "spk", "syn_exc", "syn_inh"):
                    if name in layer.module._buffers:
                        yield layer, name, layer.module._buffers[name]  # type: ignore[misc]

    def forget_hidden(self) -> None:
        """Hidden states that modules keep inside begin anew at the next step."""
        for layer, name, value in self._hidden_buffers():
            setattr(layer.module, name, value.new_zeros(0))

    def spike_counts(self) -> dict[str, tuple[float, int]]:
        """Spikes of every hidden layer since :meth:`reset`, and its neurons times samples."""
        return {x.name: (float(x.spikes), x.size) for x in self.hidden}
