"""Networks inside DistributedDataParallel and its like, which average gradients only where they are called."""

from __future__ import annotations

import gc
import warnings
from weakref import WeakSet

import torch
from torch import nn

_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
_LOOKED_AT: WeakSet[nn.Module] = WeakSet()

_WRITE = """
    class Model(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return unroll(self.net, x)

    model = {wrapper}(Model(net))
    spikes, mem, state = model(x)"""


def what_to_write(net: nn.Module) -> str | None:
    """What to do instead of giving this wrapper to ``unroll``; None where it is none."""
    for kind in type(net).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            return (
                f"{kind.__name__} works only where it is called itself, so call unroll inside the forward "
                f"that it wraps:\n{_WRITE.format(wrapper=kind.__name__)}"
            )
    return None


def warn_of_gradients_that_stay_apart(net: nn.Module) -> None:
    """Warn, once for a network, where it is unrolled around the DistributedDataParallel that holds it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if net in _LOOKED_AT or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    wrapper = nn.parallel.DistributedDataParallel
    if wrapper._get_active_ddp_module() is not None:
        return
    _LOOKED_AT.add(net)  # asking costs a pass over all of Python's objects
    held = (x for x in gc.get_objects() if issubclass(type(x), wrapper) and not x._use_python_reducer)
    if any(net is module for holder in held for module in holder.modules()):
        warnings.warn(
            "unroll was given a network that DistributedDataParallel wraps, outside the wrapper's forward: its "
            "gradients will not be averaged over the processes. Call unroll inside the forward that is "
            f"wrapped:\n{_WRITE.format(wrapper=wrapper.__name__)}",
            stacklevel=3,
        )
