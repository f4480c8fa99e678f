"""Training in several processes: gradients are averaged once per flush, not once per backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _wrapped(model: nn.Module) -> Any:
    """The ``DistributedDataParallel`` that the model is, or None."""
    # the class exists only where torch was built with distributed
    if dist.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    return None


def inner(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, or the module itself."""
    wrapper = _wrapped(model)
    return model if wrapper is None else wrapper.module


def no_sync(model: nn.Module) -> AbstractContextManager[Any]:
    """Keeps the wrapper from waiting for gradients of its own; here they never pass through autograd."""
    wrapper = _wrapped(model)
    return nullcontext() if wrapper is None else wrapper.no_sync()


def averaged(model: nn.Module, grads: list[Tensor]) -> list[Tensor]:
    """Gradients averaged over the processes of a wrapped model, as ``DistributedDataParallel`` does."""
    wrapper = _wrapped(model)
    if wrapper is None or not grads:
        return grads
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=wrapper.process_group)
    flat /= dist.get_world_size(wrapper.process_group)
    return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
