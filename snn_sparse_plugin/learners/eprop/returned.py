"""What a step of a neuron module returns, with taps or leaves that catch the gradients of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...core.errors import UnsupportedError
from .record import Record
from .states import mapped
from .stepper import Stepper
from .structure import Layer
from .taps import Tap, anchor, leaf


class Returned:
    """Stands between one module and a loss.

    Args:
        guard: raises where a gradient arrives at a step that is over.
        receive: takes a gradient that arrives at hidden spikes; what it returns goes on below.
    """

    def __init__(
        self,
        layer: Layer,
        readout: bool,
        guard: Callable[[Record], None],
        receive: Callable[[Record, Tensor], Tensor | None],
    ) -> None:
        self.name, self.readout, self.guard, self.receive = layer.name, readout, guard, receive
        self.of_a_library = layer.adapter is not None
        self.sequence = layer.adapter is not None and layer.adapter.takes_sequence(layer.module)

    def _keep(self, record: Record) -> Callable[[Tensor], None]:
        """Takes gradients of a readout: they are sent down later, by the feedback."""

        def receive(grad: Tensor) -> None:
            self.guard(record)
            grad = flat(grad, self.sequence)
            record.direct = grad if record.direct is None else record.direct + grad

        return receive

    def current(self, x: Tensor, record: Record) -> Tensor:
        """A readout's current, cut from its graph."""
        return Tap.apply(x.detach(), anchor(x), self._keep(record))

    def current_alone(self, x: Tensor, record: Record) -> Tensor:
        """The same as a leaf."""
        return leaf(x, self._keep(record))

    def leaves(self, out: Any, z: Tensor, record: Record) -> Any:
        """What a step returns, with leaves in place of its tensors."""

        def receive(grad: Tensor) -> None:
            self.receive(record, flat(grad, self.sequence))

        record.spikes = leaf(z, receive)

        def replace(x: Tensor) -> Tensor:
            if x is z:
                return record.spikes  # type: ignore[return-value]
            return leaf(x, self.refuse) if x.is_floating_point() else x

        return mapped(out, replace)

    def output(self, out: Any, z: Tensor, spikes: Tensor, stepper: Stepper, record: Record) -> Any:
        """What a step of a readout returns, with leaves: a loss may use its output, and spikes that hang on it."""

        receive = self._keep(record)

        def through_spikes(grad: Tensor) -> None:
            receive(grad * stepper.neuron.surrogate.grad(z - stepper.threshold))

        def replace(x: Tensor) -> Tensor:
            if x is z:
                return leaf(x, receive)
            return leaf(x, through_spikes if x is spikes else self.refuse)

        return mapped(out, replace)

    def only_output(self, out: Any, z: Tensor) -> Any:
        """What a step of a readout returns: of its states a loss may use the output alone."""
        if not self.of_a_library:
            return out
        first = out[0] if isinstance(out, tuple) else out

        def replace(x: Tensor) -> Tensor:
            if x is z or x is first or not x.requires_grad:
                return x
            return Tap.apply(x.detach(), anchor(x), self.refuse)

        return mapped(out, replace)

    def refuse(self, grad: Tensor) -> None:
        raise UnsupportedError(
            f"e-prop: the loss uses the state of {'readout' if self.readout else 'hidden layer'} {self.name}; it "
            "may use hidden spikes and the readout's output. Use eprop.detached(model)."
        )

    def tapped(self, out: Any, z: Tensor, record: Record) -> Any:
        """What a step returns, with taps: gradients of its spikes go on to the layers below."""

        def receive(grad: Tensor) -> Tensor | None:
            return self.receive(record, flat(grad, self.sequence))

        tapped = Tap.apply(z.detach(), anchor(z), receive, *record.below)

        def replace(x: Tensor) -> Tensor:
            if x is z:
                return tapped
            return Tap.apply(x.detach(), anchor(x), self.refuse) if x.is_floating_point() else x

        return mapped(out, replace)


def flat(x: Tensor, sequence: bool) -> Tensor:
    """(B, N) of one step."""
    return x[0] if sequence and x.dim() == 3 else x
