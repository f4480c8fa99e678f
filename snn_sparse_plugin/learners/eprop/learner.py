"""The learner: step by step, over whole sequences, and saved to go on later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import resume
from .sequence import RunResult, run
from .stepwise import Stepwise


class EProp(Stepwise):
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
        >>> import torch
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

    def state_dict(self) -> dict[str, Any]:
        """Traces, rates, feedback and gradients not flushed yet; also hidden states that modules keep inside.

        A chunk that is under way is closed for it, which changes sums by rounding only.
        """
        return resume.saved(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. The model's weights, and states you pass, are yours to restore.

        Raises:
            ConfigError: a state of another model.
            InputError: no such state, or one whose parts do not fit the model.
        """
        resume.restore(self, state)
