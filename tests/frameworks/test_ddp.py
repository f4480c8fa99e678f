"""DistributedDataParallel and FSDP: two processes with half a batch each have the gradient of the whole batch."""

from __future__ import annotations

import pytest

pytest.importorskip("snntorch", reason="snnTorch is not installed")

from frameworks.processes import END, needs_gloo, run

BEGIN = """
import inspect, os, sys, textwrap, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from snntorch import utils
import snn_sparse_plugin as ssp
from frameworks.networks import *

torch.set_num_threads(1)
expected = gradients_of_the_whole_batch()
warnings.simplefilter("error")
dist.init_process_group("gloo")
rank = dist.get_rank()
x = batch()[:, 2 * rank : 2 * rank + 2]

def train(model, run, tell):
    for _ in range(2):  # the second pass meets the buckets that the first has built
        model.zero_grad()
        loss_of(run(model)).backward()
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    far = apart([whole(p.grad) for p in model.parameters()], expected)
    assert far < 1e-5, (tell, far)
    sys.stdout.write(f"averaged: {tell}\\n")  # in one piece, beside the other process
"""


@needs_gloo
def test_two_processes(tmp_path) -> None:
    """One start of two processes for all of it, which takes longer than what they do.

    ``unroll`` of the wrapper is refused with what to write instead; the network that it holds runs, with a warning.
    """
    out = run(
        tmp_path,
        BEGIN
        + """
for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
    train(DistributedDataParallel(Unrolling(), **options), lambda model: model(x), f"unroll {options}")

def steps(model):
    utils.reset(model.module)
    return torch.stack([model(step)[0] for step in x])

# hidden states are buffers, and DDP gives every process those of the first at each of its forwards
names = inspect.signature(DistributedDataParallel).parameters
own_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
with ssp.sparse_mode():
    train(DistributedDataParallel(Looping()), lambda model: model(x), "loop inside")
    train(DistributedDataParallel(network(), **own_buffers), steps, "loop over the wrapper")

model = DistributedDataParallel(network())
try:
    ssp.unroll(model, x)
except ssp.InputError as error:
    assert "got DistributedDataParallel" in str(error)
    code = textwrap.dedent(str(error).split("\\n", 1)[1])
    names = {"nn": nn, "unroll": ssp.unroll, "net": network(), "x": x,
             "DistributedDataParallel": DistributedDataParallel}
    exec(code, names)  # what the error says to write
    train(names["model"], lambda model: (utils.reset(model.module.net), model(x))[1], "as the error says")

def warned(run):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in found if "will not be averaged" in str(w.message)]

utils.reset(model)
with torch.no_grad():
    assert not warned(lambda: ssp.unroll(model.module, x))
first = warned(lambda: ssp.unroll(model.module, x))
assert len(first) == 1 and "class Model(nn.Module)" in first[0], first
assert not warned(lambda: ssp.unroll(model.module, x))  # once
assert not warned(lambda: ssp.unroll(network(), x))  # in no wrapper: averaged by hand, or by nobody

from torch.distributed import fsdp
if not hasattr(fsdp, "fully_shard"):
    print("no fsdp")
else:
    warnings.simplefilter("default")  # of FSDP's own, about views
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (2,))
    model = Unrolling()
    for layer in (model.net[0], model.net[2], model):
        fsdp.fully_shard(layer, mesh=mesh)
    train(model, lambda model: model(x), "fsdp, unroll")
    model = Looping()
    fsdp.fully_shard(model, mesh=mesh)
    with ssp.sparse_mode():
        train(model, lambda model: model(x), "fsdp, loop")
"""
        + END,
        processes=2,
    )
    assert out.count("averaged: unroll") == 6
    assert out.count("averaged: loop") == 4
    assert out.count("averaged: as the error says") == 2
    assert out.count("averaged: fsdp") == 4 or "no fsdp" in out


def test_without_processes_nothing_is_looked_for() -> None:
    import torch
    from frameworks.networks import batch, network

    from snn_sparse_plugin import InputError, unroll
    from snn_sparse_plugin.fusion import wrapped

    unroll(network(), batch())
    assert not len(wrapped._LOOKED_AT)
    with pytest.raises(InputError, match=r"got DataParallel\. DataParallel works only where it is called"):
        unroll(torch.nn.DataParallel(network()), batch())
