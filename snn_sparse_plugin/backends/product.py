"""A gradient of spikes that stays a product of two matrices until somebody needs its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

LARGEST = 64
"""Neurons of the layer above up to which a kernel multiplies in every case; beyond, only where it is as fast as the
library: in float32, with some steps, and a sample or more for each thread."""


class ProductGrad(Tensor):
    """``nu @ weight``, (T, B, M), of ``nu`` (T, B, K) and ``weight`` (K, M), not multiplied yet.

    The layer below forms its T·B·M numbers a few steps at a time where it needs them, instead of reading them from
    memory. Whatever else the gradient meets, a sum with another one or a hook, gets the dense tensor.
    """

    nu: Tensor
    weight: Tensor

    @staticmethod
    def __new__(cls, nu: Tensor, weight: Tensor) -> ProductGrad:
        shape = (*nu.shape[:-1], weight.shape[1])
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=nu.dtype, device=nu.device)
        made.nu, made.weight = nu, weight
        return made

    def dense(self) -> Tensor:
        """The product itself."""
        return self.nu @ self.weight

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(ProductGrad, ProductGrad.dense, (args, kwargs or {}))
        return func(*args, **kwargs)
