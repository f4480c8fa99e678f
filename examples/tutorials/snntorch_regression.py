"""snnTorch: regression of a membrane onto a curve with a recurrent leaky layer."""

import torch
import torch.nn.functional as F
from torch import nn
from tutorial import Clock, arguments, library, report, sparse

args = arguments(__doc__, epochs=300)
snn = library("snntorch", args.mode)
num_steps, hidden, batch_size = 30, 128, 16


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(1, hidden)
        self.lif1 = snn.RLeaky(beta=0.9, linear_features=hidden)
        self.fc2 = nn.Linear(hidden, 1)
        self.lif2 = snn.Leaky(beta=0.9, reset_mechanism="none")

    def forward(self, x):
        spk1, mem1 = self.lif1.init_rleaky()
        mem2 = self.lif2.init_leaky()
        mem_rec = []
        for step in range(num_steps):
            spk1, mem1 = self.lif1(self.fc1(x[step]), spk1, mem1)
            _, mem2 = self.lif2(self.fc2(spk1), mem2)
            mem_rec.append(mem2)
        return torch.stack(mem_rec)


time = torch.linspace(0, 1, num_steps).view(-1, 1, 1)
scale = torch.linspace(0.5, 1.5, batch_size).view(1, -1, 1)
x, target = (scale * time).contiguous(), scale * torch.sin(6 * time) * time
net, clock = Net(), Clock()
with torch.no_grad():
    net.lif1.recurrent.weight.mul_(0.5)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=args.epochs)
with sparse(args.mode):
    for _ in range(args.epochs):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        clock.tick(loss)
    print(f"mean squared error {loss.item():.4f}, of the mean {target.var().item():.4f}")
explained = 100 * (1 - loss.item() / target.var().item())
report(loss, explained, clock, unit="variance explained in %")
