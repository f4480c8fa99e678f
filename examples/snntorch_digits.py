"""Train a two-hidden-layer snnTorch network on 8x8 digits, sparse: only the import and the time loop change.

python examples/snntorch_digits.py --epochs 8
"""

import argparse

import torch
import torch.nn.functional as F
from snntorch import surrogate, utils
from torch import nn

import snn_sparse_plugin.snntorch as snn  # was: import snntorch as snn
from snn_sparse_plugin import unroll
from snn_sparse_plugin.data import latency_spikes, load_images

STEPS = 100

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--samples", type=int, default=0, help="training images; 0 is all")
args = parser.parse_args()

torch.manual_seed(0)
neuron = {"beta": 0.95, "spike_grad": surrogate.fast_sigmoid(slope=50), "init_hidden": True}
net = nn.Sequential(
    nn.Linear(64, 200, bias=False),
    snn.Leaky(**neuron),
    nn.Linear(200, 200, bias=False),
    snn.Leaky(**neuron),
    nn.Linear(200, 10, bias=False),
    snn.Leaky(**neuron, reset_mechanism="none", output=True),
)
for linear in net[::2]:
    nn.init.normal_(linear.weight, std=1.5 / linear.in_features**0.5)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
data = load_images("digits").limited(args.samples)


def logits(images: torch.Tensor) -> torch.Tensor:
    """The mean membrane of the output layer, (B, 10)."""
    utils.reset(net)
    spikes = latency_spikes(images, STEPS, tau=40)  # or any dense 0/1 tensor (T, B, 64)
    # was: for step in range(STEPS): spk, mem = net(spikes[step]); record mem
    _, mem, _ = unroll(net, spikes)
    return mem.mean(0)


for epoch in range(args.epochs):
    for batch in torch.randperm(len(data.train_y)).split(64):
        loss = F.cross_entropy(logits(data.train_x[batch]), data.train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (logits(data.test_x).argmax(1) == data.test_y).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {100 * accuracy:.1f} %")
