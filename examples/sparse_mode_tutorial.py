"""A tutorial's snnTorch network and loop, unmodified, inside ``sparse_mode()``.

Spikes are upstream's, bit for bit; the gradient reaches only neurons near threshold. ``unroll`` (see
snntorch_digits.py) runs all steps at once and is what makes training fast.

    python examples/sparse_mode_tutorial.py --epochs 2
"""

import argparse

import snntorch as snn
import torch
from snntorch import surrogate
from torch import nn

from snn_sparse_plugin import sparse_mode
from snn_sparse_plugin.data import latency_spikes, load_images

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--samples", type=int, default=0, help="training images; 0 is all")
args = parser.parse_args()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        spike_grad = surrogate.fast_sigmoid(slope=25)
        self.fc1 = nn.Linear(64, 200)
        self.lif1 = snn.Leaky(beta=0.95, spike_grad=spike_grad)
        self.fc2 = nn.Linear(200, 10)
        self.lif2 = snn.Leaky(beta=0.95, spike_grad=spike_grad)

    def forward(self, x):
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        mem2_rec = []
        for step in range(x.size(0)):
            cur1 = self.fc1(x[step])
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            _, mem2 = self.lif2(cur2, mem2)
            mem2_rec.append(mem2)
        return torch.stack(mem2_rec)


def train():
    torch.manual_seed(0)
    net, loss_fn = Net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    data = load_images("digits").limited(args.samples)
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(data.train_y)).split(64):
            x = latency_spikes(data.train_x[batch], steps=50).to_dense()
            loss = loss_fn(net(x).mean(0), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            mem = net(latency_spikes(data.test_x, steps=50).to_dense())
        accuracy = (mem.mean(0).argmax(1) == data.test_y).float().mean()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {100 * accuracy:.1f} %")


with sparse_mode():
    train()
