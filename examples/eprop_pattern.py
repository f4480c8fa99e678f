"""Teach an unmodified snnTorch or Norse network to draw a curve, online: one loss per time step, no graph in between.

python examples/eprop_pattern.py --library norse --iterations 200
"""

import argparse
import math
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from snn_sparse_plugin.learners import eprop

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--library", default="snntorch", choices=["snntorch", "norse"])
parser.add_argument("--iterations", type=int, default=200)
parser.add_argument("--steps", type=int, default=200, help="T")
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--feedback", default="symmetric", choices=["symmetric", "random", "adaptive"])
parser.add_argument("--picture", type=Path, default=Path("eprop_pattern.png"))
INPUTS, HIDDEN, OUTPUTS = 50, 100, 2


def snntorch_network():
    import snntorch as snn
    from snntorch import surrogate

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(INPUTS, HIDDEN)
            self.hidden = snn.RLeaky(
                beta=0.95, linear_features=HIDDEN, spike_grad=surrogate.fast_sigmoid(slope=5)
            )
            self.fc2 = nn.Linear(HIDDEN, OUTPUTS)
            self.readout = snn.Leaky(beta=0.9, reset_mechanism="none")

        def forward(self, x, state=None):
            if state is None:
                state = (*self.hidden.reset_mem(), self.readout.reset_mem())
            spikes, mem, out = state
            spikes, mem = self.hidden(self.fc1(x), spikes, mem)
            _, out = self.readout(self.fc2(spikes), out)
            return out, (spikes, mem, out)

    return Network()


def norse_network():
    import norse.torch as norse

    p = norse.LIFParameters(v_th=torch.tensor(0.3))
    return norse.SequentialState(
        norse.LIFRecurrentCell(INPUTS, HIDDEN, p=p), nn.Linear(HIDDEN, OUTPUTS), norse.LICell()
    )


def curves(steps):
    """Each output is a sum of sines with drawn phases, (T, 2)."""
    t = torch.arange(steps) / steps
    phases = 2 * math.pi * torch.rand(OUTPUTS, 3, 1)
    waves = torch.sin(2 * math.pi * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1) * t + phases)
    return (0.3 * waves.sum(1)).T


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    net = {"snntorch": snntorch_network, "norse": norse_network}[args.library]()
    x = (torch.rand(args.steps, 1, INPUTS) < 0.1).float()  # the same spikes every time
    target = curves(args.steps)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    losses, drawn = [], None
    with eprop.EProp(net, chunk=50, feedback=args.feedback) as learner:
        for _ in track(range(args.iterations), "learning"):
            optimizer.zero_grad()
            learner.reset()
            state, total, drawn = None, 0.0, []
            for now, wanted in zip(x, target, strict=True):
                y, state = net(now, state)
                loss = (y - wanted).square().mean()
                learner.step(loss)
                total += loss.item() / args.steps
                drawn.append(y.detach()[0])
            learner.flush()
            optimizer.step()
            losses.append(total)
    print(f"{args.library}: mean squared error {losses[0]:.4f} before, {losses[-1]:.4f} after")
    draw(args.picture, torch.stack(drawn), target, losses)


def draw(path, drawn, target, losses):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(drawn, color="tab:blue")
    left.plot(target, color="black", linestyle=":")
    left.set(xlabel="step", ylabel="output, and what it should be")
    right.semilogy(losses)
    right.set(xlabel="iteration", ylabel="mean squared error")
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
