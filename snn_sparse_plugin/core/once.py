"""Tensors that nobody writes to, made once and kept for all calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def made_once(maxsize: int) -> Callable[[F], F]:
    """Decorator of a function that makes tensors of positional arguments: keep what it made of the last ``maxsize``.

    What is kept may take part in a graph, whatever mode it was first asked for in. Under a dispatch mode, whose tensors
    are its own, it is made anew.
    """

    def decorate(make: F) -> F:
        @lru_cache(maxsize)
        def kept(*args: Any) -> Any:
            with torch.inference_mode(False):
                return make(*args)

        @wraps(make)
        def made(*args: Any) -> Any:
            return make(*args) if torch._C._len_torch_dispatch_stack() else kept(*args)

        return made  # type: ignore[return-value]

    return decorate
