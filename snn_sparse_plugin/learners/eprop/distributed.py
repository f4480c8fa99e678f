"""Training in several processes: gradients are averaged once per flush, not once per backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _is_wrapped(model: nn.Module) -> bool:
    return dist.is_available() and isinstance(model, nn.parallel.DistributedDataParallel)


def inner(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, or the module itself."""
    return model.module if _is_wrapped(model) else model


def no_sync(model: nn.Module) -> AbstractContextManager[Any]:
    """Keeps the wrapper from waiting for gradients of its own; here they never pass through autograd."""
    return model.no_sync() if _is_wrapped(model) else nullcontext()  # type: ignore[operator]


def averaged(model: nn.Module, grads: list[Tensor]) -> list[Tensor]:
    """Gradients averaged over the processes of a wrapped model, as ``DistributedDataParallel`` does."""
    if not _is_wrapped(model) or not grads:
        return grads
    flat = torch.cat([g.flatten() for g in grads])
    group = model.process_group
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
