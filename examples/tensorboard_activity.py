"""Spike rate and active share of every layer during training, as TensorBoard scalars.

A layer that stops spiking, or that no gradient passes any more, shows at once.

    python examples/tensorboard_activity.py --logdir runs
    tensorboard --logdir runs
"""

import argparse

import snntorch as snn
import torch
from snntorch import surrogate, utils
from torch import nn

from snn_sparse_plugin import record_activity, sparsify, unroll

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise SystemExit("this example writes for TensorBoard: pip install tensorboard") from error

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs")
parser.add_argument("--steps", type=int, default=20, help="training steps")
args = parser.parse_args()

torch.manual_seed(0)
spike_grad = surrogate.fast_sigmoid(slope=25)
net = nn.Sequential(
    nn.Linear(60, 40),
    snn.Leaky(beta=0.9, spike_grad=spike_grad, init_hidden=True),
    nn.Linear(40, 4),
    snn.Leaky(beta=0.9, spike_grad=spike_grad, init_hidden=True, output=True),
)
sparsify(net, backprop_threshold=0.2)
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)

with SummaryWriter(args.logdir) as writer, record_activity(net) as log:
    for step in range(args.steps):
        utils.reset(net)
        labels = torch.randint(4, (32,))
        # class k spikes more often in its own quarter of the inputs
        rates = torch.full((32, 4, 15), 0.03)
        rates[torch.arange(32), labels] = 0.2
        x = (torch.rand(30, 32, 60) < rates.flatten(1)).float()
        loss = nn.functional.cross_entropy(unroll(net, x).spikes.sum(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        writer.add_scalar("loss", loss.item(), step)
        for name, value in log.scalars().items():
            writer.add_scalar(name, value, step)
        log.clear()
print(f"loss {loss.item():.3f}; see it with: tensorboard --logdir {args.logdir}")
