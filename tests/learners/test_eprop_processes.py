"""Two processes: gradients are averaged once per flush and equal those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eprop_cases import build, grads, inputs, loss_of
from helpers import relative

from snn_sparse_plugin.learners import eprop

PROGRAM = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from eprop_cases import build, loop, loss_of
from snn_sparse_plugin.learners import eprop

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, reduced, reduce = dist.get_rank(), [], dist.all_reduce

def counted(tensor, *args, **kwargs):
    reduced.append(tensor.numel())
    return reduce(tensor, *args, **kwargs)

dist.all_reduce = counted
found, saved = {}, torch.load(sys.argv[1])
x = saved["x"][:, 2 * rank : 2 * rank + 2]
for name, weights in saved["weights"].items():
    net = build(name)
    net.load_state_dict(weights)
    model = DistributedDataParallel(net)
    with eprop.EProp(model, chunk=5) as learner:
        for _ in range(2):  # a second sequence meets whatever the first left behind
            model.zero_grad()
            learner.reset()
            state = None
            for now in x:
                y, state = model(now, state)
                learner.step(loss_of(y))
            before = len(reduced)
            learner.flush()
            assert len(reduced) == before + 1
    found[name] = {name: p.grad for name, p in net.named_parameters()}
if rank == 0:
    torch.save(found, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # a thread of the process group at times outlives the interpreter, and aborts the process
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, the backend of processes on CPU",
)
def test_two_processes_equal_one(tmp_path):
    names = ["lsnn", "leaky-zero"]
    nets, x = {name: build(name) for name in names}, inputs(T=12)
    weights = {name: net.state_dict() for name, net in nets.items()}
    torch.save({"x": x, "weights": weights}, tmp_path / "in.pt")
    (tmp_path / "program.py").write_text(PROGRAM)
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    for name, net in nets.items():
        with eprop.EProp(net, chunk=5) as learner:
            state = None
            for now in x:
                y, state = net(now, state)
                # the mean of the halves' losses
                learner.step((loss_of(y[:2]) + loss_of(y[2:])) / 2)
            learner.flush()
        for parameter, grad in grads(net).items():
            assert relative(found[name][parameter], grad) < 1e-12, (name, parameter)
