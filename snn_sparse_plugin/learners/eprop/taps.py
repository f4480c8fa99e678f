"""Linear layers that remember what they received, and taps that catch the gradient of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...core.errors import UnsupportedError


@dataclass(eq=False)
class Call:
    """One call of a linear layer: the parameters (None where not trained) and what they received, (…, M)."""

    name: str
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    given: Tensor  # with its graph to whatever lies below
    feedback: Tensor | None = None  # takes the place of the weight on the way back

    def __post_init__(self) -> None:
        self.pre = self.given.detach()
        self.version = 0 if self.pre.is_inference() else self.pre._version

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


def received(calls: Sequence[Call]) -> Tensor:
    """What some calls of a layer received, (K, …); without a copy where these are the steps of one tensor.

    Raises:
        UnsupportedError: a tensor was written to between two of them.
    """
    seen: dict[int, int] = {}
    for call in calls:
        # the version alone says little: the tensor of which this is a part may have been written to elsewhere
        if seen.setdefault(call.pre.data_ptr(), call.version) != call.version:
            raise UnsupportedError(
                f"e-prop: what {call.name} received was written to in place before its chunk was over; make a new "
                "tensor for each step instead, or use a smaller chunk=."
            )
    parts = [call.pre for call in calls]
    first, *others = parts
    if others:
        offset, step = first.storage_offset(), others[0].storage_offset() - first.storage_offset()
        storage, shape, stride = first.untyped_storage().data_ptr(), first.shape, first.stride()
        if step > 0 and all(
            x.untyped_storage().data_ptr() == storage
            and (x.storage_offset(), x.shape, x.stride()) == (offset + k * step, shape, stride)
            for k, x in enumerate(parts)
        ):
            return first.as_strided((len(parts), *shape), (step, *stride))
    return torch.stack(parts)


_anchors: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def anchor(like: Tensor) -> Tensor:
    """A leaf that makes autograd record what hangs on it; it never gets a gradient."""
    key = like.dtype, like.device
    if key not in _anchors:
        _anchors[key] = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
    return _anchors[key]


def leaf(x: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    """A tap without a graph below: ``x`` as a leaf that hands its gradient to ``receive``."""
    out = x.detach().requires_grad_()
    out.register_hook(receive)
    return out


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
