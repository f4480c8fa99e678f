"""Two processes that train on halves of a batch: their averaged gradients are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("snntorch")
pytest.importorskip("norse.torch")

from training_ways import WAYS, batch, close, gradients, loss_of

DDP = """
    import os
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import training_ways as features

    class Whole(torch.nn.Module):
        def __init__(self, way):
            super().__init__()
            self.way, self.net = way, features.gridded(way.build())

        def forward(self, x):
            return self.way.sparse(self.net, x)[0]

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == 2
    mine = slice(rank * features.B // size, (rank + 1) * features.B // size)
    found = {}
    for name, way in features.WAYS.items():
        torch.manual_seed(rank)  # DDP gives every process the weights of the first
        model = DistributedDataParallel(Whole(way))
        x = torch.load(sys.argv[1])
        for _ in range(2):  # the second step meets the buckets that the first has built
            model.zero_grad()
            out = model(x[:, mine])
            features.loss_of(out, features.target(x)[:, mine]).backward()
        weights = model.module.net.state_dict()
        found[name] = weights, [p.grad * size for p in model.parameters()]
    if rank == 0:
        torch.save(found, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
    # The abort that this avoids is torch's: 3 of 20 runs of two processes with nn.Linear alone, no neuron and
    # nothing of this package, ended in "terminate called without an active exception" at the interpreter's
    # shutdown, although the group was destroyed. A worker thread of gloo that still holds a tensor asks for the GIL
    # of a closing interpreter, and Python ends such a thread by an unwinding that C++ does not survive
    os._exit(0)
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, the backend of processes on CPU",
)
def test_two_processes_average_to_the_gradient_of_one(tmp_path: Path) -> None:
    script, given, out = tmp_path / "train.py", tmp_path / "x.pt", tmp_path / "gradients.pt"
    script.write_text(textwrap.dedent(DDP))
    x = batch()
    torch.save(x, given)
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, script, given, out],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, (weights, found) in torch.load(out).items():
        way = WAYS[name]
        net = way.build()
        net.load_state_dict(weights)
        close(found, gradients(net, loss_of(way.sparse(net, x)[0])))
