"""Norse: a recurrent LSNN layer tells which of two cues came first, after a pause."""

import torch
import torch.nn.functional as F
from torch import nn
from tutorial import Clock, arguments, library, report, sparse

args = arguments(__doc__, epochs=120)
norse = library("norse.torch", args.mode)
STEPS, batch_size, channels, hidden = 40, 64, 20, 64


def cues(count):
    """Noisy spikes (T, B, N): the first half of the channels is one cue, the second the other."""
    labels = torch.randint(0, 2, (count,))
    x = (torch.rand(STEPS, count, channels) < 0.02).float()
    half = channels // 2
    for sample, label in enumerate(labels):
        for order, start in enumerate((2, 14)):
            cue = int(label) if order == 0 else 1 - int(label)
            burst = (torch.rand(8, half) < 0.5).float()
            x[start : start + 8, sample, cue * half : (cue + 1) * half] = burst
    return x, labels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = norse.LSNNRecurrentCell(channels, hidden, p=norse.LSNNParameters(alpha=50.0))
        self.out = nn.Linear(hidden, 2)
        self.readout = norse.LICell()

    def forward(self, x):
        s1 = so = None
        voltages = []
        for step in x:
            z, s1 = self.cell(step, s1)
            v, so = self.readout(self.out(z), so)
            voltages.append(v)
        return torch.stack(voltages)[-10:].mean(0)


net, clock = Net(), Clock()
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
with sparse(args.mode):
    for epoch in range(args.epochs):
        x, y = cues(batch_size)
        loss = F.cross_entropy(8 * net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.tick(loss)
        if epoch % 20 == 19:
            print(f"step {epoch + 1}: loss {loss.item():.3f}")
    clock.stop()
    with torch.no_grad():
        x, y = cues(1000)
        accuracy = 100 * (net(x).argmax(1) == y).float().mean().item()
report(loss, accuracy, clock)
