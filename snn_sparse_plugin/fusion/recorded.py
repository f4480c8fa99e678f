"""A step's result that has not been computed yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .nodes import Node

Value = tuple["Node", int, int]
"""Where a value is made: the node, the number of the call in it, and which of the call's results."""

SET_DATA = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]
_swap = torch._C._swap_tensor_impl  # type: ignore[attr-defined]


class _Answers:
    """What answers calls on the tensors of this module, put in by the modules above that know how."""

    functions: Callable[..., Any]
    """Python calls a function of torch on a recorded step."""
    operators: Callable[..., Any]
    """C++ calls an operator on either kind."""
    on_filled: Callable[..., Any]
    """Python calls a function of torch on a :class:`Filled` one."""


answers = _Answers()


class Recorded(Tensor):
    """A tensor of known shape, dtype and device whose numbers are made when somebody needs them.

    What is called on it is recorded too if it can run over all steps at once; anything else runs the record first.
    From then on the same object is an ordinary ``torch.Tensor``, its class included.
    """

    _value: Value

    def become(self, real: Tensor, apart: bool = False) -> None:
        """Put the computed tensor into this object, wherever it is referred to.

        ``apart``: C++ code may be looking at it right now, so that it has to stay where it is.
        """
        if not apart and swapped(self, real):
            return
        mode = torch.inference_mode if real.is_inference() else torch.enable_grad
        with torch._C.DisableTorchFunctionSubclass(), mode():
            own = real.clone()
            self.__dict__.pop("_value", None)
            self.__dict__.pop("_borrowed", None)
            self.__class__ = Filled  # type: ignore[assignment]
            filled: Any = self
            filled.own, filled.at = own, -1
            SET_DATA(filled, own.detach())
            if own.requires_grad:
                filled.copy_(own)  # the same numbers, for the place in the graph
            if not own.is_inference():
                filled.at = filled._version

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return answers.functions(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return answers.operators(func, args, kwargs or {})


def value_of(x: Tensor) -> Value | None:
    """What a recorded tensor stands for; None if it is none, or no more: another thread or a finalizer may run it."""
    return x.__dict__.get("_value")


def swapped_out(x: Tensor) -> Tensor | None:
    """The tensor that ``x`` is, whose object becomes a recorded one; None where C++ code holds it."""
    stand_in: Any = Tensor._make_wrapper_subclass(
        Recorded, x.shape, dtype=x.dtype, device=x.device, dispatch_device=True
    )
    if x._use_count() > 1:  # type: ignore[attr-defined]
        return None
    try:
        _swap(x, stand_in)
    except RuntimeError:  # it has weak references, or its node of the graph has
        return None
    x.__class__, stand_in.__class__ = Recorded, Tensor
    return stand_in  # type: ignore[no-any-return]


def give_back(x: Recorded, home: Tensor) -> None:
    """Undo :func:`swapped_out`."""
    x.__dict__.pop("_borrowed", None)
    if not swapped(x, home):
        x.become(home, apart=True)


class Filled(Tensor):
    """A recorded step that was computed while C++ code held it, and so could not be exchanged for its result.

    It has the numbers and the place in the graph of its result, and becomes an ordinary tensor the next time that
    Python sees it after C++ has let go. ``own``: a tensor on the same memory, which it is made from and which Python
    gets in its place. ``at``: its version then.
    """

    own: Tensor
    at: int

    def plain(self) -> Tensor:
        """An ordinary tensor in its place: itself if nobody in C++ holds it any more."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.at >= 0 and self._version != self.at:
                return self.alias()  # C++ code has written to it
        own = self.own
        del self.own
        if swapped(self, own):
            del self.at
            return self
        self.own = own
        return own

    def alias(self) -> Tensor:
        """An ordinary tensor on its memory, below autograd or at its place in the graph."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.view_as(self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return answers.on_filled(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return answers.operators(func, args, kwargs or {})


def swapped(x: Tensor, real: Tensor) -> bool:
    """Make ``x`` the tensor ``real``, its class included: whether it could be done, as nobody in C++ holds ``x``."""
    with torch._C.DisableTorchFunctionSubclass():
        if x._use_count() > 1:  # type: ignore[attr-defined]
            return False
        try:
            _swap(x, real)
        except (
            RuntimeError
        ):  # a profiler that notes shapes refers to what functions took, but not to a new view
            try:
                with torch.enable_grad():
                    _swap(x, real.view_as(real))
            except RuntimeError:
                return False
    x.__dict__.pop("_value", None)
    x.__dict__.pop("_borrowed", None)
    x.__class__ = Tensor
    return True
