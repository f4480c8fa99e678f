"""A step's result that has not been computed yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import FusionError

if TYPE_CHECKING:
    from .record import Lane

Value = tuple["Lane", int, int]
"""Where a value is made: the lane, the number of the call in it, and which of the call's results."""


@cache
def _called() -> Callable[..., Any]:
    """What answers calls on recorded steps; it stands above this module."""
    from .functions import called

    return called


class Recorded(Tensor):
    """A tensor of known shape, dtype and device whose numbers are made when somebody needs them.

    What is called on it is recorded too if it can run over all steps at once; anything else runs the record first.
    From then on the same object is an ordinary ``torch.Tensor``, its class included.
    """

    _value: Value

    def become(self, real: Tensor) -> None:
        """Put the computed tensor into this object, wherever it is referred to."""
        with torch._C.DisableTorchFunctionSubclass():
            users = self._use_count()  # type: ignore[attr-defined]
        if users > 1:
            raise FusionError(
                "a recorded step reached code that takes tensors without torch's function protocol, so that it cannot "
                "be filled in any more. Call .clone() on it before, or switch time fusion off (SNN_SPARSE_FUSE=0)."
            )
        try:
            torch._C._swap_tensor_impl(self, real)  # type: ignore[attr-defined]
        except (
            RuntimeError
        ):  # a profiler that notes shapes refers to what functions took, but not to a new view
            with torch.enable_grad():
                torch._C._swap_tensor_impl(self, real.view_as(real))  # type: ignore[attr-defined]
        del self._value
        self.__class__ = Tensor  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _called()(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise FusionError(
            f"{func} was called on a recorded step without torch's function protocol. Call .clone() on the tensor "
            f"before it gets there, or switch time fusion off (SNN_SPARSE_FUSE=0)."
        )
