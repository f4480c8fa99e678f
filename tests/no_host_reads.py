"""A block in which no number of a tensor may reach Python, as in the capture of a CUDA graph."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Each waits for a CUDA device: a number or a size that only the device knows is needed on the host.
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.allclose,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.argwhere,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}


class HostRead(AssertionError):
    """A number was read on the host."""


class NoHostReads(TorchDispatchMode):
    """Raises where an operator needs a number of a tensor on the host; ``launching`` kernels are free to."""

    launching = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.launching:
            packet = func.overloadpacket
            masks = [i for i in (args[1] if packet in INDEXED else ()) if i is not None]
            sized = packet is not aten.repeat_interleave or kwargs.get("output_size") is not None
            if packet in READS or not sized or any(i.dtype in (torch.bool, torch.uint8) for i in masks):
                raise HostRead(f"{func} reads its input on the host")
        return func(*args, **kwargs)


def _refusing(name, original):
    def read(self, *args, **kwargs):
        if not NoHostReads.launching:
            raise HostRead(f"Tensor.{name} reads its numbers on the host")
        return original(self, *args, **kwargs)

    return read


def notice_launches(patch):
    """Have :class:`NoHostReads` know when the interpreter of Triton stands for a launch: it reads all the time then."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def launched(*args, **kwargs):
        NoHostReads.launching += 1
        try:
            return launch(*args, **kwargs)
        finally:
            NoHostReads.launching -= 1

    patch.setattr(interpreter.GridExecutor, "__call__", launched)


@contextmanager
def no_host_reads(monkeypatch, methods=("tolist", "numpy", "cpu")):
    """Inside the block tensors are taken for those of a device, and to read one raises :class:`HostRead`.

    Steps are recorded although a mode of torch is in force, which is this one.
    """
    from snn_sparse_plugin.core import host, registry
    from snn_sparse_plugin.fusion import context

    with monkeypatch.context() as patch:
        notice_launches(patch)
        patch.setattr(host, "HOSTS", frozenset())
        patch.setattr(registry, "conversions", lambda device: None)  # compiled ones, which see all memory
        patch.setattr(context, "_dispatch_modes", lambda: 0)
        for name in methods:
            patch.setattr(torch.Tensor, name, _refusing(name, getattr(torch.Tensor, name)))
        with NoHostReads():
            yield
